"""Where domain ids and small tensors go on their way to a device."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdg.domains import as_ids, of_tasks, partition, to_device_async

pytestmark = pytest.mark.cpu("copies from the CPU")


class Copies(TorchDispatchMode):
    """Whether each copy between devices lets the CPU go on before it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.unwaited: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.unwaited.append((kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("to", "unwaited"), [("cpu", False), ("meta", True)])
def test_the_cpu_waits_for_a_copy_that_it_reads(to: str, unwaited: bool) -> None:
    with FakeTensorMode(), Copies() as copies:
        drawn = torch.empty(3, device="cuda")
        there = to_device_async(drawn, torch.device(to))
    assert there.device.type == to and copies.unwaited == [unwaited]


def test_ids_made_of_integers_are_on_the_cpu() -> None:
    losses = torch.randn(3, requires_grad=True)
    with torch.device("meta"):  # of new tensors
        assert as_ids(1, 3).device.type == "cpu"
        part = partition(1, losses, num_domains=2)
        _, tasks = of_tasks([losses, losses.sum()], None)
    assert part.count.tolist() == [0, 3] and tasks.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("traced", [False, True])
def test_parts_go_to_the_losses_device_in_one_way(
    monkeypatch: pytest.MonkeyPatch, traced: bool
) -> None:
    """A traced graph pins no memory."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.numel()) or t)
    monkeypatch.setattr("fastdg.domains.tracing", lambda: traced)
    with Copies() as copies:
        part = partition(torch.tensor([1, 0, 1]), torch.empty(3, device="meta"), 2)
    assert part.order.device.type == part.count.device.type == "meta"
    assert pinned == ([] if traced else [3, 3, 3, 2]) and copies.unwaited == [True] * 4
