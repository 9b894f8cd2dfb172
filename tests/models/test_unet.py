"""The masker: what its masks are, at any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdg


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (9, 13), (28, 21)])
@pytest.mark.parametrize("masks", [2, 4])
def test_masks_sum_to_one(masks: int, size: tuple[int, int]) -> None:
    net = fastdg.UNetMasker(masks, channels=1, width=8)
    found = net(torch.randn(3, 1, *size))
    assert found.shape == (3, masks, *size)
    assert (found >= 0).all() and found.std() > 1e-3
    torch.testing.assert_close(found.sum(1), torch.ones(3, *size))


def test_every_parameter_is_trained() -> None:
    net = fastdg.UNetMasker(3, width=4, depth=2)
    net(torch.randn(2, 3, 11, 10))[:, 0].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_an_image_is_masked_the_same_in_any_batch() -> None:
    net = fastdg.UNetMasker(3, width=8)
    x = torch.randn(4, 3, 16, 16)
    assert not list(net.buffers())
    for one in (net(x[:1]), net.eval()(x[:1])):
        torch.testing.assert_close(one, net(x)[:1])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"masks": 1}, "^masks: .*got 1"),
        ({"channels": 0}, "^channels: .*got 0"),
        ({"width": 2.5}, "^width: .*got 2.5"),
        ({"width": 6}, "^width: .*got 6"),
        ({"depth": 0}, "^depth: .*got 0"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastdg.UNetMasker(**{"masks": 3, **given})


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 7, 16), (3, 16, 16)])
def test_bad_images(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^images: "):
        fastdg.UNetMasker(3)(torch.zeros(shape))
