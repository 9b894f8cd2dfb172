"""A heat map of the cosines between the domains' gradients at one step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from .figure_style import COSINE, STYLE

READABLE = 12  # domains whose cosines are written into the map


def conflict_picture(cosine: Tensor, names: Sequence[str]) -> NDArray[np.uint8]:
    """Pixels ``[height, width, 3]`` of cosines ``[D, D]``, white where there is none (NaN)."""
    with rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        side = 1.2 + 0.5 * min(len(names), 2 * READABLE)
        figure = Figure(figsize=(side + 1.0, side), dpi=150, layout="constrained")
        axes = figure.subplots()
        axes.imshow(cosine.numpy(), **COSINE, interpolation="nearest")
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        for row, values in enumerate(cosine.tolist() if len(names) <= READABLE else []):
            for column, value in enumerate(values):
                if not math.isnan(value):
                    colour = "white" if abs(value) > 0.6 else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
        figure.colorbar(ScalarMappable(**COSINE), ax=axes, label="cosine", shrink=0.8)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
