"""owlet's training beside that of a plain GPT-2: how long until the loss is the same.

    python tests/bench/bench_loss.py                 on the newest folder under data/, made with --vocab-size 256
    python tests/bench/bench_loss.py --data data/mybook --steps 300 600

Each run is a process, timed from its start to its end, so importing, evaluating and saving count. The recipes take
turns, and each round has another seed. The losses compared are those of the saved models over all of the validation
text, computed by the same code for all.
"""

import shutil
import statistics
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gpt2
import torch
from report import ROOT, machine_name, picture, publish, run_process, take_turns
from safetensors.torch import load_model as load_weights

from dataloader import TokenData, evaluate
from lib.checkpoint import load_model
from lib.cli import Count, flag, parse, run
from lib.files import newest

BASELINES = {"GPT-2, as published": 1e-3, "GPT-2, learning rate tuned": 3e-3}  # learning rates
# The baseline's shape of batch, and as many tokens an evaluation as the baseline reads of both splits.
SHAPE = ["--block-size", gpt2.BLOCK, "--batch-size", gpt2.BATCH, "--eval-every", gpt2.EVAL_EVERY,
         "--eval-tokens", 2 * gpt2.EVAL_BATCHES * gpt2.BATCH * gpt2.BLOCK]


@dataclass
class Recipe:
    """A way to train, and what each of its runs came to."""

    name: str
    steps: int
    learning_rate: float | None = None  # a baseline's; owlet has its own
    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # in nats

    def run(self, data: TokenData, out: Path) -> None:
        """Train in a process of its own, then evaluate. Raises UserError if the process fails."""
        seed = len(self.seconds) + 1
        out /= f"{self.name.replace(', ', '-').replace(' ', '-')}-{self.steps}-{seed}"
        shutil.rmtree(out, ignore_errors=True)  # from an earlier benchmark
        if self.learning_rate is None:
            command = [ROOT / "train.py", "tiny", "--data", data.folder, "--out", out, "--seed", seed,
                       "--max-steps", self.steps, *SHAPE]
        else:
            command = [ROOT / "tests/bench/gpt2.py", data.folder, out, self.learning_rate, seed]
        self.seconds.append(run_process(command, out / "output.txt"))
        model = self.load(data, out)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.loss.append(evaluate(model, data))

    def load(self, data: TokenData, out: Path) -> torch.nn.Module:
        if self.learning_rate is None:
            return load_model(out)
        model = gpt2.GPT2(data.meta["vocab_size"])
        load_weights(model, out / "model.safetensors")
        return model


# ---------------------------------------------------------------- report

def loss_rows(recipes: list[Recipe]) -> list[dict]:
    """Medians; losses with the lowest and the highest, times also as shares of each baseline's."""
    seconds = [statistics.median(recipe.seconds) for recipe in recipes]
    return [{"name": recipe.name, "parameters": recipe.parameters, "steps": recipe.steps, "seconds": median,
             "loss": statistics.median(recipe.loss), "low": min(recipe.loss), "high": max(recipe.loss),
             "of_published": median / seconds[0], "of_tuned": median / seconds[1]}
            for recipe, median in zip(recipes, seconds, strict=True)]


def plot(recipes: list[Recipe], title: str, path: Path) -> None:
    """Each run as a point, seconds across and loss up; a dashed line at each baseline's median loss."""
    with picture(path, title, (8, 5)) as [[axis]]:
        for i, recipe in enumerate(recipes):
            axis.plot(recipe.seconds, recipe.loss, "o", label=f"{recipe.name}, {recipe.steps:,} steps")
            if recipe.learning_rate:
                axis.axhline(statistics.median(recipe.loss), color=f"C{i}", lw=0.8, ls="--", zorder=0)
        axis.set(xlabel="seconds, everything counted", ylabel="validation loss, nats", xlim=(0, None))
        axis.grid(alpha=0.3)


# ---------------------------------------------------------------- command line

@dataclass
class LossConfig:
    data: Path | None = flag(None, "Folder made by data/prepare.py; default: the newest under data/.")
    steps: tuple[Count, ...] = flag(
        (160, 340, 2000), "Steps of owlet's runs; the first two reach the baselines' losses on tinyshakespeare.")
    repeats: Count = flag(3, "Rounds, each with another seed.")
    out: Path = flag(Path("out/loss"), "Folder for the models, and for loss.md, loss.json and loss.png.")


def main() -> None:
    config = parse(LossConfig, "owlet's training beside that of a plain GPT-2: how long until the loss is the same.")
    data = TokenData(config.data or newest(Path("data"), "meta.json", "python data/prepare.py")[0], gpt2.BLOCK)
    recipes = [Recipe(name, gpt2.STEPS, rate) for name, rate in BASELINES.items()]
    recipes += [Recipe("owlet tiny", steps) for steps in config.steps]
    calls = {i: partial(recipe.run, data, config.out) for i, recipe in enumerate(recipes)}
    take_turns(calls, config.repeats, warmup=0)
    plot(recipes, f"{data.folder.name}, {gpt2.BATCH} x {gpt2.BLOCK} tokens a step", config.out / "loss.png")
    note = f"{machine_name()}, {torch.get_num_threads()} threads; medians of {config.repeats} rounds"
    publish(config.out / "loss", note, (loss_rows(recipes), {
        "": "{name}", "parameters": "{parameters:,}", "steps": "{steps:,}",
        "validation loss, nats": "{loss:.3f} ({low:.3f} to {high:.3f})", "seconds": "{seconds:.1f}",
        "of the published": "{of_published:.2f}", "of the tuned": "{of_tuned:.2f}"}))


if __name__ == "__main__":
    run(main)
