"""Times inference with pytest-benchmark:  python -m pytest tests/bench/bench_inference.py

Prompt, decoding and batched decoding for each model size by fp32, torch.ao and owlet, beside what the machine allows.
pytest-benchmark times owlet. The untimed set-up of each of its rounds times the others, so that the three take turns
and a busy moment of the machine slows all of them. The table is printed and left in out/bench/ with a .json and a
picture of it. report.py says how to choose sizes and threads.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from report import GPT2_VOCAB, OUT, THREADS, matrix_sizes, picture, publish, random_model, sizes, summary, uncaptured
from probe import LIMIT, Limits, int8_machine
from torch import Tensor

import int8
from generate import generate
from model import GPT

ROUNDS = {"tiny": 9, "small": 7, "base": 5, "medium": 3}  # medium in fp32 takes seconds a round
ENGINES = {"fp32": "#bdbdbd", "torch.ao": "#9ecae1", "owlet": "#08519c"}
rows: list[dict] = []


@dataclass
class Phase:
    batch: int
    prompt: int
    new: int  # tokens timed after the prompt; 0: the prompt is timed
    guesses: bool = False  # owlet guesses, in a text of random tokens, so that hardly any is right

    def start(self, model: GPT) -> Iterator[Tensor]:
        """A generation of which only what is timed is left to do."""
        prompt = torch.randint(0, model.config.vocab_size, (self.batch, self.prompt))
        stream = generate(model, prompt, self.new + 1, temperature=float(self.guesses), most_guesses=8 * self.guesses)
        if self.new:
            next(stream)  # the prompt and the first token
        return stream


def phases(block: int) -> dict[str, Phase]:
    """What is timed of a model whose context is `block` tokens."""
    last, new = min(128, block // 2), min(200, block - 32)
    return {"prompt": Phase(1, min(512, block), 0), "decode": Phase(1, 32, new),
            "decode, full context": Phase(1, block - last, last), "batch 16": Phase(16, 32, 16),
            "decode, guessing in vain": Phase(1, 32, new, guesses=True)}


PHASES = list(phases(1024))


@pytest.fixture(scope="module", params=sizes("tiny,small,base,medium"))
def models(request: pytest.FixtureRequest) -> dict[str, GPT]:
    fp32 = random_model(request.param, GPT2_VOCAB if request.param == "medium" else 256)
    return {"fp32": fp32, "torch.ao": int8.torch_ao(fp32), "owlet": int8.quantize(fp32, "owlet")}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("threads", THREADS)
def bench_inference(benchmark, request, models, threads, phase):
    config = models["fp32"].config
    size, work = request.node.callspec.params["models"], phases(config.block_size)[phase]
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

    layers, head = matrix_sizes(config)
    limits = Limits(layers + head, threads)  # a byte a weight; the embedding is the head
    for model in models.values():
        list(itertools.islice(work.start(model), 3))  # warm-up
    benchmark.pedantic(list, setup=others, rounds=ROUNDS[size])
    if benchmark.disabled:  # it ran once, untimed
        return
    seconds["owlet"] = benchmark.stats.stats.data
    limits.probe()

    tokens = work.batch * work.new or work.prompt
    operations = 2 * (tokens * layers + (tokens if work.new else 1) * head)  # a prompt needs its last logits only
    speed = {name: summary([tokens / value for value in values]) for name, values in seconds.items()}
    figures = limits.figures(tokens / speed["owlet"]["median"], max(work.new, 1), operations)
    benchmark.extra_info |= {
        "size": size, "phase": phase, "threads": threads, "speed": speed, **figures,
        "speed_up": {name: speed[name]["median"] / speed["fp32"]["median"] for name in ENGINES},
        "limit": tokens / figures["limit_seconds"]}
    rows.append(benchmark.extra_info)


# ---------------------------------------------------------------- report

@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if not rows:
        return
    rows.sort(key=lambda row: PHASES.index(row["phase"]))  # stable: sizes stay in order
    machine = int8_machine()
    plot(machine.split(";")[0])
    note = ("Medians of rounds that take turns, and how far the farthest round is from them. "
            f"The limit is {LIMIT} before and after; attention, norms and sampling come on top. {machine}.")
    speeds = {f"{name} tok/s": f"{{speed[{name}][median]:,.0f}} ±{{speed[{name}][spread]:.0%}}" for name in ENGINES}
    with uncaptured(request):
        publish(OUT / "inference", note, (rows, {
            "phase": "{phase}", "size": "{size}", "threads": "{threads}", **speeds,
            "torch.ao / fp32": "{speed_up[torch.ao]:.2f}", "owlet / fp32": "{speed_up[owlet]:.2f}",
            "owlet GB/s": "{gigabytes_per_second:.1f}", "owlet GOP/s": "{gigaops_per_second:,.0f}",
            "limit tok/s": "{limit:,.0f}", "limited by": "{limited_by}", "of limit": "{share_of_limit:.0%}"}))


def plot(title: str) -> None:
    """Speeds by size, a panel for each phase and number of threads. A black line above owlet's bar is its limit."""
    shape = len(THREADS), len(PHASES)
    with picture(OUT / "inference.png", title, (15, 3.2 * len(THREADS)), shape, sharex=True, sharey="col") as axes:
        for (threads, phase), axis in zip(itertools.product(THREADS, PHASES), axes.flat, strict=True):
            shown = [row for row in rows if (row["threads"], row["phase"]) == (threads, phase)]
            for i, (name, color) in enumerate(ENGINES.items()):
                bars = axis.bar([at + (i - 1) * 0.27 for at in range(len(shown))],
                                [row["speed"][name]["median"] for row in shown], width=0.25, color=color, label=name)
                inside = {"label_type": "center", "color": "white"}  # clear of the limit's line
                axis.bar_label(bars, fmt="{:,.0f}", fontsize=6.5, rotation=90,
                               **inside if name == "owlet" else {"padding": 2})
            axis.hlines([row["limit"] for row in shown],
                        [at + 0.13 for at in range(len(shown))], [at + 0.41 for at in range(len(shown))],
                        color="black", label="owlet's limit")
            axis.set_xticks(range(len(shown)), [row["size"] for row in shown])
            axis.set_title(f"{phase}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
            axis.set(yscale="log", ylabel="tokens/s")
            axis.yaxis.set_major_formatter("{x:,.0f}")
        for axis in axes[0]:  # shared by the column; setting it ends the automatic scale, so it comes last
            axis.set_ylim(bottom=10)
