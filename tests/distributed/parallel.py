"""A training that runs on several ranks, or in one process on their batches put together."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

import fastdg
from fastdg.core.combine import exchanged

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, labels, domains
DOMAINS = 3


class Net(nn.Module):
    """Convolutions, norms and two linear layers."""

    def __init__(self, batch_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if batch_norm else nn.GroupNorm(2, 4)
        self.body = nn.Linear(4 * 9, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(torch.tanh(self.norm(self.conv(x))), 2)
        return self.head(F.dropout(torch.tanh(self.body(h.flatten(1))), self.dropout))


def even(gram: Tensor) -> Tensor:
    return gram.diagonal().softmax(0).to(gram.dtype)


def drawn(gram: Tensor) -> Tensor:
    """Weights from torch's own stream, which is another on each rank."""
    return torch.rand(len(gram)).to(gram)


def miro(base: Optimizer, model: Net) -> fastdg.MIRO:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(5)
        oracle = Net().to(model.head.weight.dtype)
    return fastdg.MIRO(base, model, oracle, layers=["conv", "body"])


def rise(base: Optimizer, model: Net) -> fastdg.RISE:
    anchors = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(2))
    return fastdg.RISE(base, model.body, anchors.mean(1), anchors)


def fishr(base: Optimizer, **more: Any) -> fastdg.Fishr:
    settings = {"penalty_weight": 5.0, "anneal_steps": 2, "num_domains": DOMAINS}
    return fastdg.Fishr(base, **{**settings, **more})


def ib_irm(base: Optimizer) -> fastdg.IBIRM:
    weights = {"penalty_weight": 2.0, "bottleneck_weight": 2.0}
    return fastdg.IBIRM(base, **weights, anneal_steps=1, bottleneck_anneal_steps=2)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


WRAPS: dict[str, Callable[[Optimizer, Net], Any]] = {
    "Fishr": lambda base, model: fishr(base),
    "Fishr(all)": lambda base, model: fishr(base, params="all", num_domains=None),
    "ERM": lambda base, model: fastdg.ERM(base),
    "AgrSum": lambda base, model: fastdg.AgrSum(base),
    "AgrRand": lambda base, model: fastdg.AgrRand(base, generator=seeded()),
    "AgrRand(global)": lambda base, model: fastdg.AgrRand(base),
    "ANDMask": lambda base, model: fastdg.ANDMask(base, threshold=0.5),
    "SANDMask": lambda base, model: fastdg.SANDMask(base, threshold=0.3),
    "PCGrad": lambda base, model: fastdg.PCGrad(base, generator=seeded()),
    "GramSurgery": lambda base, model: fastdg.GramSurgery(base, even),
    "CAGrad": lambda base, model: fastdg.CAGrad(base),
    "Fish": lambda base, model: fastdg.Fish(base, num_domains=DOMAINS, inner_product=True),
    "IGA": lambda base, model: fastdg.IGA(base, penalty_weight=0.5),
    "IRM": lambda base, model: fastdg.IRM(base, anneal_steps=2, penalty_weight=2.0),
    "VREx": lambda base, model: fastdg.VREx(base, anneal_steps=2),
    "GroupDRO": lambda base, model: fastdg.GroupDRO(base, eta=0.5),
    "EQRM": lambda base, model: fastdg.EQRM(base, anneal_steps=2),
    "RDM": lambda base, model: fastdg.RDM(base, penalty_weight=0.01, anneal_steps=2),
    "SD": lambda base, model: fastdg.SD(base, penalty_weight=0.5),
    "CORAL": lambda base, model: fastdg.CORAL(base),
    "MMD": lambda base, model: fastdg.MMD(base, penalty_weight=0.05),
    "CausIRL": lambda base, model: fastdg.CausIRL(base, generator=seeded(), num_domains=DOMAINS),
    "IBERM": lambda base, model: fastdg.IBERM(base, penalty_weight=2.0, anneal_steps=2),
    "IBIRM": lambda base, model: ib_irm(base),
    "SAM": lambda base, model: fastdg.SAM(base),
    "GAM": lambda base, model: fastdg.GAM(base),
    "DISAM": lambda base, model: fastdg.DISAM(base, adaptive=True),
    "MLDG": lambda base, model: MLDG(base, num_domains=DOMAINS, meta_test=1),
    "SAM(Fishr)": lambda base, model: fastdg.SAM(fishr(base)),
    "GSAM(AgrSum(MIRO))": lambda base, model: fastdg.GSAM(fastdg.AgrSum(miro(base, model))),
    "MIRO": miro,
    "RISE": rise,
    "Fishr(MIRO(RISE))": lambda base, model: fishr(miro(rise(base, model), model)),
    "AgrSum(MIRO)": lambda base, model: fastdg.AgrSum(miro(base, model)),
    "SWAD(Fishr)": lambda base, model: fastdg.SWAD(fishr(base), model, n_converge=1),
    "SMA(Fishr)": lambda base, model: fastdg.SMA(fishr(base), model, start=3),
    "SWAD": lambda base, model: fastdg.SWAD(base, model, n_converge=1),
    "SWAD(plain)": lambda base, model: fastdg.SWAD(base, model, n_converge=1),
}


class POGM(fastdg.POGM):
    """Takes every batch for one of the domain whose turn it is."""

    def backward(self, losses: Tensor, domains: Tensor, *more: Any, **inputs: Any) -> Tensor:
        return super().backward(losses, domains * 0 + self._domain, *more, **inputs)


class MLDG(fastdg.MLDG):
    """Takes every batch for one of the domain whose turn it is."""

    def backward(self, losses: Tensor, domains: Tensor, *more: Any, **inputs: Any) -> Tensor:
        return super().backward(losses, domains * 0 + [0, 2, 1, 2][self._made], *more, **inputs)


class PGrad(fastdg.PGrad):
    """Takes every batch for one of a single domain."""

    def backward(self, losses: Tensor, domains: Tensor, *more: Any, **inputs: Any) -> Tensor:
        return super().backward(losses, domains * 0, *more, **inputs)


# The other rules of the Gram matrix, which are the same on every rank
RULES: dict[str, Callable[[Optimizer, Net], Any]] = {
    "MGDA": lambda base, model: fastdg.MGDA(base),
    "UPGrad": lambda base, model: fastdg.UPGrad(base),
    "DualProj": lambda base, model: fastdg.DualProj(base),
    "IMTLG": lambda base, model: fastdg.IMTLG(base),
    "AlignedMTL": lambda base, model: fastdg.AlignedMTL(base),
    "ConFIG": lambda base, model: fastdg.ConFIG(base),
    "NashMTL": lambda base, model: fastdg.NashMTL(base, update_every=2, num_domains=DOMAINS),
    "FairGrad": lambda base, model: fastdg.FairGrad(base, alpha=2.0),
    "GradVac": lambda base, model: fastdg.GradVac(base, generator=seeded(), num_domains=DOMAINS),
    "GramSurgery(drawn)": lambda base, model: fastdg.GramSurgery(base, drawn),
    "GGAL": lambda base, model: fastdg.GGAL(base, gamma=0.1, generator=seeded()),
    "POGM": lambda base, model: POGM(base, num_domains=DOMAINS, model=model),
    "GENIE": lambda base, model: fastdg.GENIE(base, variance="history"),
    "GENIE(batch)": lambda base, model: fastdg.GENIE(base, variance="batch"),
    "GGA": lambda base, model: fastdg.GGA(base, start=0, candidates=4, size=0.05),
    "PGrad": lambda base, model: PGrad(base, num_domains=2, splits=2, model=model),
    "GradVac(global)": lambda base, model: fastdg.GradVac(base, num_domains=DOMAINS),
}
BASES: dict[str, Callable[[Any], Optimizer]] = {
    "momentum": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "adam": lambda params: Adam(params, lr=1e-2, eps=1e-3),
}


def inputs_of(wrap: str, scores: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Further inputs of `backward`; the scores stand for features."""
    features = wrap in ("CORAL", "CausIRL", "MMD", "IBERM", "IBIRM")
    return {
        **({"labels": labels} if "RISE" in wrap else {}),
        **({"features": scores} if features else {}),
        **({"logits": scores} if wrap in ("SD", "IBIRM") else {}),
    }


@dataclass(frozen=True)
class Run:
    """How to train.

    Attributes:
        wrap: one of `WRAPS`.
        split: ``"mixed"``: every rank has samples of all domains; ``"own"``: each a domain.
        engine: ``"ddp"``, with ``options``; ``"fsdp"``: FSDP2, each layer by itself; or
            ``"bare"``: the model as it is on every rank.
        scale: the factor of a GradScaler.
        overflow: the step in which the last rank's gradients are not finite.
        micro: each rank's batch comes in several parts, not in as many on all.
    """

    wrap: str
    split: str = "mixed"
    engine: str = "ddp"
    base: str = "momentum"
    dtype: torch.dtype = torch.float32
    micro: bool = False
    batch_norm: bool = False
    dropout: float = 0.0
    steps: int = 5
    counted: bool = False
    scale: float | None = None
    overflow: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def shares(run: Run, world: int) -> Iterator[list[Batch]]:
    """Every step's batches, those of each rank; the last ones are short, and not alike."""
    generator = torch.Generator().manual_seed(3)
    for step in range(run.steps):
        sizes = [2, 5, 3] if step == run.steps - 1 else [8, 8, 8]
        batch: list[Batch] = []
        for rank in range(world):
            n = sizes[rank]
            d = torch.randint(DOMAINS, (n,), generator=generator)
            if run.split == "own":
                d = torch.full((n,), rank)
            elif run.wrap == "Fish":
                d = torch.full((n,), step % DOMAINS)
            x = torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64)
            x = x + d.view(-1, 1, 1, 1) * torch.randn(2, 6, 6, generator=generator) / 2
            batch.append((x.to(run.dtype), torch.randint(3, (n,), generator=generator), d))
        yield batch


def joined(batches: list[Batch]) -> Batch:
    x, y, d = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return x, y, d


def parts(run: Run, batches: list[Batch], rank: int | None) -> list[Batch]:
    """What comes in one forward each: a rank's, or, in one process, everything."""
    if rank is None:
        return batches if run.batch_norm else [joined(batches)]
    batch = batches[rank]
    if not run.micro:
        return [batch]
    many = 2 if run.engine == "fsdp" else rank + 2  # each of its forwards is everyone's
    cuts = [x.tensor_split(many) for x in batch]
    return [part for part in zip(*cuts, strict=True) if len(part[0])]  # type: ignore[misc]


@dataclass
class Result:
    """What a rank has at the end, and what it has sent."""

    weights: dict[str, Tensor]
    statistics: list[dict[str, Tensor]]
    averaged: dict[str, Tensor] | None
    sent: list[dict[str, int]]


def forward(network: nn.Module, x: Tensor, y: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(network(x), y, reduction="none"), d


def train(run: Run, rank: int | None = None, world: int = 2) -> Result:
    """On one of ``world`` ranks, or in one process (None)."""
    torch.manual_seed(0)
    model = Net(run.batch_norm, run.dropout).to(run.dtype)
    network: nn.Module = model
    sent: dict[str, int] = {}
    if rank is not None and run.engine == "fsdp":
        for part in (model.conv, model.body, model):
            fully_shard(part)
    if rank is not None and run.engine == "ddp":
        network = DistributedDataParallel(model, **run.options)
        if run.counted:
            network.register_comm_hook(sent, counted)
    opt = {**WRAPS, **RULES}[run.wrap](BASES[run.base](model.parameters()), model)
    torch.manual_seed(7 * (rank or 0))  # whoever draws from torch's own stream has his own
    scaler = None
    if run.scale is not None:
        scaler = torch.amp.GradScaler("cpu", init_scale=run.scale)
    more: dict[str, Any] = {"scaler": scaler}
    seen, messages = [], []
    for step, batches in enumerate(shares(run, world)):
        sent.clear()
        with counting(sent):
            opt.zero_grad(set_to_none=step % 2 == 0)
            if step == run.overflow:
                batches[-1][0][-1] = torch.inf
            *earlier, last = parts(run, batches, rank)
            for point in range(getattr(opt, "points", 1)):
                if point:
                    opt.ascend()
                for x, y, d in earlier:
                    scores = network(x)
                    losses = F.cross_entropy(scores, y, reduction="none")
                    given = {**more, **inputs_of(run.wrap, scores, y)}
                    opt.backward(losses, d, final=False, **given)
                x, y, d = last
                scores = network(x)
                losses = F.cross_entropy(scores, y, reduction="none")
                if run.wrap == "SWAD":
                    whole = sum(len(y) for _, y, _ in batches)
                    loss = losses.sum() * (world if rank is not None else 1) / whole
                    (loss if scaler is None else scaler.scale(loss)).backward()
                elif run.wrap == "GGA":
                    opt.step(partial(forward, network, *last))
                else:
                    opt.backward(losses, d, **more, **inputs_of(run.wrap, scores, y))
            if run.wrap == "GGA":
                pass
            elif scaler is None:
                opt.step()
            else:
                scaler.step(opt)
                scaler.update()
        if run.wrap.startswith("SWAD") and step % 2:
            opt.evaluate(1 / (step + 1) + (0 if rank is None else (rank - (world - 1) / 2) / 9))
        seen.append({k: v.clone() for k, v in opt.statistics.items()})
        messages.append(dict(sent))
    weights, averaged = weights_of(model), None
    if run.wrap.startswith(("SMA", "SWAD")):
        with opt.applied():
            averaged = weights_of(model)
    return Result(weights, seen, averaged, messages)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All of each, however the ranks share them."""
    tensors = dict(model.named_parameters())
    whole = {k: p.full_tensor() if hasattr(p, "full_tensor") else p for k, p in tensors.items()}
    return {k: p.detach().clone() for k, p in whole.items()}


def counted(
    sent: dict[str, int], bucket: distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """The hook of a DistributedDataParallel that counts what goes through it."""
    sent["reducer"] = sent.get("reducer", 0) + 2 * bucket.buffer().numel()
    world = distributed.get_world_size()
    work = distributed.group.WORLD.allreduce([bucket.buffer().div_(world)])
    return work.get_future().then(lambda future: future.value()[0])


@contextmanager
def counting(sent: dict[str, int]) -> Iterator[None]:
    """How many numbers a rank gives to each collective; an all-reduce sends every one twice."""
    originals = {name: getattr(distributed, name) for name in ("all_reduce", "batch_isend_irecv")}

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = "counts" if tensor.dtype == torch.int64 else "all_reduce"
        sent[key] = sent.get(key, 0) + 2 * tensor.numel()
        return originals["all_reduce"](tensor, *args, **kwargs)

    def batch_isend_irecv(messages: list[distributed.P2POp]) -> Any:
        numbers = sum(m.tensor.numel() for m in messages if m.op is distributed.isend)
        sent["to_one"] = sent.get("to_one", 0) + numbers
        return originals["batch_isend_irecv"](messages)

    distributed.all_reduce = all_reduce
    distributed.batch_isend_irecv = batch_isend_irecv
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


def validated(wrap: str, rank: int | None, world: int = 2) -> list[Tensor]:
    """What a model gives outside of training, under FSDP2 or in one process: it runs before there
    is a wrapper, and then after each step."""
    torch.manual_seed(0)
    model = Net()
    if rank is not None:
        for part in (model.conv, model.body, model):
            fully_shard(part)
    base = SGD(model.parameters(), lr=0.5)
    x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    found: list[Tensor] = []

    @torch.no_grad()
    def validate() -> None:
        found.append(model(x).clone())

    validate()
    opt = WRAPS[wrap](base, model)
    for step, batches in enumerate(shares(Run(wrap), world)):
        inputs, labels, domains = joined(batches) if rank is None else batches[rank]
        opt.zero_grad()
        opt.backward(F.cross_entropy(model(inputs), labels, reduction="none"), domains)
        opt.step()
        validate()
        if wrap.startswith("SWAD"):
            opt.evaluate(1 / (step + 1))
            with opt.applied():
                validate()
            validate()
    if wrap.startswith("SWAD"):
        opt.apply()
        validate()
    return found


def errors(function: Callable[[], Any]) -> str:
    """What it raises, in short."""
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def setup(wrap: str = "VREx", **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net()
    network = DistributedDataParallel(model, **options)
    return network, WRAPS[wrap](SGD(model.parameters(), lr=0.1), model)


def losses_of(network: nn.Module, samples: int = 6) -> Tensor:
    x = torch.randn(samples, 2, 6, 6)
    return F.cross_entropy(network(x), torch.arange(samples) % 3, reduction="none")


def one_fails(rank: int, world: int) -> str:
    network, opt = setup()
    losses, domains = losses_of(network), torch.arange(6) % 3
    last = rank == world - 1
    text = errors(lambda: opt.backward(losses.mean() if last else losses, domains))
    opt.zero_grad()
    opt.backward(losses_of(network), domains)
    opt.step()
    return text


def breaks_off(wrap: str, who: str, rank: int, world: int) -> tuple[str, list[Tensor]]:
    """The error of a backward that breaks off below layers whose gradients are on their way, and
    the weights after the step that follows."""

    def raises(grad: Tensor) -> None:
        raise ValueError("a hook does not like this gradient")

    kept, exchanged.BUCKET = exchanged.BUCKET, 8  # nearly every parameter goes alone
    try:
        network, opt = setup(wrap)
        model: Any = network.module
        domains, text = torch.arange(6) % (2 + min(rank, 1)), ""
        if who != "none":
            grad_hook = raises if who == "all" or rank == world - 1 else lambda grad: None
            handle = model.norm.register_forward_hook(
                lambda module, args, out: out.register_hook(grad_hook) and None
            )
            losses = losses_of(network)
            handle.remove()
            text = errors(lambda: opt.backward(losses, domains))
            assert all(p.grad is None for p in model.parameters())
        torch.manual_seed(rank)
        opt.backward(losses_of(network), domains)
        opt.step()
        return text, [p.detach().clone() for p in model.parameters()]
    finally:
        exchanged.BUCKET = kept


def differ(case: str, rank: int, world: int) -> str:
    """The error of a training in which the ranks do not do the same."""
    wrap = {"used": "IGA", "domains": "Fish"}.get(case, "VREx")
    network, opt = setup(wrap, **({"static_graph": True} if case == "static" else {}))
    model: Any = network.module
    domains = torch.arange(6) % 3
    if case == "domains":
        domains = torch.full((6,), rank)
    if case == "weights" and rank:
        with torch.no_grad():
            model.head.bias.add_(1)
    if case == "steps" and rank:
        opt.param_groups[0]["vrex_steps"] = 7
    network = model if case == "used" else network
    if case == "used" and rank:
        model.body.bias.requires_grad_(False)
    return errors(lambda: opt.backward(losses_of(network), domains))


def no_loss(rank: int, world: int) -> str:
    """The error of an evaluation to which one rank brings no number."""
    model = Net()
    opt = fastdg.SWAD(SGD(model.parameters(), lr=0.1), model)
    return errors(lambda: opt.evaluate(float("nan") if rank else 1.0))


def comes_late(rank: int, world: int) -> str:
    """The error where the others do not come to a step in time."""
    network, opt = setup()
    losses = losses_of(network)
    if rank:
        time.sleep(6)
        return ""
    return errors(lambda: opt.backward(losses, torch.arange(6) % 3))


def dies(rank: int, world: int) -> str:
    """The error where another one is killed."""
    network, opt = setup()
    losses = losses_of(network)
    if rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return errors(lambda: opt.backward(losses, torch.arange(6) % 3))
