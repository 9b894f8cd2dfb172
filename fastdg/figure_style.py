"""How figures look, and how they reach the disk: matplotlib's file backend only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .files import replace

# Okabe and Ito's palette, which colour-blind readers distinguish too.
COLOURS = {
    "erm": "#000000",
    "fishr": "#0072b2",
    "fishr-all": "#003f66",
    "vrex": "#d55e00",
    "irm": "#8c3d00",
    "iga": "#f5a97f",
    "groupdro": "#999933",
    "fish": "#56b4e9",
    "agr-sum": "#009e73",
    "agr-rand": "#7fceb9",
    "pcgrad": "#cc79a7",
    "mgda": "#1b7837",
    "cagrad": "#762a83",
    "upgrad": "#9970ab",
    "dualproj": "#c2a5cf",
    "imtl-g": "#5aae61",
    "aligned-mtl": "#a6dba0",
    "config": "#00a6a6",
    "nash-mtl": "#8a2846",
    "fairgrad": "#c51b7d",
    "gradvac": "#e78ac3",
    "genie": "#969696",
    "gga": "#636363",
    "gga-l": "#4d4d4d",
    "pogm": "#2166ac",
    "pgrad": "#35978f",
    "and-mask": "#e69f00",
    "sand-mask": "#f0e442",
    "rise": "#6a3d9a",
    "miro": "#e31a1c",
    "miro+fishr": "#fb9a99",
    "swad": "#b15928",
    "sma": "#e0a070",
    "sam": "#08519c",
    "gsam": "#3182bd",
    "sagm": "#6baed6",
    "gam": "#9ecae1",
    "disam": "#54278f",
    "eqrm": "#a50f15",
    "rdm": "#de2d26",
    "sd": "#fb6a4a",
    "coral": "#006d2c",
    "mmd": "#31a354",
    "causirl": "#41ab5d",
    "ib-erm": "#74c476",
    "ib-irm": "#a1d99b",
    "mldg": "#525252",
    "gramsurgery": "#998ec3",
    "miro+swad": "#fdbf6f",
}
# Of the parts of the data, which no algorithm has
PARTS = {"train": "#332288", "test": "#cc3311", "grey": "#999999"}
PAGE = 7.2  # inches: a page's width
STYLE: Any = {
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
# Of a cosine between two domains' gradients; red: they pull against each other.
COSINE: Any = {"norm": Normalize(-1, 1), "cmap": "RdBu"}


def save(figure: Figure, path: Path, dpi: int = 200) -> None:
    """As a PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    replace(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
