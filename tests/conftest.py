"""What every test relies on: a fixed seed, poisoned scratch memory, data where there is some."""

import gc
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import Variable

sys.path.append(str(Path(__file__).parent))  # tests are no package (import-mode=importlib)

import on_device
from selection import LEFT_OUT, mark
from torchvision_ops import fit_torchvision

on_device.begin()
if not torch.cuda.is_available():
    # Triton reads this once, at its first import: kernels then run on CPU tensors, interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Deterministic mode also fills torch.empty with NaN: an op that forgets to write an element of
    # its output is found.
    torch.use_deterministic_algorithms(True)


_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:  # tests share the cores: so do their threads, and those of processes they start
    torch.set_num_threads(max(1, torch.get_num_threads() // _WORKERS))
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))

fit_torchvision()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """As many workers as cores that this process may use, and no more than memory is there for: a
    test takes up to 2 GB."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(cores, memory // (2 << 30), 16))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def fastdg_data() -> Path:
    """The folder of data sets that FASTDG_DATA names; the test is skipped without one."""
    folder = os.environ.get("FASTDG_DATA")
    if folder is None:
        pytest.skip("FASTDG_DATA is not set: no data sets to test with")
    if not Path(folder).is_dir():
        pytest.skip(f"FASTDG_DATA={folder} is not a folder: no data sets to test with")
    return Path(folder)


@pytest.fixture(scope="session")
def small_clip() -> Callable[[Path, int], tuple[Any, Any]]:
    """Makes a small CLIP of transformers for images of a size, and its tokenizer, and saves them in
    a folder."""

    def make(folder: Path, image_size: int) -> tuple[Any, Any]:
        transformers = pytest.importorskip(
            "transformers", reason="transformers is not installed: pip install 'fastdg[text]'"
        )
        folder.mkdir(exist_ok=True)
        ends = ["<|startoftext|>", "<|endoftext|>"]
        pieces = [chr(k) for k in range(33, 127)]
        words = [*pieces, *(piece + "</w>" for piece in pieces), *ends]
        (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
        small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
        small |= {"num_attention_heads": 2, "projection_dim": 12}
        torch.manual_seed(0)
        config = transformers.CLIPConfig(
            text_config={
                **small,
                "vocab_size": len(words),
                "bos_token_id": len(words) - 2,
                "eos_token_id": len(words) - 1,
                "max_position_embeddings": 77,
            },
            vision_config={**small, "image_size": image_size, "patch_size": 4},
            projection_dim=12,
        )
        model = transformers.CLIPModel(config)
        for part in (model, tokenizer):
            part.save_pretrained(folder)
        return model, tokenizer

    return make


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items)


@pytest.fixture(scope="module", autouse=True)
def _older() -> None:
    """What outlives a file's tests is nothing that a later `gc.collect()` has to look at: of torch,
    of what it compiled and of thousands of tests that takes seconds, and many tests call it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def collected() -> dict[str, bool]:
    """The tests there are, by their names under tests/, and whether a run takes them by default."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    more = ["-p", "selection", "-s"]
    listing = subprocess.run([*command, *more], cwd=here, capture_output=True, text=True)
    assert listing.returncode == 0, listing.stdout + listing.stderr
    lines = [line for line in listing.stdout.splitlines() if "::" in line]
    names = {line.removeprefix(LEFT_OUT): not line.startswith(LEFT_OUT) for line in lines}
    return {name.removeprefix("tests/"): by_default for name, by_default in names.items()}


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if on_device.DEVICE != "cpu" and (reason := on_device.about_the_cpu(item)):
        pytest.skip(f"about the CPU: {reason}")
    on_device.enter(item.path)


@pytest.hookimpl(tryfirst=True)  # before the file is imported
def pytest_collectstart(collector: pytest.Collector) -> None:
    if isinstance(collector, pytest.Module):
        on_device.enter(collector.path)


class _Nested(torch.autograd.Function):
    """Runs something in its backward, ``depth`` backwards further in."""

    @staticmethod
    def forward(x: torch.Tensor, run: Callable[[], None], depth: int) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, ctx.run, ctx.depth = inputs

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        _nested(ctx.run, ctx.depth)
        return grad, None, None


def _nested(run: Callable[[], None], depth: int) -> None:
    if depth == 0:
        return run()
    with torch.enable_grad():
        y = _Nested.apply(torch.zeros((), requires_grad=True), run, depth - 1)
    Variable._execution_engine.run_backward((y,), (torch.ones(()),), False, False, (), True, True)
    return None


DEEPEST = 60  # of backwards within one another: the engine gives a deeper one to another thread


@pytest.fixture
def engine_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes and hooks of every backward run in a thread of autograd's, as those of an accelerator.

    Such a thread has what the engine carries over to it, and nothing else of the caller's
    thread-local state and context.
    """
    caller = threading.get_ident()

    def elsewhere(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            if (
                threading.get_ident() != caller
                or torch.compiler.is_compiling()
                or torch._C._are_functorch_transforms_active()
                or torch._C._len_torch_dispatch_stack() > 0
            ):
                return function(*args, **more)
            results: list[Any] = []
            enabled = torch.is_grad_enabled()

            def there() -> None:
                with torch.set_grad_enabled(enabled):
                    results.append(function(*args, **more))

            _nested(there, DEEPEST + 1)
            return results[0]

        return run

    monkeypatch.setattr(torch.autograd, "grad", elsewhere(torch.autograd.grad))
    monkeypatch.setattr(torch.autograd, "backward", elsewhere(torch.autograd.backward))
