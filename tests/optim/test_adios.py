"""ADIOS against one encode for each pair; who is touched when; resuming; and what it is for."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adioses import ALPHA, BETA, KINDS, TAU, B, Masker, N, close, encoder, made, objective, views
from on_device import DEVICE
from torch import Tensor, nn
from torch.optim import SGD, Adam

import fastdg

# -- the algorithm --


def nt_xent(one: Tensor, two: Tensor) -> Tensor:
    z = [*one, *two]
    total = 0.0
    for i in range(2 * B):
        others = [F.cosine_similarity(z[i], z[j], 0) / TAU for j in range(2 * B) if j != i]
        mine = F.cosine_similarity(z[i], z[(i + B) % (2 * B)], 0) / TAU
        total += torch.stack(others).logsumexp(0) - mine
    return total / (2 * B)  # type: ignore[return-value]


def naive_loss(kind: str, aim: Any, target: nn.Module | None, x: Tensor, masked: Tensor) -> Tensor:
    """Encodes both."""
    one, two = aim.network(x), aim.network(masked)
    if kind == "SimCLR":
        return nt_xent(one, two)
    to = (one, two) if target is None else (target(x), target(masked))
    cosines = F.cosine_similarity(aim.predictor(one), to[1].detach()).mean()
    back = F.cosine_similarity(aim.predictor(two), to[0].detach()).mean()
    return -(cosines + back) / 2 if target is None else (2 - 2 * cosines) + (2 - 2 * back)


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_one_encode_for_each_pair(kind: str) -> None:
    adios = made(kind)
    aim, masker = copy.deepcopy((adios.objective, adios.masker))
    target = copy.deepcopy(aim.network) if kind == "BYOL" else None
    first = SGD([p for p in aim.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    second = Adam(masker.parameters(), lr=0.05)
    for seed in range(3):
        x, view = views(seed)
        got = adios.step(x, view)

        masks = masker(view).detach()
        losses = [naive_loss(kind, aim, target, x, view * (1 - masks[:, [k]])) for k in range(N)]
        first.zero_grad()
        sum(losses).backward()
        first.step()
        close(got["loss"], sum(losses) / N)

        masks = masker(view)
        areas = torch.stack([torch.stack([masks[b, k].mean() for k in range(N)]) for b in range(B)])
        losses = [naive_loss(kind, aim, target, x, view * (1 - masks[:, [k]])) for k in range(N)]
        gain, penalty = 0.0, 0.0
        for k in range(N):
            each = sum(1 / (torch.sin(torch.pi * areas[b, k]) + 1e-10) for b in range(B)) / B
            gain, penalty = gain + losses[k] - ALPHA * each, penalty + each
        entropy = sum(-(p * p.log()).sum() for p in (areas[b].softmax(0) for b in range(B)))
        second.zero_grad()
        (-(gain - BETA * entropy)).backward()
        second.step()
        if target is not None:
            for slow, fast in zip(target.parameters(), aim.network.parameters(), strict=True):
                slow.data = 0.9 * slow.data + 0.1 * fast.data
        close(got["masker_loss"], sum(losses) / N)
        close(got["penalty"], penalty)
        close(got["entropy"], entropy)
        close(got["areas"], areas.mean(0))
    for mine, other in ((adios.objective.network, aim.network), (adios.masker, masker)):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            close(p, q)


def test_one_random_mask_of_each_image() -> None:
    """ADIOS-s draws anew in each of the two steps; its penalty covers all masks."""
    generator = torch.Generator().manual_seed(3)
    adios = made(single=True, generator=generator)
    again = torch.Generator().manual_seed(3)
    chosen, drawn = (torch.randint(N, (B,), generator=again) for _ in range(2))
    assert len(chosen.unique()) > 1 and not torch.equal(chosen, drawn)
    aim, masker = copy.deepcopy((adios.objective, adios.masker))
    first = SGD(aim.parameters(), lr=0.1, momentum=0.9)
    x, view = views(0)
    got = adios.step(x, view)

    masks = masker(view).detach()
    own, other = (
        torch.stack([masks[b, k] for b, k in enumerate(ks)]).unsqueeze(1) for ks in (chosen, drawn)
    )
    loss = naive_loss("SimCLR", aim, None, x, view * (1 - own))
    loss.backward()
    first.step()
    close(got["loss"], loss)
    close(got["masker_loss"], naive_loss("SimCLR", aim, None, x, view * (1 - other)))
    close(got["penalty"], (1 / ((torch.pi * masks.mean((2, 3))).sin() + 1e-10)).mean(0).sum())
    for p, q in zip(adios.objective.parameters(), aim.parameters(), strict=True):
        close(p, q)


def test_the_masker_ascends() -> None:
    """One step of it along its gradient, and the loss on the same images is higher."""
    adios = made(penalty=0.0, entropy=0.0)
    adios.encoder_optimizer = SGD(adios.objective.parameters(), lr=0.0)
    adios.masker_optimizer = SGD(adios.masker.parameters(), lr=1e-2)
    x, view = views(0)
    seen = [float(adios.step(x, view)["loss"]) for _ in range(5)]
    assert seen == sorted(seen) and seen[-1] > seen[0]


@pytest.mark.parametrize(("weight", "sign"), [(50.0, -1), (0.0, 1)])
def test_the_entropy_weight_makes_masks_differ_in_size(weight: float, sign: int) -> None:
    adios = made(penalty=0.0, entropy=weight)
    adios.encoder_optimizer = SGD(adios.objective.parameters(), lr=0.0)
    x, view = views(0)
    seen = [float(adios.step(x, view)["entropy"]) for _ in range(8)]
    if weight:
        assert sign * (seen[-1] - seen[0]) > 0


def test_full_and_empty_masks_cost_the_same() -> None:
    """The sine of pi is below zero in floating point, and would make a full mask a gain."""
    adios = made(penalty=1.0, entropy=0.0)
    adios.masker.layers[2].weight.data.zero_()
    adios.masker.layers[2].bias.data = torch.tensor([60.0, 0, 0]).double()
    got = adios.step(*views(0))
    assert float(got["areas"][0]) == 1 and float(got["penalty"]) > 2.9e10


# -- how often, and who is touched --


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_image_is_encoded_once(kind: str, single: bool) -> None:
    adios = made(kind, single=single)
    calls = {"network": 0, "masker": 0}

    def count(name: str) -> Callable[..., None]:
        def hook(*args: Any) -> None:
            calls[name] += 1

        return hook

    adios.objective.network.register_forward_hook(count("network"))
    adios.masker.register_forward_hook(count("masker"))
    adios.step(*views(0))
    assert calls == {"network": 2 * (1 + (1 if single else N)), "masker": 1}


def test_running_statistics_can_be_made_of_whole_images() -> None:
    """A whole image is one of N + 1 in a step: 16 % of the statistics with 4 masks."""

    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, 4, 1, 1))

        def forward(self, images: Tensor) -> Tensor:
            return (self.weight + images[:, :1] * 0).softmax(1)

    masker = Four()
    aim = fastdg.SimCLR(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(98, 5)))
    first, second = SGD(aim.parameters(), lr=0.1), SGD(masker.parameters(), lr=0.1)
    adios = fastdg.ADIOS(first, second, masker, objective=aim)
    images = torch.ones(B, 2, 7, 7) + torch.arange(B).view(B, 1, 1, 1)
    for _ in range(30):
        adios.step(images, 0 * images)
    mean = aim.network[0].running_mean
    torch.testing.assert_close(mean / images.mean(), torch.full((2,), 0.1602), atol=1e-3, rtol=0)
    torch.optim.swa_utils.update_bn([images], aim.network)
    torch.testing.assert_close(aim.network[0].running_mean, images.mean((0, 2, 3)))


def everything(module: nn.Module) -> list[Any]:
    tensors = [x.detach().clone() for x in module.state_dict().values()]
    flags = [p.requires_grad for p in module.parameters()]
    grads = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    modes = [m.training for m in module.modules()]
    return [*tensors, flags, *grads, modes]


def same(one: list[Any], two: list[Any]) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_leaves_the_other_network_alone(kind: str) -> None:
    """With batch norm, whose running statistics are of the encoder's own step."""
    adios = made(kind, norm=True)
    adios.step(*views(1))
    before = everything(adios.masker)
    at: dict[str, list[Any]] = {}

    def encoded(*args: Any) -> None:
        assert same(before, everything(adios.masker))
        at.update(encoder=everything(adios.objective))

    def masked() -> None:
        assert same(at["encoder"], everything(adios.objective))
        assert not same(before, everything(adios.masker))
        follow()

    adios.encoder_optimizer.register_step_post_hook(encoded)
    follow, adios.objective.follow = adios.objective.follow, masked
    adios.step(*views(0))
    if kind != "BYOL":  # whose target has moved since
        assert same(at["encoder"], everything(adios.objective))


def test_the_encoder_is_as_it_was_after_an_error() -> None:
    adios = made(norm=True)
    aim, calls = adios.objective, []
    loss = aim.loss

    def fails(*args: Any) -> Tensor:
        calls.append(None)
        if len(calls) > N + 1:
            raise KeyError("in the masker's step")
        return loss(*args)

    aim.loss = fails  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        adios.step(*views(0))
    assert all(p.requires_grad for p in aim.parameters())
    assert aim.network[1].num_batches_tracked == 0
    aim.loss = loss  # type: ignore[method-assign]
    adios.step(*views(0))


def test_under_autocast() -> None:
    aim, masker = fastdg.SimCLR(encoder()), Masker()
    adios = fastdg.ADIOS(Adam(aim.parameters()), Adam(masker.parameters()), masker, objective=aim)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = adios.step(*views(0).float())
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in got.values())


# -- optimizers and state --


def test_schedulers_move_both() -> None:
    adios = made()
    first = torch.optim.lr_scheduler.StepLR(adios.encoder_optimizer, 1, 0.1)
    second = torch.optim.lr_scheduler.CosineAnnealingLR(adios.masker_optimizer, 4)
    for seed in range(2):
        adios.step(*views(seed))
        first.step()
        second.step()
    assert adios.encoder_optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    assert adios.masker_optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit(kind: str, single: bool) -> None:
    def fresh(seed: int) -> fastdg.ADIOS:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed) if single else None
        aim = objective(kind, norm=True, total_steps=4).double()
        return made(objective=aim, single=single, generator=generator)

    one = fresh(0)
    for seed in range(2):
        one.step(*views(seed))
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = fresh(9)
    two.load_state_dict(torch.load(file, weights_only=True))
    assert two.steps == 2
    for seed in range(2, 5):
        found, expected = two.step(*views(seed)), one.step(*views(seed))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert same(everything(one.objective), everything(two.objective))
    assert same(everything(one.masker), everything(two.masker))


def test_states_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"^state_dict: .*ADIOS"):
        made().load_state_dict({"masker": {}})
    drawing = made(single=True, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"^state_dict: it has one .*generator"):
        made(single=True).load_state_dict(drawing.state_dict())
    with pytest.raises(ValueError, match=r"^state_dict: it has none .*generator"):
        drawing.load_state_dict(made().state_dict())


def test_what_it_has_trained_is_an_oracle() -> None:
    """Pre-train a backbone, and start from it with MIRO."""
    adios = made(norm=True)
    for seed in range(2):
        adios.step(*views(seed))
    model = copy.deepcopy(adios.objective.network).float()
    oracle = copy.deepcopy(model)
    base = Adam(model.parameters(), lr=1e-3)
    opt = fastdg.MIRO(base, model, oracle=oracle, layers=["0", "2"])
    model[1].eval()  # its batch norm is frozen
    for seed in range(2):
        x = views(seed)[0].float()
        losses = F.cross_entropy(model(x), torch.arange(B) % 5, reduction="none")
        opt.zero_grad()
        opt.backward(losses, torch.arange(B) % 2)
        opt.step()
    assert opt.steps == 2 and opt.statistics["miro"].isfinite()
