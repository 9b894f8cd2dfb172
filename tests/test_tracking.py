"""Statistics are read back from what TensorBoard and Weights & Biases have written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fastdg

NAMES = ["photo", "sketch", "art"]


def trained(wrap: Any = fastdg.PCGrad, domains: int = 3) -> Any:
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    opt = wrap(torch.optim.Adam(model.named_parameters()), num_domains=3)
    losses = F.cross_entropy(model(torch.randn(12, 5)), torch.arange(12) % 3, reduction="none")
    opt.backward(losses, torch.arange(12) % domains)
    opt.step()
    return opt


class Run:
    """What is called of a run of W&B."""

    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, Any], int | None]] = []

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((values, step))


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    opt = trained(domains=2)
    with SummaryWriter(tmp_path) as writer:
        fastdg.log(opt, writer, 7, domains=NAMES)
    events = EventAccumulator(str(tmp_path)).Reload()
    read = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert {(event.step, len(row)) for row in read.values() for event in row} == {(7, 1)}
    found = {tag: row[0].value for tag, row in read.items()}
    s = opt.statistics
    expected = {"loss": s["loss"], "conflicts": s["conflicts"]}
    for d, name in enumerate(NAMES[:2]):  # no sample was of the third
        expected[f"domain_loss/{name}"] = s["domain_loss"][d]
        expected[f"domain_count/{name}"] = s["domain_count"][d]
        expected[f"weights/{name}"] = s["weights"][d]
        expected[f"gradient_norm/{name}"] = s["gram"][d, d].sqrt()
    assert found == {
        f"fastdg/{name}": pytest.approx(value.item(), rel=1e-6) for name, value in expected.items()
    }
    (image,) = events.Images("fastdg/cosine")
    picture = Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB")
    assert image.step == 7 and min(picture.size) > 300
    assert len(picture.getcolors(1 << 20)) > 50  # it is drawn into


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An offline run, read back from its file."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.chdir(tmp_path)
    opt = trained()
    settings = wandb.Settings(silent=True, console="off", disable_git=True)
    with wandb.init(mode="offline", dir=tmp_path, settings=settings) as run:
        fastdg.log(opt, run, 3, domains=NAMES)
        fastdg.log(opt, run, 4)  # a step is in the summary when the next one begins
        assert run.step == 4
        assert run.summary["fastdg/loss"] == pytest.approx(opt.statistics["loss"].item())
        assert run.summary["fastdg/cosine"]["_type"] == "image-file"
    pictures = list(tmp_path.glob("wandb/latest-run/files/**/*.png"))
    assert len(pictures) == 2
    with Image.open(pictures[0]) as picture:
        assert min(picture.size) > 300


def test_one_number_for_each_parameter_in_use() -> None:
    model = torch.nn.Linear(2, 2)
    inner = fastdg.AgrSum(torch.optim.SGD(model.named_parameters()))
    for opt in inner, fastdg.SWAD(inner, model):
        run = Run()
        opt.backward(model(torch.randn(4, 2)).square().sum(1), torch.arange(4) % 2)
        fastdg.log(opt, run)
        ((values, step),) = run.logged
        assert step is None
        assert "fastdg/domain_loss/0" in values
        shares = [name for name in values if "by_parameter" in name]
        assert shares == [f"fastdg/agreeing_by_parameter/{name}" for name in ("weight", "bias")]


def test_statistics_of_adios_have_no_wrapper() -> None:
    run = Run()
    fastdg.log({"loss": torch.tensor(2.0)}, run, 1)
    assert run.logged == [({"fastdg/loss": 2.0}, 1)]


def test_what_it_refuses() -> None:
    opt = trained()
    with pytest.raises(TypeError, match=r"^opt: .*got Adam"):
        fastdg.log(opt.base, Run())
    with pytest.raises(TypeError, match=r"^writer: .*got str"):
        fastdg.log(opt, "runs")
    with pytest.raises(ValueError, match=r"^domains: "):
        fastdg.log(opt, Run(), domains=["photo"])


def test_nothing_before_the_first_backward() -> None:
    run = Run()
    fastdg.log(fastdg.PCGrad(torch.optim.SGD(torch.nn.Linear(2, 2).parameters())), run)
    assert run.logged == []
