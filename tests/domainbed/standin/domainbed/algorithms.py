from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F

from domainbed import networks

ALGORITHMS = [
    *("ERM", "Fish", "IRM", "GroupDRO", "VREx", "ANDMask", "SANDMask", "IGA", "Fishr"),
    *("EQRM", "RDM", "SD", "CORAL", "MMD", "IB_ERM", "IB_IRM"),
    *("CausIRL_CORAL", "CausIRL_MMD", "MLDG"),
]


def get_algorithm_class(algorithm_name: str) -> type:
    if algorithm_name not in globals():
        raise NotImplementedError(f"Algorithm not found: {algorithm_name}")
    return globals()[algorithm_name]


class Algorithm(nn.Module):
    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: Any) -> None:
        super().__init__()
        self.hparams = hparams

    def adam(self) -> torch.optim.Adam:
        rates = {"lr": self.hparams["lr"], "weight_decay": self.hparams["weight_decay"]}
        return torch.optim.Adam(self.network.parameters(), **rates)

    def predict(self, x: Tensor) -> Tensor:
        return self.network(x)

    def descend(self, objective: Tensor) -> None:
        self.optimizer.zero_grad()
        objective.backward()
        self.optimizer.step()


class ERM(Algorithm):
    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: Any) -> None:
        Algorithm.__init__(self, input_shape, num_classes, num_domains, hparams)
        self.featurizer = networks.Featurizer(input_shape, hparams)
        self.classifier = networks.Classifier(self.featurizer.n_outputs, num_classes)
        self.network = nn.Sequential(self.featurizer, self.classifier)
        self.optimizer = self.adam()

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        loss = F.cross_entropy(*self.joint(minibatches))
        self.descend(loss)
        return {"loss": loss.item()}

    def joint(self, minibatches: Any) -> tuple[Tensor, Tensor]:
        x, y = (torch.cat(parts) for parts in zip(*minibatches, strict=True))
        return self.network(x), y

    def domain_losses(self, minibatches: Any) -> list[Tensor]:
        """From a forward for each."""
        return [F.cross_entropy(self.network(x), y) for x, y in minibatches]

    def domain_gradients(self, losses: list[Tensor], create_graph: bool = False) -> list[Any]:
        parameters = list(self.network.parameters())
        return [grad(loss, parameters, create_graph=create_graph) for loss in losses]


class Annealed(ERM):
    prefix: str
    early = 1.0

    def __init__(self, *args: Any) -> None:
        ERM.__init__(self, *args)
        self.register_buffer("update_count", torch.tensor([0]))

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        logits, y = self.joint(minibatches)
        parts = [len(labels) for _, labels in minibatches]
        nll, shown, penalty = self.parts(logits, y, parts)
        start = self.hparams[f"{self.prefix}penalty_anneal_iters"]
        weight = self.hparams[f"{self.prefix}lambda"] if self.update_count >= start else self.early
        if self.update_count == start:
            self.optimizer = self.adam()
        objective = nll + weight * penalty
        self.descend(objective)
        self.update_count += 1
        return {"loss": objective.item(), "nll": shown.item(), "penalty": penalty.item()}


class IRM(Annealed):
    prefix = "irm_"

    def parts(self, logits: Tensor, y: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        nll, penalty = [], []
        for z, labels in zip(logits.split(sizes), y.split(sizes), strict=True):
            scale = torch.ones((), requires_grad=True)
            even, odd = (F.cross_entropy(z[i::2] * scale, labels[i::2]) for i in (0, 1))
            slopes = [grad(half, scale, create_graph=True)[0] for half in (even, odd)]
            penalty.append(slopes[0] * slopes[1])
            nll.append(F.cross_entropy(z, labels))
        mean = torch.stack(nll).mean()
        return mean, mean, torch.stack(penalty).mean()


class VREx(Annealed):
    prefix = "vrex_"

    def parts(self, logits: Tensor, y: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        parts = zip(logits.split(sizes), y.split(sizes), strict=True)
        losses = torch.stack([F.cross_entropy(z, labels) for z, labels in parts])
        return losses.mean(), losses[-1], losses.var(unbiased=False)


class Fishr(Annealed):
    prefix, early = "", 0.0

    def __init__(self, *args: Any) -> None:
        Annealed.__init__(self, *args)
        self.history: list[Any] = [0.0] * args[2]

    def parts(self, logits: Tensor, y: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        nll = F.cross_entropy(logits, y)
        head, decay = list(self.classifier.parameters()), self.hparams["ema"]
        losses = F.cross_entropy(logits, y, reduction="none")
        samples = torch.stack(
            [torch.cat([g.flatten() for g in grad(one, head, create_graph=True)]) for one in losses]
        )
        used = []
        for d, rows in enumerate(samples.split(sizes)):
            now = decay * self.history[d] + (1 - decay) * rows.var(0, unbiased=False)
            self.history[d] = now.detach()
            used.append(now / (1 - decay))
        return nll, nll, torch.stack(used).var(0, unbiased=False).mean()


class GroupDRO(ERM):
    def __init__(self, *args: Any) -> None:
        ERM.__init__(self, *args)
        self.register_buffer("q", torch.Tensor())

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        if not len(self.q):
            self.q = torch.ones(len(minibatches))
        losses = torch.stack(self.domain_losses(minibatches))
        self.q = self.q * (self.hparams["groupdro_eta"] * losses.detach()).exp()
        self.q = self.q / self.q.sum()
        objective = self.q @ losses
        self.descend(objective)
        return {"loss": objective.item()}


class ANDMask(ERM):
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        losses = self.domain_losses(minibatches)
        gradients = zip(*self.domain_gradients(losses), strict=True)
        for p, of_domains in zip(self.network.parameters(), gradients, strict=True):
            each = torch.stack(of_domains)
            mask = self.mask(each)
            p.grad = mask * each.mean(0) / (1e-10 + mask.mean())
        self.optimizer.step()
        return {"loss": torch.stack(losses).mean().item()}

    def mask(self, each: Tensor) -> Tensor:
        return (each.sign().mean(0).abs() >= self.hparams["tau"]).to(each.dtype)


class SANDMask(ANDMask):
    def mask(self, each: Tensor) -> Tensor:
        over = each.sign().mean(0).abs() - self.hparams["tau"]
        return (self.hparams["k"] / each.var(0) * over).tanh().clamp(min=0)


class IGA(ERM):
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        losses = self.domain_losses(minibatches)
        each = self.domain_gradients(losses, create_graph=True)
        flat = torch.stack([torch.cat([g.flatten() for g in grads]) for grads in each])
        penalty = (flat - flat.mean(0)).square().sum()
        loss = torch.stack(losses).mean()
        self.descend(loss + self.hparams["penalty"] * penalty)
        return {"loss": loss.item(), "penalty": penalty.item()}


class SD(ERM):
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        logits, y = self.joint(minibatches)
        loss, penalty = F.cross_entropy(logits, y), logits.square().mean()
        self.descend(loss + self.hparams["sd_reg"] * penalty)
        return {"loss": loss.item(), "penalty": penalty.item()}


class CORAL(ERM):
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        features = [self.featurizer(x) for x, _ in minibatches]
        labels = [y for _, y in minibatches]
        pairs = zip(features, labels, strict=True)
        losses = [F.cross_entropy(self.classifier(z), y) for z, y in pairs]
        apart = [self.apart(a, b) for k, a in enumerate(features) for b in features[:k]]
        loss, penalty = torch.stack(losses).mean(), torch.stack(apart).mean()
        self.descend(loss + self.hparams["mmd_gamma"] * penalty)
        return {"loss": loss.item(), "penalty": penalty.item()}

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        covariance = (a.t().cov() - b.t().cov()).square().mean()
        return (a.mean(0) - b.mean(0)).square().mean() + covariance


class MMD(CORAL):
    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        def kernel(x: Tensor, y: Tensor) -> Tensor:
            squares = (x.unsqueeze(1) - y).square().sum(2)
            return torch.stack([(-(10.0**m) * squares).exp() for m in range(-3, 4)]).sum(0).mean()

        return kernel(a, a) + kernel(b, b) - 2 * kernel(a, b)


class CausIRL_CORAL(CORAL):  # DomainBed's name
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        features = [self.featurizer(x) for x, _ in minibatches]
        labels = [y for _, y in minibatches]
        pairs = zip(features, labels, strict=True)
        loss = torch.stack([F.cross_entropy(self.classifier(z), y) for z, y in pairs]).mean()
        cuts = [np.random.randint(0, len(z)) for z in features]
        first = torch.cat([z[:k] for z, k in zip(features, cuts, strict=True)])
        second = torch.cat([z[k:] for z, k in zip(features, cuts, strict=True)])
        many = min(len(first), len(second)) > 1
        penalty = self.apart(first, second) if many else torch.tensor(0.0)
        self.descend(loss + self.hparams["mmd_gamma"] * penalty)
        return {"loss": loss.item(), "penalty": penalty.item()}


class CausIRL_MMD(CausIRL_CORAL):  # DomainBed's name
    apart = MMD.apart


class MLDG(ERM):
    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        tests, beta, share = int(self.hparams["n_meta_test"]), self.hparams["mldg_beta"], 0.0
        order = torch.randperm(len(minibatches)).tolist()
        train, test = order[: len(order) - tests], order[len(order) - tests :]
        total = [torch.zeros_like(p) for p in self.network.parameters()]
        for k, i in enumerate(train):
            inner = copy.deepcopy(self.network)
            rates = {"lr": self.hparams["lr"], "weight_decay": self.hparams["weight_decay"]}
            opt = torch.optim.Adam(inner.parameters(), **rates)
            for d, weight in ((i, 1.0), (test[k % tests], beta)):
                x, y = minibatches[d]
                loss = F.cross_entropy(inner(x), y)
                opt.zero_grad()
                loss.backward()
                share += weight * loss.item() / len(order)
                for sum_, p in zip(total, inner.parameters(), strict=True):
                    sum_ += weight * p.grad / len(order)
                opt.step()
        for sum_, p in zip(total, self.network.parameters(), strict=True):
            p.grad = sum_
        self.optimizer.step()
        return {"loss": share}


class RDM(ERM):
    """For the places where DomainBed's network and hyper-parameters count; its own needs a GPU."""


class IB_ERM(ERM):  # DomainBed's name
    def __init__(self, *args: Any) -> None:
        ERM.__init__(self, *args)
        self.register_buffer("update_count", torch.tensor([0]))

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        features = self.featurizer(torch.cat([x for x, _ in minibatches]))
        sizes = [len(y) for _, y in minibatches]
        logits = self.classifier(features).split(sizes)
        labels = [y for _, y in minibatches]
        losses = [F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)]
        variances = [z.var(0).mean() for z in features.split(sizes)]
        values = {"nll": torch.stack(losses).mean(), "IB_penalty": torch.stack(variances).mean()}
        values |= self.more(logits, labels)
        loss, weights = values["nll"], {"IB_penalty": "ib_", "IRM_penalty": "irm_"}
        for name, prefix in weights.items():
            start = self.hparams.get(f"{prefix}penalty_anneal_iters")
            if name in values and self.update_count >= start:
                loss = loss + self.hparams[f"{prefix}lambda"] * values[name]
            elif name == "IRM_penalty" and name in values:
                loss = loss + values[name]
            if name in values and self.update_count == start:
                self.optimizer = self.adam()
        self.descend(loss)
        self.update_count += 1
        return {"loss": loss.item(), **{name: value.item() for name, value in values.items()}}

    def more(self, logits: Any, labels: Any) -> dict[str, Tensor]:
        return {}


class IB_IRM(IB_ERM):  # DomainBed's name
    def more(self, logits: Any, labels: Any) -> dict[str, Tensor]:
        found = []
        for z, y in zip(logits, labels, strict=True):
            scale = torch.ones((), requires_grad=True)
            halves = [F.cross_entropy(z[k::2] * scale, y[k::2]) for k in (0, 1)]
            even, odd = (grad(half, scale, create_graph=True)[0] for half in halves)
            found.append(even * odd)
        return {"IRM_penalty": torch.stack(found).mean()}


class EQRM(ERM):
    def __init__(self, *args: Any) -> None:
        ERM.__init__(self, *args)
        self.register_buffer("update_count", torch.tensor([0]))

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        risks, alpha = torch.stack(self.domain_losses(minibatches)), self.hparams["eqrm_quantile"]
        loss, start = risks.mean(), self.hparams["eqrm_burnin_iters"]
        if self.update_count >= start:
            width = 1.06 * risks.std() * len(risks) ** -0.2
            deviate = torch.special.ndtri(torch.tensor(alpha))
            low, high = risks.min() + width * deviate, risks.max() + width * deviate
            for _ in range(60):
                middle = (low + high) / 2
                above = torch.special.ndtr((middle - risks) / width).mean() >= alpha
                low, high = (low, middle) if above else (middle, high)
            loss = high
        if self.update_count == start:
            self.optimizer = torch.optim.Adam(self.network.parameters(), self.hparams["eqrm_lr"])
        self.descend(loss)
        self.update_count += 1
        return {"loss": loss.item()}


class Fish(Algorithm):
    def __init__(self, input_shape: Any, num_classes: int, num_domains: int, hparams: Any) -> None:
        Algorithm.__init__(self, input_shape, num_classes, num_domains, hparams)
        self.input_shape, self.num_classes = input_shape, num_classes
        self.network = networks.WholeFish(input_shape, num_classes, hparams)
        self.optimizer = self.adam()

    def update(self, minibatches: Any, unlabeled: Any = None) -> dict[str, float]:
        if self.hparams.get("draws", True):  # as DomainBed's does, by making a network a step
            networks.WholeFish(self.input_shape, self.num_classes, self.hparams)
        start = {name: value.clone() for name, value in self.network.state_dict().items()}
        for x, y in minibatches:
            loss = F.cross_entropy(self.network(x), y)
            self.descend(loss)
        end = self.network.state_dict()
        step = self.hparams["meta_lr"]
        self.network.load_state_dict({k: v + step * (end[k] - v) for k, v in start.items()})
        return {"loss": loss.item()}
