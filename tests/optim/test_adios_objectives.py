"""The objectives of ADIOS: their pairs, their slow copy, their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adioses import KINDS, B, N, close, encoder, made, objective, views
from torch import Tensor, nn

import fastdg


@pytest.mark.parametrize("kind", KINDS)
def test_objectives_compare_two_views(kind: str) -> None:
    aim = objective(kind).double()
    x, view = views(0)
    assert aim(x, view).shape == ()
    assert float(aim(x, view).detach()) > float(aim(x, x).detach())
    close(aim(x, view), aim(view, x))
    assert aim.network.training


@pytest.mark.parametrize("single", [False, True])
def test_both_views_are_masked_by_masks_of_their_own(single: bool) -> None:
    predictor = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    aim = fastdg.SimSiam(encoder(), predictor, both_views=True).double()
    adios = made(objective=aim, single=single)
    x, view = views(0)
    seen: dict[str, list[Tensor]] = {"network": [], "masker": []}
    for name, module in (("network", aim.network), ("masker", adios.masker)):
        module.register_forward_pre_hook(lambda m, args, name=name: seen[name].append(args[0]))
    masks = [adios.masker.layers(images).softmax(1) for images in (x, view)]
    found = adios.step(x, view)
    assert len(seen["network"]) == 2 * (2 + 2 * (1 if single else N))
    for got, images in zip(seen["masker"], (x, view), strict=True):
        assert torch.equal(got, images)
    close(found["areas"], torch.cat([m.mean((0, 2, 3)) for m in masks]))
    if not single:
        for got, images, m in zip(seen["network"][2:4], (x, view), masks, strict=True):
            close(got, images * (1 - m[:, [0]]))


@pytest.mark.parametrize("flags", [(), ("symmetry_mask",), ("no_mask",), ("both_mask",)])
def test_pairs_of_two_masked_views(flags: tuple[str, ...]) -> None:
    switches = {name: name in flags for name in ("symmetry_mask", "no_mask", "both_mask")}
    aim = fastdg.SimSiam(encoder(), nn.Linear(5, 5), both_views=True, **switches).double()
    seeded = torch.Generator().manual_seed(0)
    p1, z1, p2, z2, q1, y1, q2, y2 = torch.randn(8, B, 5, generator=seeded, dtype=torch.float64)
    pairs = [(q1, z2), (q2, z1)]  # q, y: of masked views
    pairs += [(p2, y1), (p1, y2)] * ("symmetry_mask" in flags)
    pairs += [(p1, z2), (p2, z1)] * ("no_mask" in flags)
    pairs += [(q1, y2), (q2, y1)] * ("both_mask" in flags)
    expected = -torch.stack([F.cosine_similarity(p, z).mean() for p, z in pairs]).mean()
    close(aim.compare([(p1, z1), (p2, z2)], [(q1, y1), (q2, y2)]), expected)
    adios = made(objective=aim)
    assert adios.step(*views(0))["loss"].isfinite()
    assert all(p.grad is not None and p.grad.any() for p in aim.parameters())


def test_the_target_slows_down_on_a_cosine() -> None:
    aim = fastdg.BYOL(encoder(), nn.Linear(5, 5), momentum=0.6, total_steps=3).double()
    adios = made(objective=aim)
    for rate in (0.6, 0.7, 0.9, 1.0, 1.0):  # 1 - 0.4 * (cos(pi k / 3) + 1) / 2
        slow = [p.clone() for p in aim.target.parameters()]
        adios.step(*views(0))
        for p, old, new in zip(
            aim.target.parameters(), slow, aim.network.parameters(), strict=True
        ):
            close(p, rate * old + (1 - rate) * new)


@pytest.mark.parametrize("make", [fastdg.BYOL, fastdg.SimSiam])
def test_objectives_name_what_they_lack(make: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"^network: .*got int"):
        make(3, nn.Linear(5, 5))
    with pytest.raises(TypeError, match=r"^predictor: .*got None"):
        make(nn.Linear(5, 5), None)
    with pytest.raises(ValueError, match=r"^temperature: "):
        fastdg.SimCLR(nn.Linear(5, 5), temperature=0.0)
    with pytest.raises(ValueError, match=r"^total_steps: .*got 0"):
        fastdg.BYOL(nn.Linear(5, 5), nn.Linear(5, 5), total_steps=0)
    with pytest.raises(ValueError, match=r"^no_mask: "):
        fastdg.SimSiam(nn.Linear(5, 5), nn.Linear(5, 5), no_mask=False)
    with pytest.raises(ValueError, match=r"^both_views: .*got 2"):
        fastdg.SimSiam(nn.Linear(5, 5), nn.Linear(5, 5), both_views=2)  # type: ignore[arg-type]
