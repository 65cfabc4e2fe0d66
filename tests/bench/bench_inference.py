"""Inference timings, by pytest-benchmark:  python -m pytest tests/bench/bench_inference.py

Prompt, decode and batched decode of each model size, for fp32, torch.ao and owlet, beside what the machine
allows. pytest-benchmark times owlet; the untimed set-up of each of its rounds times the others, so that the
three take turns and a busy moment of the machine hits all alike. Prints a table; out/bench/inference.md,
.json and .png are the same for other readers. Settings: see roofline.py.
"""

import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import roofline
import torch
from torch import Tensor

import int8
from files import atomic_path, write_json
from generate import generate
from model import GPT, SIZES, GPTConfig

ROUNDS = {"tiny": 9, "small": 7, "base": 5, "medium": 3}  # medium in fp32 takes seconds a round
NOISY = 0.1  # spread, as a share of the median, from which a figure is marked
CONTENDERS = {"fp32": "#bdbdbd", "torch.ao": "#9ecae1", "owlet": "#08519c"}
rows: list[dict] = []


@dataclass
class Phase:
    batch: int
    prompt: int
    new: int  # tokens timed after the prompt; 0: the prompt itself is

    def fit(self, config: GPTConfig) -> "Phase":
        prompt = min(self.prompt, config.block_size)
        return Phase(self.batch, prompt, min(self.new, config.block_size - prompt))

    def start(self, model: GPT) -> Iterator[Tensor]:
        """A generation that has only what is timed before it."""
        prompt = torch.randint(0, model.config.vocab_size, (self.batch, self.prompt))
        stream = generate(model, prompt, self.new + 1, temperature=0)
        if self.new:
            next(stream)  # the prompt, and the token that follows
        return stream


PHASES = {"prompt": Phase(1, 512, 0), "decode": Phase(1, 32, 200), "batch 16": Phase(16, 32, 16)}


@pytest.fixture(scope="module", params=roofline.sizes("tiny,small,base,medium"))
def models(request: pytest.FixtureRequest) -> dict[str, GPT]:
    torch.manual_seed(0)
    vocab = roofline.GPT2_VOCAB if request.param == "medium" else 256  # the others are character models
    fp32 = GPT(GPTConfig(vocab, **SIZES[request.param])).eval().requires_grad_(False)
    for parameter in fp32.parameters():  # speed does not depend on their values, but for zeros
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    return {"fp32": fp32, "torch.ao": int8.torch_ao(fp32), "owlet": int8.quantize(fp32, "owlet")}


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if rows:
        publish(request)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("threads", roofline.THREADS)
def bench_inference(benchmark, request, models, threads, phase):
    size, work = request.node.callspec.params["models"], PHASES[phase].fit(models["fp32"].config)
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

    # int8 bytes; the embedding is the head, or else a row of it a token, which is nothing
    layers = sum(weight.numel() for weight in models["fp32"].model.layers.parameters() if weight.dim() == 2)
    head = models["fp32"].lm_head.weight.numel()
    limits = roofline.Limits(layers + head, threads)
    for model in models.values():
        list(itertools.islice(work.start(model), 3))  # warms up
    benchmark.pedantic(list, setup=others, rounds=ROUNDS[size])
    seconds["owlet"] = benchmark.stats.stats.data
    limits.probe()

    if work.new:
        tokens = work.batch * work.new
        operations = 2 * tokens * (layers + head)
    else:
        tokens = work.prompt
        operations = 2 * (tokens * layers + head)  # only the last token's logits are wanted
    median = {name: statistics.median(times) for name, times in seconds.items()}
    benchmark.extra_info |= {
        "size": size, "phase": phase, "threads": threads, "tokens": tokens,
        "tokens_per_second": {name: tokens / median[name] for name in median},
        "spread": {name: spread(times) for name, times in seconds.items()},
        **limits.figures(median["owlet"], max(work.new, 1), operations)}
    rows.append(benchmark.extra_info)


def spread(times: list[float]) -> float:
    """The middle half of the rounds, as a share of the median."""
    low, median, high = statistics.quantiles(times, method="inclusive")
    return (high - low) / median


# ---------------------------------------------------------------- what the reader sees

def publish(request: pytest.FixtureRequest) -> None:
    rows.sort(key=lambda row: list(PHASES).index(row["phase"]))  # stable: sizes stay in order
    header = ["phase", "size", "threads", *(f"{name} tok/s" for name in CONTENDERS), "torch.ao / fp32", "owlet / fp32",
              "owlet GB/s", "owlet GOP/s", "limit tok/s", "limited by", "of limit"]
    note = ("Medians of rounds that take turns; ~ marks those whose middle half spreads over more than "
            f"{NOISY:.0%}. The limit is the time to read the int8 weights, or to multiply by them, at the speeds "
            "probed before and after; attention, norms and sampling come on top.")
    roofline.publish(request, "inference.md", header, [cells(row) for row in rows], note)
    write_json(roofline.OUT / "inference.json", roofline.machine() | {"rows": rows})
    draw()


def cells(row: dict) -> list[str]:
    speeds = row["tokens_per_second"]
    return [row["phase"], row["size"], str(row["threads"]),
            *(("~" if row["spread"][name] > NOISY else "") + f"{speeds[name]:,.0f}" for name in CONTENDERS),
            *(f"{speeds[name] / speeds['fp32']:.2f}" for name in ("torch.ao", "owlet")),
            f"{row['gigabytes_per_second']:.1f}", f"{row['gigaops_per_second']:,.0f}",
            f"{row['tokens'] / row['limit_seconds']:,.0f}", row["limited_by"], f"{row['share_of_limit']:.0%}"]


def draw() -> None:
    """Speeds by size, a panel for each phase and number of threads; a black line over owlet's bar is its limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(roofline.THREADS), len(PHASES), squeeze=False, sharex=True, sharey="col",
                                figsize=(5 * len(PHASES), 3.2 * len(roofline.THREADS)), layout="constrained")
    for (threads, phase), axis in zip(itertools.product(roofline.THREADS, PHASES), axes.flat, strict=True):
        shown = [row for row in rows if (row["threads"], row["phase"]) == (threads, phase)]
        for i, (name, color) in enumerate(CONTENDERS.items()):
            bars = axis.bar([at + (i - 1) * 0.27 for at in range(len(shown))],
                            [row["tokens_per_second"][name] for row in shown], width=0.25, color=color, label=name)
            inside = {"label_type": "center", "rotation": 90, "color": "white"}  # clear of the limit's line
            axis.bar_label(bars, fmt="{:,.0f}", fontsize=6.5, **inside if name == "owlet" else {})
        axis.hlines([row["tokens"] / row["limit_seconds"] for row in shown],
                    [at + 0.27 - 0.14 for at in range(len(shown))], [at + 0.27 + 0.14 for at in range(len(shown))],
                    color="black", label="owlet's limit")
        axis.set_yscale("log")
        axis.set_xticks(range(len(shown)), [row["size"] for row in shown])
        axis.set_title(f"{phase}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[0]:  # shared by the column, and only now that all is drawn: it ends the automatic scale
        axis.set_ylim(bottom=10)
    for axis in axes[:, 0]:
        axis.set_ylabel("tokens/s")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{roofline.machine()['cpu']}, {roofline.machine()['isa']}")
    with atomic_path(roofline.OUT / "inference.png") as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
