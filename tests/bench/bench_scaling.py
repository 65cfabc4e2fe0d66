"""How a training step scales over ranks that share its batch: measured here, and modelled for up to 8.

    python tests/bench/bench_scaling.py                                  1 and 2 ranks: a core each, or a GPU each
    python tests/bench/bench_scaling.py --ranks 1 2 4 8 --sizes base     on a machine that has them

The step is train.py's, not compiled. The ranks are processes that live for the whole benchmark and take turns; between
turns they wait on a pipe. The ceiling is the speed-up of the same step with nothing sent. It is below N because ranks
share caches and memory, and because each repeats some work; communication makes up the rest. The model adds a step up
from its parts, each of them measured here, or assumed for GPUs that are not here.
"""

import itertools
import math
import random
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from report import CORES, Remote, machine_name, picture, publish, summary, take_turns
from msgspec import Meta
from torch import Tensor

from dataloader import forward_loss
from lib import muon
from lib.cli import Count, NonNegative, UserError, flag, parse, run
from lib.distributed import Ranks, average, gather, parallelize
from lib.machine import pick_dtype
from lib.muon import COEFFICIENTS, make_optimizers, orthogonalize, update
from model import GPT, SIZES, GPTConfig

CONFIGS = {"tiny-64": GPTConfig(**SIZES["tiny"] | {"block_size": 64}), "small": GPTConfig(**SIZES["small"]),
           "base": GPTConfig(**SIZES["base"])}
BATCHES = {"tiny-64": 12, "small": 16, "base": 128}  # sequences a step
RATES = 0.02, 3e-3  # learning rates of Muon and AdamW: the time of a step does not depend on them
GPUS = torch.cuda.device_count()
PLACES = GPUS or len(CORES)  # for ranks
STUDENT = {1: 6365, 2: 3817, 4: 2754}  # GPUs -> seconds of the student project's training (README.md)

Times = dict[tuple[int, str], list[float]]  # ranks, name of the turn -> ms a step, one value a round


# ---------------------------------------------------------------- what a step sends

def matrix_shapes(model: GPT) -> Counter[torch.Size]:
    """The matrices that Muon updates: how many of each shape."""
    return Counter(p.shape for p in model.model.layers.parameters() if p.dim() == 2)


@cache
def meta_model(size: str) -> GPT:
    with torch.device("meta"):
        return GPT(CONFIGS[size])


@cache
def sent(size: str) -> tuple[list[float], float, int]:
    """MB of DistributedDataParallel's gradient buckets; MB of Muon's steps, and in how many messages."""
    shapes, total = matrix_shapes(meta_model(size)), 4 * meta_model(size).num_params()
    ends = [0, *range(2**20, total, 25 * 2**20), total]  # 1 MiB, so that sending begins early, then 25 each
    weights = sum(count * math.prod(shape) for shape, count in shapes.items())
    return (np.diff(ends) / 1e6).tolist(), 4e-6 * weights, len(shapes)


# ---------------------------------------------------------------- a rank

class Rank:
    """One process of a group. `turn` times one of the methods below it."""

    def __init__(self, size: str) -> None:
        ranks = Ranks("auto", threads=1)
        self.device, self.world = ranks.device, ranks.world
        torch.manual_seed(0)
        self.model = GPT(CONFIGS[size]).train()
        self.dtype = pick_dtype("auto", self.device)
        self.wrapped = parallelize(self.model, ranks, "ddp", self.dtype)  # not compiled: turns differ in shape
        self.optimizers = make_optimizers(self.model, RATES[0], self.dtype)
        self.tokens = torch.randint(256, (2, BATCHES[size], self.model.config.block_size), device=self.device)
        self.matrices = [torch.randn(count, *shape, device=self.device)
                         for shape, count in matrix_shapes(self.model).items()]
        self.buckets = [torch.zeros(round(megabytes * 1e6) // 4, device=self.device) for megabytes in sent(size)[0]]
        self.steps: dict[torch.Size, Tensor] = {}  # this rank's steps of Muon, by shape

    def turn(self, name: str, sequences: int, steps: int) -> float:
        """The mean milliseconds of `steps` steps, after one as the warm-up: another shape needs new memory."""
        call = partial(getattr(self, name), *self.tokens[:, :sequences])  # x and y, each (sequences, T)
        call()
        if self.world > 1:
            dist.barrier()
        self.tokens[0, 0, 0].item()  # waits for an asynchronous device
        start = time.perf_counter()
        for _ in range(steps):
            call()
        self.tokens[0, 0, 0].item()
        return (time.perf_counter() - start) * 1e3 / steps

    def step(self, x: Tensor, y: Tensor) -> None:
        forward_loss(self.wrapped, x, y, self.dtype).backward()
        update(self.model, self.optimizers, RATES)

    def silent(self, x: Tensor, y: Tensor) -> None:
        """A step with nothing sent. It takes as long as any other, although its model is wrong."""
        def gather(mine: Tensor) -> tuple[Tensor, None]:
            self.steps[mine.shape] = mine
            return mine.repeat(self.world, 1, 1), None  # as if all ranks had the same

        with self.wrapped.no_sync(), mock.patch.object(muon, "gather", gather):
            self.step(x, y)
        assert self.steps, "muon.py does not send by gather()"

    def collectives(self, *_: Tensor) -> None:
        """What a step sends, with nothing computed meanwhile."""
        for future in [average(bucket) for bucket in self.buckets]:
            future.wait()
        for work in [gather(steps)[1] for steps in self.steps.values()]:
            if work is not None:
                work.wait()

    def message(self, *_: Tensor) -> None:
        average(self.buckets[0][:1]).wait()

    def newton_schulz(self, *_: Tensor) -> None:
        for x in self.matrices:
            orthogonalize(x, self.optimizers[0].dtype)


class Group:
    """The processes of a number of ranks, and the turns they take: name -> method of Rank, sequences a rank."""

    def __init__(self, size: str, ranks: int) -> None:
        batch = BATCHES[size]
        self.ranks, self.turns = ranks, {"step": ("step", batch // ranks)}
        if ranks == 1:
            self.turns |= {"half": ("step", batch // 2), "newton_schulz": ("newton_schulz", 0)}
        else:
            self.turns |= {"silent": ("silent", batch // ranks), "collectives": ("collectives", 0),
                           "message": ("message", 0)}
        port = random.randrange(20_000, 32_000)  # below those that the system hands out to clients
        env = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RESTART_COUNT": 0,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # as on one machine by torchrun
        self.remotes = [Remote(partial(Rank, size), [] if GPUS else [CORES[rank]], {
            name: str(value) for name, value in (env | {"RANK": rank, "LOCAL_RANK": rank}).items()})
            for rank in range(ranks)]

    def turn(self, name: str, steps: int) -> float:
        """Milliseconds of a step on the slowest rank."""
        for remote in self.remotes:
            remote.ask("turn", *self.turns[name], steps)
        try:
            return max([remote.answer() for remote in self.remotes])
        except UserError as error:
            raise UserError(f"one of {self.ranks} ranks ended early: {error}") from None

    def close(self) -> None:
        for remote in self.remotes:
            remote.process.kill()  # one that waits for a rank that has ended would not answer


# ---------------------------------------------------------------- measured

def measure(size: str, ranks: list[int], rounds: int, seconds: float) -> Times:
    """Every turn of every group, of about so many seconds, but one step at least."""
    groups, calls = [Group(size, n) for n in ranks], {}
    try:
        for group in groups:
            for name in group.turns:
                step = [group.turn(name, 1) for _ in range(2)][1]  # the first is the warm-up
                calls[group.ranks, name] = partial(group.turn, name, max(1, round(seconds * 1e3 / step)))
        return take_turns(calls, rounds, warmup=0, title=size)
    finally:
        for group in groups:
            group.close()


def compare(times: Times, size: str, ranks: int) -> dict:
    """A row of the table: medians over the rounds. A ratio is of values from the same round."""
    one, many, silent, collectives = (
        np.array(times[turn]) for turn in ((1, "step"), (ranks, "step"), (ranks, "silent"), (ranks, "collectives")))
    values = {"one": one, "speed_up": one / many, "ceiling": one / silent, "share_of_ceiling": silent / many,
              "collectives": collectives}
    return {"size": size, "ranks": ranks, "many": summary(many.tolist()),
            **{name: float(np.median(value)) for name, value in values.items()}}


# ---------------------------------------------------------------- modelled

@dataclass
class Model:
    """How long a step of a size takes on any number of ranks. Times are in ms, bandwidth is in GB/s, which is MB/ms."""

    size: str
    sequence: float  # a sequence's forward and backward
    newton_schulz: float  # divided among the ranks
    fixed: float  # what each rank does besides
    bandwidth: float  # from a rank to the next
    hop: float  # the shortest message there
    hidden: float  # the share of backward that overlaps with sending gradients

    def step(self, ranks: float) -> float:
        """T(N) = compute / N + fixed + Newton-Schulz / N + exposed communication.

        Collectives go round a ring (Patarasuk & Yuan, 2009): an all-reduce is 2 (N - 1) hops with an N-th of the bytes
        each, an all-gather N - 1. Backward is two thirds of compute. The last bucket is ready at its end and cannot
        overlap with it; Muon's steps overlap with nothing.
        """
        buckets, matrices, messages = sent(self.size)
        compute = self.sequence * BATCHES[self.size] / ranks
        reduce = [2 * (ranks - 1) * (bucket / ranks / self.bandwidth + self.hop) for bucket in buckets]
        gather = (ranks - 1) * (matrices / ranks / self.bandwidth + messages * self.hop)
        exposed = max(sum(reduce) - self.hidden * 2 / 3 * compute, reduce[-1]) + gather
        return compute + self.fixed + self.newton_schulz / ranks + exposed


def measured_model(size: str, times: Times, ranks: int) -> Model:
    """From the times of one rank with two sizes of batch, and of what so many ranks send."""
    batch, (buckets, matrices, messages) = BATCHES[size], sent(size)
    step, half, newton_schulz = (float(np.median(times[1, name])) for name in ("step", "half", "newton_schulz"))
    message, collectives = (float(np.median(times[ranks, name])) for name in ("message", "collectives"))
    sequence, hop = (step - half) / (batch - batch // 2), message / (2 * (ranks - 1))
    travel = collectives - (ranks - 1) * hop * (2 * len(buckets) + messages)
    bandwidth = (ranks - 1) / ranks * (2 * sum(buckets) + matrices) / max(1e-9, travel)
    return Model(size, sequence, newton_schulz, max(0.0, step - batch * sequence - newton_schulz), bandwidth, hop,
                 hidden=1 if GPUS else 0)  # a core computes or sends


ASSUMED = """\
Assumed of H100s: compute at 29 % of 989 TFLOP/s, bf16 (H100 SXM data sheet), the share that nanoGPT's README comes to,
compiled, on A100s (600,000 steps of 491,520 tokens on 8 in 4 days); besides, seven fp32 reads and writes a parameter at
3.35 TB/s (data sheet). Assumed of links: NVLink 80 % of 450 GB/s each way (data sheet), PCIe 28 GB/s (all-reduce of 8
GPUs on PCIe 5, github.com/NVIDIA/nccl, issue 1639); the shortest message from NCCL's own tables (src/graph/tuning.cc;
ring, simple); a GPU sends while it computes."""
LINKS = {"NVLink": {"bandwidth": 0.8 * 450, "hop": 3.4e-3}, "PCIe": {"bandwidth": 28, "hop": 5.7e-3}}


def assumed_model(size: str, link: str) -> Model:
    """H100s."""
    model, flops = meta_model(size), 0.29 * 989e9  # a millisecond
    newton_schulz = len(COEFFICIENTS) * sum(count * (4 * min(shape)**2 * max(shape) + 2 * min(shape)**3)
                                            for shape, count in matrix_shapes(model).items())
    return Model(size, model.flops_per_token() * model.config.block_size / flops, newton_schulz / flops,
                 28 * model.num_params() / 3.35e9, **LINKS[link], hidden=1)


def fit_student() -> tuple[float, float]:
    """A and B of T(N) = A + B / N, by least squares."""
    terms = [[1, 1 / gpus] for gpus in STUDENT]
    return tuple(np.linalg.lstsq(terms, list(STUDENT.values()))[0].tolist())


# ---------------------------------------------------------------- report

def model_row(name: str, model: Model) -> dict:
    batch, one = BATCHES[model.size], model.step(1)
    on = {n: f"{model.step(n):.1f} = {one / model.step(n):.2f}x" if batch % n == 0 else "" for n in (2, 4, 8)}
    return vars(model) | {"name": name, "batch": batch, "one": one, "on": on}


def plot(measured: list[dict], models: dict[str, Model], path: Path) -> None:
    """Speed-up against ranks: solid where the model is of what was measured."""
    ranks, (serial, parallel) = np.linspace(1, 8, 141), fit_student()
    title = f"strong scaling: the same batch on N ranks\n{machine_name(bool(GPUS))}"
    with picture(path, title, (8, 6)) as [[axis]]:
        axis.plot(ranks, ranks, "--", color="grey", lw=1, label="ideal")
        axis.plot(ranks, (serial + parallel) / (serial + parallel / ranks), color="black", lw=1,
                  label=f"student project: {serial:,.0f} + {parallel:,.0f} / N seconds")
        axis.plot(list(STUDENT), [STUDENT[1] / seconds for seconds in STUDENT.values()], "ks", ms=4)
        for i, (name, model) in enumerate(models.items()):
            here = name == model.size
            axis.plot(ranks, [model.step(1) / model.step(n) for n in ranks], "-" if here else ":", color=f"C{i}",
                      label=f"{name}, batch {BATCHES[model.size]}: model{' and measured' * here}")
            points = [row for row in measured if row["size"] == name]
            axis.plot([row["ranks"] for row in points], [row["speed_up"] for row in points], "o", color=f"C{i}")
        axis.set(xlabel="ranks", ylabel="speed-up")


# ---------------------------------------------------------------- command line

@dataclass
class ScalingConfig:
    sizes: tuple[Literal[tuple(CONFIGS)], ...] = flag(
        ("tiny-64", "small"), "tiny-64: 4 layers x 128, batch 12 of 64 tokens; small: 6 x 384, 16 of 256; "
        "base: 8 x 512, 128 of 512.")
    ranks: tuple[Annotated[int, Meta(ge=1, le=PLACES)], ...] = flag((1, 2), "Numbers of ranks; 1 is among them.")
    rounds: Count = flag(9, "Turns of each kind that count.")
    seconds: NonNegative = flag(1.0, "About how long a turn takes; it is one step at least.")
    out: Path = flag(Path("out/scaling"), "Folder for scaling.md, scaling.json and scaling.png.")


def main() -> None:
    config = parse(ScalingConfig, "How a training step scales over ranks: measured, and modelled for up to 8.")
    if PLACES < 2:
        raise UserError("needs two GPUs, or two cores and Linux, which can bind a process to a core")
    one, *more = sorted({1, *config.ranks})
    for size, n in itertools.product(config.sizes, more):
        if BATCHES[size] % n:
            raise UserError(f"--ranks: expected divisors of {size}'s batch of {BATCHES[size]}, got {n}")

    measured, models, (serial, parallel) = [], {}, fit_student()
    for size in config.sizes if more else ():
        times = measure(size, [one, *more], config.rounds, config.seconds)
        models[size] = measured_model(size, times, more[0])
        measured += [compare(times, size, n) | {"model": models[size].step(n)} for n in more]
    models |= {f"base, H100s, {link}": assumed_model("base", link) for link in LINKS}
    plot(measured, models, config.out / "scaling.png")
    note = (f"{ASSUMED}\n\nstudent project, {', '.join(f'{seconds:,} s on {n}' for n, seconds in STUDENT.items())} "
            f"GPUs: {serial:,.0f} + {parallel:,.0f} / N seconds by least squares, {serial / (serial + parallel):.0%} "
            f"serial\n\n{machine_name(bool(GPUS))}; {config.rounds} rounds, medians and the value farthest from them")
    publish(config.out / "scaling", note, (measured, {
        "measured": "{size}, {ranks} ranks", "1 rank, ms": "{one:.1f}",
        "N ranks, ms": "{many[median]:.1f} ±{many[spread]:.0%}", "speed-up": "{speed_up:.2f}x",
        "ceiling": "{ceiling:.2f}x", "share of it": "{share_of_ceiling:.0%}",
        "collectives alone, ms": "{collectives:.1f}", "model, ms": "{model:.1f}"}),
        ([model_row(name, model) for name, model in models.items()], {
            "model": "{name}", "batch": "{batch}", "1 rank, ms": "{one:.1f}", "2": "{on[2]}", "4": "{on[4]}",
            "8": "{on[8]}", "a sequence, ms": "{sequence:.3g}", "Newton-Schulz, ms": "{newton_schulz:.3g}",
            "besides, ms": "{fixed:.3g}", "link, GB/s": "{bandwidth:.3g}", "shortest message, ms": "{hop:.2g}"}))


if __name__ == "__main__":
    run(main)
