"""Times inference with pytest-benchmark:  python -m pytest tests/bench/bench_inference.py

Prompt, decoding and batched decoding for each model size by fp32, torch.ao and owlet, beside what the machine allows.
pytest-benchmark times owlet. The untimed set-up of each of its rounds times the others, so that the three take turns
and a busy moment of the machine slows all of them. The table is printed and left in out/bench/ with a .json and a
picture of it. report.py says how to choose sizes and threads.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from probe import Limits, int8_machine
from report import GPT2_VOCAB, OUT, THREADS, picture, publish, random_model, sizes, table, uncaptured
from torch import Tensor

import int8
from generate import generate
from model import GPT, GPTConfig

ROUNDS = {"tiny": 9, "small": 7, "base": 5, "medium": 3}  # medium in fp32 takes seconds a round
NOISY = 0.1  # spread, as a share of the median, from which a figure is marked
ENGINES = {"fp32": "#bdbdbd", "torch.ao": "#9ecae1", "owlet": "#08519c"}
rows: list[dict] = []


@dataclass
class Phase:
    batch: int
    prompt: int
    new: int  # tokens timed after the prompt; 0: the prompt is timed

    def fit(self, config: GPTConfig) -> "Phase":
        prompt = min(self.prompt, config.block_size)
        return Phase(self.batch, prompt, min(self.new, config.block_size - prompt))

    def start(self, model: GPT) -> Iterator[Tensor]:
        """A generation of which only what is timed is left to do."""
        prompt = torch.randint(0, model.config.vocab_size, (self.batch, self.prompt))
        stream = generate(model, prompt, self.new + 1, temperature=0)
        if self.new:
            next(stream)  # the prompt and the first token
        return stream


PHASES = {"prompt": Phase(1, 512, 0), "decode": Phase(1, 32, 200), "batch 16": Phase(16, 32, 16)}


@pytest.fixture(scope="module", params=sizes("tiny,small,base,medium"))
def models(request: pytest.FixtureRequest) -> dict[str, GPT]:
    fp32 = random_model(request.param, GPT2_VOCAB if request.param == "medium" else 256)
    return {"fp32": fp32, "torch.ao": int8.torch_ao(fp32), "owlet": int8.quantize(fp32, "owlet")}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("threads", THREADS)
def bench_inference(benchmark, request, models, threads, phase):
    config = models["fp32"].config
    size, work = request.node.callspec.params["models"], PHASES[phase].fit(config)
    benchmark.group = f"{size} {phase}, {threads} threads"
    torch.set_num_threads(threads)
    seconds = {name: [] for name in models}

    def others():
        for name in ("fp32", "torch.ao"):
            stream = work.start(models[name])
            start = time.perf_counter()
            list(stream)
            seconds[name].append(time.perf_counter() - start)
        return (work.start(models["owlet"]),), {}

    # bytes of int8; the embedding is the head
    *layers, head = (N * K for N, K in int8.matrix_shapes(config))
    limits = Limits(sum(layers) + head, threads)
    for model in models.values():
        list(itertools.islice(work.start(model), 3))  # warm-up
    benchmark.pedantic(list, setup=others, rounds=ROUNDS[size])
    seconds["owlet"] = benchmark.stats.stats.data
    limits.probe()

    tokens = work.batch * work.new or work.prompt
    operations = 2 * (tokens * sum(layers) + (tokens if work.new else 1) * head)  # a prompt needs its last logits only
    median = {name: statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info |= {
        "size": size, "phase": phase, "threads": threads, "tokens": tokens,
        "tokens_per_second": {name: tokens / median[name] for name in median},
        "spread": {name: middle_half(times) for name, times in seconds.items()},
        **limits.figures(median["owlet"], max(work.new, 1), operations)}
    rows.append(benchmark.extra_info)


def middle_half(times: list[float]) -> float:
    """How far the middle half of the rounds spreads, as a share of the median."""
    low, median, high = statistics.quantiles(times, method="inclusive")
    return (high - low) / median


# ---------------------------------------------------------------- report

@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if not rows:
        return
    rows.sort(key=lambda row: list(PHASES).index(row["phase"]))  # stable: sizes stay in order
    header = ["phase", "size", "threads", *(f"{name} tok/s" for name in ENGINES), "torch.ao / fp32", "owlet / fp32",
              "owlet GB/s", "owlet GOP/s", "limit tok/s", "limited by", "of limit"]
    note = ("Medians of rounds that take turns; ~ marks those whose middle half spreads over more than "
            f"{NOISY:.0%}. The limit is the time to read the int8 weights or to multiply by them, whichever is longer, "
            "at the speeds probed before and after; attention, norms and sampling come on top.")
    machine = int8_machine()
    plot(machine.split(";")[0])
    with uncaptured(request):
        publish(OUT / "inference", f"{table(header, [cells(row) for row in rows])}\n\n{note} {machine}.",
                {"machine": machine, "rows": rows})


def cells(row: dict) -> list[str]:
    speeds = row["tokens_per_second"]
    return [row["phase"], row["size"], str(row["threads"]),
            *(("~" if row["spread"][name] > NOISY else "") + f"{speeds[name]:,.0f}" for name in ENGINES),
            *(f"{speeds[name] / speeds['fp32']:.2f}" for name in ("torch.ao", "owlet")),
            f"{row['gigabytes_per_second']:.1f}", f"{row['gigaops_per_second']:,.0f}",
            f"{row['tokens'] / row['limit_seconds']:,.0f}", row["limited_by"], f"{row['share_of_limit']:.0%}"]


def plot(title: str) -> None:
    """Speeds by size, a panel for each phase and number of threads. A black line above owlet's bar is its limit."""
    shape = len(THREADS), len(PHASES)
    with picture(OUT / "inference.png", title, (15, 3.2 * len(THREADS)), shape, sharex=True, sharey="col") as axes:
        for (threads, phase), axis in zip(itertools.product(THREADS, PHASES), axes.flat, strict=True):
            shown = [row for row in rows if (row["threads"], row["phase"]) == (threads, phase)]
            for i, (name, color) in enumerate(ENGINES.items()):
                bars = axis.bar([at + (i - 1) * 0.27 for at in range(len(shown))],
                                [row["tokens_per_second"][name] for row in shown], width=0.25, color=color, label=name)
                inside = {"label_type": "center", "rotation": 90, "color": "white"}  # clear of the limit's line
                axis.bar_label(bars, fmt="{:,.0f}", fontsize=6.5, **inside if name == "owlet" else {})
            axis.hlines([row["tokens"] / row["limit_seconds"] for row in shown],
                        [at + 0.13 for at in range(len(shown))], [at + 0.41 for at in range(len(shown))],
                        color="black", label="owlet's limit")
            axis.set_xticks(range(len(shown)), [row["size"] for row in shown])
            axis.set_title(f"{phase}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
            axis.set(yscale="log", ylabel="tokens/s")
        for axis in axes[0]:  # shared by the column; setting it ends the automatic scale, so it comes last
            axis.set_ylim(bottom=10)
