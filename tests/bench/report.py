"""What the benchmarks share: settings, turns, Markdown tables, pictures, and where results go.

OWLET_BENCH_SIZES=tiny,small and OWLET_BENCH_THREADS=1,4 choose what the benchmarks run by pytest measure.
Import this module before those in the repository's root, which it makes importable.
"""

import contextlib
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from lib.files import write_json, write_text
from lib.machine import cpu_name
from lib.picture import new_figure, save
from model import GPT, SIZES, GPTConfig

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out/bench"  # of the benchmarks run by pytest
THREADS = [int(n) for n in os.environ.get("OWLET_BENCH_THREADS", "1,2").split(",")]
GPT2_VOCAB = 50257
Name = TypeVar("Name", bound=Hashable)


def sizes(default: str) -> list[str]:
    return os.environ.get("OWLET_BENCH_SIZES", default).split(",")


def random_model(size: str, vocab_size: int = 256, std: float = 0.02) -> GPT:
    """An fp32 model of random weights: speed does not depend on their values, as long as they are not zero."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size, **SIZES[size])).eval().requires_grad_(False)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=std)
    return model


# ---------------------------------------------------------------- turns

def take_turns(calls: dict[Name, Callable[[], Any]], rounds: int, warmup: int = 1, title: str = "") -> dict[Name, list]:
    """The results of each call, one a round, without those of the warm-up rounds.

    Calls are interleaved (A B C A B C ...), so that a slow minute of the machine slows all of them.
    """
    results = {name: [] for name in calls}
    turns = list(itertools.product(range(warmup + rounds), calls))
    for turn, name in tqdm(turns, desc=title, disable=None, leave=False):
        result = calls[name]()
        if turn >= warmup:
            results[name].append(result)
    return results


def summary(values: list[float]) -> dict[str, float]:
    """The median, and as a share of it how far the farthest value is from it."""
    median = statistics.median(values)
    return {"median": median, "spread": max(abs(value / median - 1) for value in values)}


# ---------------------------------------------------------------- tables, pictures, files

def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table. columns: header -> format of the cells, such as "{seconds:.1f}" for row["seconds"]."""
    lines = [list(columns), ["---"] + ["--:"] * (len(columns) - 1)]
    lines += [[cell.format_map(row) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


@contextlib.contextmanager
def picture(path: Path, title: str, size: tuple[float, float], shape: tuple[int, int] = (1, 1),
            **options: Any) -> Iterator[np.ndarray]:
    """Yield axes (rows, columns) to plot on; then write them to path as PNG, with the first one's legend below."""
    figure = new_figure(*size)
    axes = figure.subplots(*shape, squeeze=False, **options)
    yield axes
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * axes.shape[1],
                  frameon=False, fontsize=8)
    save(figure, path)


def machine_name(gpu: bool = False) -> str:
    return f"{torch.cuda.get_device_name() if gpu else cpu_name()}, torch {torch.__version__}"


def publish(stem: Path, text: str, result: dict) -> None:
    """Print text (Markdown) and write it to stem.md; write result to stem.json."""
    write_text(stem.with_suffix(".md"), f"{text}\n")
    write_json(stem.with_suffix(".json"), result)
    print(f"{text}\n\nalso in {stem.parent}/")


@contextlib.contextmanager
def uncaptured(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is printed inside appears on the terminal, although pytest captures output."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n")
        yield
