"""Pictures: figures of matplotlib without a screen, saved whole or not at all. A picture that fails is a note."""

import logging
import warnings
from pathlib import Path
from typing import Any

from cli import optional

import matplotlib
from matplotlib.figure import Figure

from files import atomic_path

matplotlib.rcParams["text.parse_math"] = False  # the name of a book may hold a $
# for all threads at once: letters that the font lacks, and a home that cannot be written to
warnings.filterwarnings("ignore", "Glyph .* missing from font")
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a PNG. Where that fails, a note says so."""
    with optional(path), atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, **options)
