"""Write an optimizer's statistics to TensorBoard or Weights & Biases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from .core.nesting import chain

PREFIX = "fastdg"


def log(
    opt: Any, writer: Any, step: int | None = None, *, domains: Sequence[str] | None = None
) -> None:
    """Write ``opt.statistics`` into TensorBoard or Weights & Biases.

    Numbers are scalars: ``fastdg/loss``. A value of each domain is a scalar:
    ``fastdg/domain_loss/indoor``, without domains that have no samples in the batch; so is a value
    of each parameter, ``fastdg/agreeing_by_parameter/head.weight``, without unused ones. For
    `PCGrad` and `GramSurgery` there is a picture ``fastdg/cosine`` of the cosines between the
    domains' gradients (it needs matplotlib), and of ``gram`` the gradients' norms,
    ``fastdg/gradient_norm/indoor``. Nothing is written before the first final backward.

    Statistics are copied to the CPU here alone: a call every hundredth step waits for the device
    every hundredth step.

    Args:
        opt: a wrapper, or statistics themselves, as `ADIOS.step` returns them.
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or a run of ``wandb.init()``.
        step: the x-axis of the plots; a W&B run counts by itself if it is left out.
        domains: names of the domains, in the order of their ids; default: the ids.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> fastdg.log(opt, SummaryWriter(), step, domains=["photo", "sketch"])
        >>> fastdg.log(opt, wandb.init(project="domains"), step)
    """
    given = opt if isinstance(opt, Mapping) else getattr(opt, "statistics", None)
    if not isinstance(given, Mapping):
        raise TypeError(
            f"opt: expected a fastdg wrapper or its statistics, got {type(opt).__name__}"
            + (", pass the wrapper that it holds" if hasattr(opt, "optimizer") else "")
        )
    statistics = {name: value.detach().cpu() for name, value in given.items()}
    numbers = {
        f"{PREFIX}/{name}": value
        for name, value in _scalars(statistics, domains, _parameter_names(opt))
    }
    pictures = {}
    if "cosine" in statistics:
        from .conflict_picture import conflict_picture

        cosine = statistics["cosine"]
        pictures[f"{PREFIX}/cosine"] = conflict_picture(cosine, _names(domains, len(cosine)))
    if hasattr(writer, "add_scalar"):
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        for name, picture in pictures.items():
            writer.add_image(name, picture, step, dataformats="HWC")
    elif callable(getattr(writer, "log", None)):
        if pictures:
            import wandb
        if numbers:
            shown = {name: wandb.Image(picture) for name, picture in pictures.items()}
            writer.log({**numbers, **shown}, step=step)
    else:
        raise TypeError(
            "writer: expected a torch.utils.tensorboard.SummaryWriter or a run of wandb.init(), "
            f"got {type(writer).__name__}"
        )


def _scalars(
    statistics: Mapping[str, Tensor], domains: Sequence[str] | None, parameters: Sequence[str]
) -> Iterator[tuple[str, float]]:
    count = statistics.get("domain_count")
    for name, value in statistics.items():
        if name == "gram":
            name, value = "gradient_norm", value.diagonal().sqrt()
        if value.dim() == 0:
            yield name, value.item()
        elif value.dim() == 1:
            of_parameters = name.endswith("_by_parameter")
            names = parameters if of_parameters else _names(domains, len(value))
            used = ~value.isnan() if of_parameters or count is None else count > 0
            for key, number, there in zip(names, value.tolist(), used.tolist(), strict=True):
                if there:
                    yield f"{name}/{key}", number


def _names(domains: Sequence[str] | None, count: int) -> list[str]:
    if domains is None:
        return [str(d) for d in range(count)]
    if len(domains) < count:
        raise ValueError(
            f"domains: expected a name for each of {count} domains, got {list(domains)}"
        )
    return list(domains[:count])


def _parameter_names(opt: Any) -> list[str]:
    links = [] if isinstance(opt, Mapping) else chain(opt)
    return next((link.parameter_names for link in links if hasattr(link, "parameter_names")), [])
