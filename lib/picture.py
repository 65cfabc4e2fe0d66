"""Figures of matplotlib, without a screen. Callers put theirs into cli.optional: no picture may end a run."""

import logging
import warnings
from pathlib import Path

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # the import warns of a home that cannot be written to

import matplotlib  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from lib.files import atomic_path  # noqa: E402

matplotlib.rcParams["text.parse_math"] = False  # the name of a book may hold a $
warnings.filterwarnings("ignore", "Glyph .* missing from font")  # for all threads at once


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
