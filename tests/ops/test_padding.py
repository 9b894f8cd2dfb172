"""Windows with padding: the ops of an input without its zeros."""

from __future__ import annotations

import pytest
import torch
from cases import arguments
from torch import Tensor, nn

import fastdg
from fastdg import ops
from fastdg.ops import window as windows
from fastdg.ops.dispatch.registry import OPS

PADDED = [name for name in arguments("cpu", False) if name.endswith("padded")]


@pytest.mark.parametrize("name", PADDED)
def test_values_are_those_of_the_padded_input(name: str) -> None:
    *args, window = arguments("cpu", False)[name]
    place = 2 if "backward" in name else 0
    whole = list(args)
    whole[place], inner = windows.fill(args[place], window)
    op = OPS[name.split(",")[0]]
    got, want = op(*args, window), op(*whole, list(inner))
    if "backward" in name:
        want = windows.crop(want[0], windows.padding(window)), want[1]
    torch.testing.assert_close(got, want)


def test_derivatives_end_at_the_input() -> None:
    a, delta, order, offsets, window = arguments("cpu", True)["outer_moments, padded"]
    for x, w in ((a, window), windows.fill(a, window)):
        mean, variance = ops.outer_moments(x, delta, order, offsets, w)
        grads = torch.autograd.grad((mean.sin() + variance).sum(), (a, delta))
        if w is window:
            expected = grads
    torch.testing.assert_close(grads, expected)


def test_errors() -> None:
    a, delta, order, offsets, window = arguments("cpu", False)["outer_domain, padded"]
    for wrong in ([*window[:-1], -1], window[:-1], [*window, 1]):
        with pytest.raises(ValueError, match=r"^window: "):
            ops.outer_domain(a, delta, order, offsets, wrong)


def test_windows_of_four_dimensions_are_refused() -> None:
    """As many numbers describe three with padding."""
    a, delta, window = torch.ones(2, 1, 2, 1, 1, 2), torch.ones(2, 1, 3), [2, 1, 1, 2, *[1] * 8]
    with pytest.raises(ValueError, match=r"^window: .*got 12 for 4 dimensions"):
        ops.outer_norms(a, delta, window)


CONVOLUTIONS = {
    "a square": (nn.Conv2d(2, 4, 3, padding=1), (2, 6, 5)),
    "strides": (nn.Conv2d(2, 4, (3, 2), (2, 1), padding=(1, 2), dilation=(1, 2)), (2, 7, 6)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 5, 5)),
    "a line": (nn.Conv1d(2, 3, 4, padding=3), (2, 8)),
    "a cube": (nn.Conv3d(2, 3, (1, 3, 2), padding=(0, 1, 1)), (2, 3, 4, 3)),
    "one place": (nn.Conv2d(2, 3, 1, padding=2), (2, 4, 4)),
    "many taps": (nn.Conv2d(2, 3, 7, padding=3), (2, 8, 8)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3, 2, padding=1), (2, 5, 5)),
    "transposed, more": (nn.ConvTranspose2d(2, 3, 3, 2, padding=1, output_padding=1), (2, 5, 5)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_as_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No padded copy is made where kernels mask the padding."""
    layer, shape = CONVOLUTIONS[name]
    x, domains = torch.randn(6, *shape), torch.arange(6) % 2

    def results() -> list[object]:
        losses = layer(x).sin().flatten(1).sum(1)
        moments = fastdg.domain_moments(losses, domains, params=layer)
        return [moments.mean, moments.variance, fastdg.domain_gram(losses, domains, params=layer)]

    expected, made = results(), []
    pad = windows.F.pad

    def padded(x: Tensor, sizes: list[int], **more: object) -> Tensor:
        made.append(sizes)
        return pad(x, sizes, **more)

    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(windows, "fill", lambda a, window: pad_window(a, window))
    monkeypatch.setattr(windows.F, "pad", padded)
    got = results()
    torch.testing.assert_close(got, expected)
    masked = name not in ("one place", "many taps", "transposed, more")
    assert bool(made) != masked


def pad_window(a: Tensor, window: list[int]) -> tuple[Tensor, list[int]]:
    """`windows.fill` by another function than the rule's, which is counted."""
    more = windows.padding(window)
    shape = *a.shape[:2], *windows.extent(a.shape[2:], window)
    whole = a.new_zeros(shape)
    windows.crop(whole, more or [0] * (a.dim() - 2)).copy_(a)
    return whole, window[: len(window) - len(more)]
