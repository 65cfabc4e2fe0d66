"""What the benchmarks share: settings, turns, processes, Markdown tables, pictures, and where results go.

OWLET_BENCH_SIZES=tiny,small and OWLET_BENCH_THREADS=1,4 choose what the benchmarks run by pytest measure.
Import this module before those in the repository's root, which it makes importable.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import pytest
import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from lib.cli import UserError
from lib.files import write_json, write_text
from lib.machine import cpu_name
from lib.picture import new_figure, save
from model import GPT, SIZES, GPTConfig

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "out/bench"  # results of the benchmarks run by pytest
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


def matrix_shapes(config: GPTConfig) -> dict[str, tuple[int, int]]:
    """(N, K) of the matrices of a layer and of the head, as int8 multiplies by them, for one of model.py's sizes."""
    width, hidden = config.n_embd, config.n_hidden
    return {"qkv": (3 * width, width), "o": (width, width), "gate_up": (2 * hidden, width), "down": (width, hidden),
            "head": (config.vocab_size, width)}


def matrix_sizes(config: GPTConfig) -> tuple[int, int]:
    """The weights of all layers together, and of the head."""
    *layer, head = (N * K for N, K in matrix_shapes(config).values())
    return config.n_layer * sum(layer), head


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


# ---------------------------------------------------------------- processes

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # only Linux binds processes


def run_process(command: list, log: Path) -> float:
    """The seconds that a Python script and its arguments take. Its output goes to `log`. UserError if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        start = time.perf_counter()
        code = subprocess.run([sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT).returncode
        seconds = time.perf_counter() - start
    if code:
        raise UserError(f"{command[0]} ended with {code}; its output is in {log}")
    return seconds


class Remote:
    """What make() returns, in a process of its own: ask() calls one of its methods, answer() returns the result."""

    def __init__(self, make: Callable[[], Any], cores: list[int], env: dict[str, str], log: Path | None = None) -> None:
        """cores: those it is bound to, if any are named. log: the file that gets what is printed there."""
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=serve, args=(there, make, cores, log), daemon=True)
        with mock.patch.dict(os.environ, env):
            self.process.start()
        there.close()

    def ask(self, method: str, *args: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # answer() says how the process ended
            self.pipe.send((method, args))

    def answer(self) -> Any:
        """Raises UserError if the method, make() or the process failed."""
        try:
            result = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            code = self.process.exitcode
            result = UserError(signal.strsignal(-code) if code < 0 else f"ended with exit code {code}")
        if isinstance(result, UserError):
            raise result
        return result

    def close(self) -> None:
        self.pipe.close()  # ends serve()
        self.process.join(timeout=5)
        self.process.kill()
        self.process.join()


def serve(pipe: Connection, make: Callable[[], Any], cores: list[int], log: Path | None) -> None:
    """The other side of Remote: answers until its pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    if cores:
        os.sched_setaffinity(0, cores)
    if log:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    try:
        target = make()
        while True:
            method, args = pipe.recv()
            pipe.send(getattr(target, method)(*args))
    except EOFError:
        return
    except ModuleNotFoundError as error:
        pipe.send(UserError(f"not installed: {error.name}"))
    except Exception as error:
        pipe.send(UserError(" ".join(f"{type(error).__name__}: {error}".split())[:200]))
        raise


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


def publish(stem: Path, note: str, *tables: tuple[list[dict], dict[str, str]]) -> None:
    """Print the tables, each (rows, columns) as table() takes them, and the note, and write them to stem.md.

    The rows themselves go to stem.json.
    """
    text = "\n\n".join([*itertools.starmap(table, tables), note])
    write_text(stem.with_suffix(".md"), f"{text}\n")
    write_json(stem.with_suffix(".json"), {"note": note, "tables": [rows for rows, _ in tables]})
    print(f"{text}\n\nalso in {stem.parent}/")


@contextlib.contextmanager
def uncaptured(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is printed inside appears on the terminal, although pytest captures output."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n")
        yield
