"""How a training step scales over ranks: measured here, and modelled for 4 and 8.

    python tests/bench/bench_scaling.py                                  1 and 2 ranks: a core each, or a GPU each
    python tests/bench/bench_scaling.py --ranks 1 2 4 8 --sizes base     on a machine that has them

Measured is train.py's own step, not compiled. The ranks of each number live in processes of their own from beginning
to end and wait for their turn on a pipe; turns go round by round (A B C A B C ...), so that a slow minute of the
machine is everybody's. Strong scaling divides a batch among the ranks, weak scaling gives each as much as the one had.
The ceiling is the same step with nothing sent: what is missing there, more ranks cost in other ways (shared caches and
memory, what each of them repeats); the rest is communication. The model puts a step together from its parts, each
measured here, or assumed for GPUs that are not here.
"""

import itertools
import math
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

from cli import UserError, parse, run
from dataloader import forward_loss
from distributed import Ranks, parallelize
from files import atomic_path, write_json
from machine import cpu_name, pick_dtype
from model import GPT
from muon import COEFFICIENTS, make_optimizers, orthogonalize, update
from train import build_model, defaults

SHAPES = {"tiny-64": replace(defaults("tiny"), block_size=64, batch_size=12), "small": defaults("small"),
          "base": replace(defaults("base"), batch_size=128)}
VOCABULARY = 256
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []  # Linux alone binds processes
GATHER = "all_to_all_single"  # what muon.py sends with
STUDENT = {1: 6365, 2: 3817, 4: 2754}  # GPUs: seconds that the student project of the README trained for

Times = dict[int, dict[str, list[float]]]  # ranks -> turn -> seconds a step, one figure a round


# ---------------------------------------------------------------- what a step sends

def matrix_shapes(model: GPT) -> Counter[torch.Size]:
    """What Muon works on: how many matrices of each shape."""
    return Counter(p.shape for p in model.model.layers.parameters() if p.dim() == 2)


@cache
def meta_model(size: str) -> GPT:
    with torch.device("meta"):
        return build_model(SHAPES[size], VOCABULARY)


@cache
def sent(size: str) -> tuple[list[int], int, int]:
    """Bytes of DistributedDataParallel's buckets of gradients; of Muon's steps, and in how many messages."""
    shapes, total = matrix_shapes(meta_model(size)), 4 * meta_model(size).num_params()
    ends = [0, *range(2**20, total, 25 * 2**20), total]  # 1 MiB, so that sending begins early, then 25 each
    return np.diff(ends).tolist(), 4 * sum(count * math.prod(shape) for shape, count in shapes.items()), len(shapes)


# ---------------------------------------------------------------- a rank

class Rank:
    """One process of a number of them. turn times one of the methods below it."""

    def __init__(self, size: str) -> None:
        self.config, ranks = SHAPES[size], Ranks("auto", threads=1)
        self.device, self.world = ranks.device, ranks.world
        torch.manual_seed(0)
        self.model = build_model(self.config, VOCABULARY).to(self.device).train()
        self.dtype = pick_dtype("auto", self.device, self.config.n_embd)
        self.optimizers = make_optimizers(self.model, self.config.muon_lr, self.config.adam_lr,
                                          pick_dtype("auto", self.device, 256))
        self.wrapped = parallelize(self.model, ranks, "ddp", self.dtype)  # not compiled: turns differ in shape
        self.tokens = torch.randint(VOCABULARY, (2, self.config.batch_size, self.config.block_size), device=self.device)
        self.matrices = [torch.randn(count, *shape, device=self.device)
                         for shape, count in matrix_shapes(self.model).items()]
        self.buckets = [torch.zeros(bytes_ // 4, device=self.device) for bytes_ in sent(size)[0]]
        self.exchange: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def turn(self, what: str, sequences: int, steps: int) -> float:
        """Seconds of one step, over so many; one more goes before: after a turn of another shape memory is new."""
        x, y = self.tokens[:, :sequences]  # each (sequences, T)
        getattr(self, what)(x, y)
        if self.world > 1:
            dist.barrier()
        self.tokens[0, 0, 0].item()  # waits for an asynchronous device
        start = time.perf_counter()
        for _ in range(steps):
            getattr(self, what)(x, y)
        self.tokens[0, 0, 0].item()
        return (time.perf_counter() - start) / steps

    def step(self, x: Tensor, y: Tensor) -> None:
        forward_loss(self.wrapped, x, y, self.dtype).backward()
        update(self.model, self.optimizers, (self.config.muon_lr, self.config.adam_lr))

    def silent(self, x: Tensor, y: Tensor) -> None:
        """A step with nothing sent. The model it makes is no good; its cost is that of any other."""
        def gather(out: Tensor, mine: Tensor, async_op: bool) -> None:
            self.exchange[out.shape] = out, mine
            out.copy_(mine)  # as if all ranks had made the same

        with self.wrapped.no_sync(), mock.patch.object(dist, GATHER, gather):
            self.step(x, y)
        assert self.exchange, f"muon.py does not send with {GATHER}"

    def collectives(self, *_: Tensor) -> None:
        """What a step sends, and nothing computed beside it."""
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in self.buckets]:
            work.wait()
        for work in [getattr(dist, GATHER)(*both, async_op=True) for both in self.exchange.values()]:
            work.wait()

    def message(self, *_: Tensor) -> None:
        dist.all_reduce(self.buckets[0][:1])

    def newton_schulz(self, *_: Tensor) -> None:
        for x in self.matrices:
            orthogonalize(x, self.optimizers[0].dtype)


def serve(size: str, rank: int, world: int, port: int, pipe: Connection) -> None:
    """A rank's process: takes its turns until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    if not torch.cuda.is_available():
        os.sched_setaffinity(0, [CORES[rank]])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    member = Rank(size)
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        pipe.send(member.turn(*request))


class World:
    """So many ranks, seen from outside."""

    def __init__(self, size: str, ranks: int) -> None:
        batch, share = SHAPES[size].batch_size, SHAPES[size].batch_size // ranks
        self.ranks, self.turns = ranks, {"step": ("step", batch), "half": ("step", batch // 2),
                                         "newton_schulz": ("newton_schulz", 0)}
        if ranks > 1:
            self.turns = {"strong": ("step", share), "strong, silent": ("silent", share),
                          "weak": ("step", batch), "weak, silent": ("silent", batch),
                          "collectives": ("collectives", 0), "message": ("message", 0)}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            here, there = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(size, rank, ranks, port, there), daemon=True))
            self.processes[-1].start()
            there.close()
            self.pipes.append(here)

    def turn(self, name: str, steps: int) -> float:
        """Seconds a step took, on the slowest rank."""
        try:
            for pipe in self.pipes:
                pipe.send((*self.turns[name], steps))
            return max([pipe.recv() for pipe in self.pipes])
        except (EOFError, ConnectionError):
            raise UserError(f"one of {self.ranks} ranks ended early; what it said is above") from None

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


# ---------------------------------------------------------------- measured

def measure(size: str, ranks: list[int], rounds: int, seconds: float) -> Times:
    worlds = [World(size, n) for n in ranks]
    try:
        turns = [(world, name) for world in worlds for name in world.turns]
        # the first of two warms up, the second says how many steps make a turn
        steps = [max(1, round(seconds / [world.turn(name, 1) for _ in range(2)][1])) for world, name in turns]
        times = {world.ranks: {name: [] for name in world.turns} for world in worlds}
        for _ in tqdm(range(rounds), desc=size, disable=None, leave=False):
            for (world, name), count in zip(turns, steps, strict=True):
                times[world.ranks][name].append(world.turn(name, count))
        return times
    finally:
        for world in worlds:
            world.close()


def compare(times: Times, ranks: int, scaling: str) -> dict[str, float]:
    """Medians over the rounds; of ratios, of each round's own."""
    work = ranks if scaling == "weak" else 1
    one, collectives = np.array(times[1]["step"]), np.array(times[ranks]["collectives"])
    many, silent = np.array(times[ranks][scaling]), np.array(times[ranks][f"{scaling}, silent"])
    figures = {"one": one, "many": many, "speed_up": work * one / many, "ceiling": work * one / silent,
               "share_of_ceiling": silent / many, "collectives": collectives, "collectives_share": collectives / many,
               "exposed": many - silent, "exposed_share": 1 - silent / many}
    medians = {name: float(np.median(values)) for name, values in figures.items()}
    return medians | {"spread": float(np.abs(many / medians["many"] - 1).max())}


# ---------------------------------------------------------------- modelled

INPUTS = {  # of the model: the unit they are printed in, and what they are
    "sequence": (1e3, "ms, a sequence's forward and backward"),
    "newton_schulz": (1e3, "ms, Newton-Schulz, which ranks share"),
    "fixed": (1e3, "ms, what each rank does beside"),
    "bandwidth": (1e-9, "GB/s, from a rank to the next"),
    "hop": (1e6, "µs, the shortest message there"),
    "hidden": (1, "of backward, behind which gradients travel"),
}
Inputs = dict[str, tuple[float, str]]  # name -> value in seconds or bytes a second, source


@dataclass
class Model:
    """What a step of a size takes on any number of ranks."""

    size: str
    inputs: Inputs

    def step(self, ranks: float, sequences: float) -> float:
        """T(N) = compute + fixed + Newton-Schulz / N + exposed communication, of so many sequences a rank.

        Collectives go round a ring (Patarasuk & Yuan, 2009): an all-reduce is 2 (N - 1) hops of an N-th
        of the bytes, an all-gather N - 1. Backward is two thirds of compute; what is ready at its end, the
        last bucket, cannot hide behind it, and Muon's steps hide behind nothing.
        """
        value = {name: value for name, (value, _) in self.inputs.items()}
        buckets, matrices, messages = sent(self.size)
        compute = value["sequence"] * sequences
        reduce = [2 * (ranks - 1) * (bucket / ranks / value["bandwidth"] + value["hop"]) for bucket in buckets]
        gather = (ranks - 1) * (matrices / ranks / value["bandwidth"] + messages * value["hop"])
        exposed = max(sum(reduce) - value["hidden"] * 2 / 3 * compute, reduce[-1]) + gather
        return compute + value["fixed"] + value["newton_schulz"] / ranks + exposed

    def speed_up(self, ranks: float) -> float:
        batch = SHAPES[self.size].batch_size
        return self.step(1, batch) / self.step(ranks, batch / ranks)


def measured_compute(size: str, times: Times) -> Inputs:
    """From one rank's times at two batches."""
    batch, one = SHAPES[size].batch_size, {name: statistics.median(values) for name, values in times[1].items()}
    sequence = (one["step"] - one["half"]) / (batch - batch // 2)
    fixed = max(0.0, one["step"] - batch * sequence - one["newton_schulz"])
    return {"sequence": (sequence, "measured"), "newton_schulz": (one["newton_schulz"], "measured"),
            "fixed": (fixed, "measured")}


def measured_link(size: str, times: Times, gpu: bool) -> Inputs:
    """From collectives between the fewest ranks."""
    buckets, matrices, messages = sent(size)
    n = sorted(times)[1]
    hop = statistics.median(times[n]["message"]) / (2 * (n - 1))
    travelling = statistics.median(times[n]["collectives"]) - (n - 1) * hop * (2 * len(buckets) + messages)
    bandwidth = (n - 1) / n * (2 * sum(buckets) + matrices) / max(1e-9, travelling)
    return {"bandwidth": (bandwidth, "measured"), "hop": (hop, "measured"),
            "hidden": (1, "assumed: a GPU sends while it computes") if gpu else
                      (0, "assumed: a rank's one core computes or sends")}


def assumed_compute(size: str) -> Inputs:
    """An H100's."""
    model, flops = meta_model(size), 0.29 * 989e12
    source = ("assumed: 29 % of 989 TFLOP/s, bf16 (H100 SXM data sheet), the share that nanoGPT's README comes to, "
              "compiled, on A100s: 600,000 steps of 491,520 tokens on 8 in 4 days")
    newton_schulz = len(COEFFICIENTS) * sum(count * (4 * min(shape)**2 * max(shape) + 2 * min(shape)**3)
                                            for shape, count in matrix_shapes(model).items())
    return {"sequence": (model.flops_per_token() * SHAPES[size].block_size / flops, source),
            "newton_schulz": (newton_schulz / flops, source),
            "fixed": (28 * model.num_params() / 3.35e12,
                      "assumed: seven fp32 reads and writes a parameter at 3.35 TB/s (H100 SXM data sheet)")}


def assumed_link(link: str) -> Inputs:
    bandwidth, hop, source = {
        "NVLink": (0.8 * 450e9, 3.4e-6, "80 % of 450 GB/s each way (H100 SXM data sheet)"),
        "PCIe": (28e9, 5.7e-6, "28 GB/s, all-reduce of 8 GPUs on PCIe 5 (github.com/NVIDIA/nccl, issue 1639)")}[link]
    return {"bandwidth": (bandwidth, f"assumed: {source}"),
            "hop": (hop, f"assumed: NCCL's own table for {link}, ring, simple (its src/graph/tuning.cc)"),
            "hidden": (1, "assumed: a GPU sends while it computes")}


def make_models(times: dict[str, Times], gpu: bool) -> dict[str, Model]:
    """Of what was measured; where ranks of GPUs were not, of one GPU here, or else of seed on H100s."""
    found = {size: Model(size, measured_compute(size, of) | measured_link(size, of, gpu))
             for size, of in times.items() if len(of) > 1}
    if gpu and found:
        return found
    alone = {size: measured_compute(size, of) for size, of in times.items()} if gpu else \
            {"base": assumed_compute("base")}
    return found | {f"{size}, {'' if gpu else 'H100s, '}{link}": Model(size, compute | assumed_link(link))
                    for size, compute in alone.items() for link in ("NVLink", "PCIe")}


def fit_student() -> tuple[float, float]:
    """T(N) = A + B / N, by least squares."""
    terms = [[1, 1 / gpus] for gpus in STUDENT]
    return tuple(np.linalg.lstsq(terms, list(STUDENT.values()))[0].tolist())


# ---------------------------------------------------------------- told

def markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---", *["--:"] * (len(header) - 1)], *rows))


def tables(measured: list[dict], models: dict[str, Model]) -> str:
    def ms(seconds: float) -> str:
        return f"{seconds * 1e3:.1f}"

    rows = [[f"`{row['size']}`, {row['scaling']}, {row['ranks']} ranks", ms(row["one"]),
             f"{ms(row['many'])} ±{row['spread']:.0%}", f"{row['speed_up']:.2f}x", f"{row['ceiling']:.2f}x",
             f"{row['share_of_ceiling']:.0%}", f"{ms(row['collectives'])} = {row['collectives_share']:.0%}",
             f"{ms(row['exposed'])} = {row['exposed_share']:.0%}",
             ms(models[row["size"]].step(row["ranks"], row["sequences"]))] for row in measured]
    text = [markdown(["measured", "1 rank, ms", "N ranks, ms", "speed-up", "ceiling", "share of it",
                      "collectives alone, ms", "exposed, ms", "model, ms"], rows)]

    rows = []
    for name, model in models.items():
        batch = SHAPES[model.size].batch_size
        rows.append([f"`{name}`", f"{batch}", ms(model.step(1, batch)), *(
            f"{ms(model.step(n, batch / n))} = {model.speed_up(n):.2f}x" if batch % n == 0 else "" for n in (2, 4, 8))])
    text.append(markdown(["model, strong scaling", "batch", "1 rank, ms", "2", "4", "8"], rows))

    rows = [[what, *(f"{model.inputs[name][0] * unit:.3g} {model.inputs[name][1].partition(':')[0]}"
                     for model in models.values())] for name, (unit, what) in INPUTS.items()]
    text.append(markdown(["its inputs", *(f"`{name}`" for name in models)], rows))
    notes = {f"- {INPUTS[name][1]}: {source}" for model in models.values()
             for name, (_, source) in model.inputs.items() if source != "measured"}
    return "\n\n".join([*text, "\n".join(sorted(notes))])


def draw(machine: str, measured: list[dict], models: dict[str, Model], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ranks, (serial, parallel) = np.linspace(1, 8, 141), fit_student()
    axes.plot(ranks, ranks, "--", color="grey", lw=1, label="ideal")
    axes.plot(ranks, (serial + parallel) / (serial + parallel / ranks), color="black", lw=1,
              label=f"student project: {serial:,.0f} + {parallel:,.0f} / N seconds")
    axes.plot(list(STUDENT), [STUDENT[1] / seconds for seconds in STUDENT.values()], "ks", ms=4)
    colors = dict(zip(models, plt.cm.tab10.colors, strict=False))
    for name, model in models.items():
        here = model.inputs["bandwidth"][1] == "measured"
        axes.plot(ranks, [model.speed_up(n) for n in ranks], "-" if here else ":", color=colors[name],
                  label=f"{name}, batch {SHAPES[model.size].batch_size}: model{' and measured' * here}")
    for row in measured:
        if row["scaling"] == "strong":
            axes.plot(row["ranks"], row["speed_up"], "o", color=colors[row["size"]])
    axes.set(title=f"strong scaling: the same batch on N ranks\n{machine}", xlabel="ranks", ylabel="speed-up")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- command line

@dataclass
class ScalingConfig:
    sizes: tuple[Literal[tuple(SHAPES)], ...] = ("tiny-64", "small")
    """tiny-64: 4 layers x 128, batch 12 of 64 tokens; small: 6 x 384, 16 of 256; seed: 8 x 512, 128 of 512."""
    ranks: tuple[int, ...] = (1, 2)
    """Numbers of ranks; 1 is always among them."""
    rounds: int = 9
    """Turns of each kind that count."""
    seconds: float = 1.0
    """How long a turn takes, about; it is one step at least."""
    out: Path = Path("out/scaling")
    """Folder for scaling.json and scaling.png."""


def main() -> None:
    config = parse(ScalingConfig, "How a training step scales over ranks: measured, and modelled for 4 and 8.")
    gpus = torch.cuda.device_count()
    places, ranks = gpus or len(CORES), sorted({1, *config.ranks})
    if not places:
        raise UserError("bench_scaling.py: needs GPUs, or Linux, where a process can be bound to its core")
    for flag, values, most in (("ranks", ranks, places), ("rounds", [config.rounds], 1000)):
        if not all(1 <= value <= most for value in values):
            raise UserError(f"--{flag}: expected 1 to {most}, got {' '.join(map(str, values))}")
    for size, n in itertools.product(config.sizes, ranks):
        if SHAPES[size].batch_size % n:
            raise UserError(f"--ranks: expected divisors of {size}'s batch of {SHAPES[size].batch_size}, got {n}")

    times = {size: measure(size, ranks, config.rounds, config.seconds) for size in config.sizes}
    measured = [{"size": size, "ranks": n, "scaling": scaling,
                 "sequences": SHAPES[size].batch_size // (n if scaling == "strong" else 1),
                 **compare(times[size], n, scaling)}
                for size, n, scaling in itertools.product(config.sizes, ranks[1:], ("strong", "weak"))]
    models, (serial, parallel) = make_models(times, bool(gpus)), fit_student()
    machine = f"{torch.cuda.get_device_name() if gpus else cpu_name()}, torch {torch.__version__}"
    write_json(config.out / "scaling.json", {
        "machine": machine, "rounds": config.rounds, "times": times, "measured": measured,
        "models": {name: vars(model) for name, model in models.items()}, "student": [serial, parallel]})
    draw(machine, measured, models, config.out / "scaling.png")
    print(f"{tables(measured, models)}\n\n"
          f"student project, {', '.join(f'{seconds:,} s on {n}' for n, seconds in STUDENT.items())} GPUs: "
          f"{serial:,.0f} + {parallel:,.0f} / N seconds by least squares, {serial / (serial + parallel):.0%} serial\n"
          f"{machine}; {config.rounds} rounds, medians and the farthest of them\n"
          f"also in {config.out}/scaling.json and .png")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no rank stays behind
    run(main)
