"""owlet's training beside that of a plain GPT-2: how long until the loss is the same.

    python tests/bench/bench_loss.py                       on the newest folder under data/, made with --vocab-size 256
    python tests/bench/bench_loss.py --data data/mybook --steps 300 600

A contender is a process, timed from its start to its end: importing, evaluating and saving are paid for. They take
turns (A B C A B C ...), so that a slow minute of the machine is everybody's, and each round has a seed of its own.
The losses compared are of the models saved, over all of the validation text, computed by the same code for all.
"""

import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_model as load_weights
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

import gpt2

from checkpoint import load_model
from cli import UserError, parse, run
from dataloader import TokenData, evaluate
from files import atomic_path, newest, write_json
from machine import cpu_name

ROOT = Path(__file__).resolve().parents[2]
LEARNING_RATES = {"GPT-2, as published": 1e-3, "GPT-2, learning rate tuned": 3e-3}
# The baseline's shape of batch, and as many tokens an evaluation as it looks at in both splits.
SHAPE = ["--block-size", gpt2.BLOCK, "--batch-size", gpt2.BATCH, "--eval-every", gpt2.EVAL_EVERY,
         "--eval-tokens", 2 * gpt2.EVAL_BATCHES * gpt2.BATCH * gpt2.BLOCK]


@dataclass
class Contender:
    name: str
    steps: int
    learning_rate: float | None = None  # of a baseline

    def train(self, data: Path, out: Path, seed: int) -> float:
        """Train in a process of its own; returns its seconds. Raises UserError where it fails."""
        if self.learning_rate is None:
            command = ["train.py", "tiny", "--data", data, "--out", out, "--seed", seed, "--max-steps", self.steps,
                       *SHAPE]
        else:
            command = ["tests/bench/gpt2.py", data, out, self.learning_rate, seed]
        shutil.rmtree(out, ignore_errors=True)  # an earlier contest's
        out.mkdir(parents=True)
        with (out / "said.txt").open("w") as said:
            start = time.perf_counter()
            done = subprocess.run([sys.executable, ROOT / command[0], *map(str, command[1:])],
                                  stdout=said, stderr=subprocess.STDOUT)
            seconds = time.perf_counter() - start
        if done.returncode:
            raise UserError(f"{self.name}: ended with {done.returncode}; what it said is in {out}/said.txt")
        return seconds

    def load(self, data: TokenData, out: Path) -> torch.nn.Module:
        if self.learning_rate is None:
            return load_model(out)
        model = gpt2.GPT2(data.meta["vocab_size"])
        load_weights(model, out / "model.safetensors")
        return model


def contest(contenders: list[Contender], folder: Path, out: Path, repeats: int) -> list[dict]:
    """A row a contender: its parameters, its steps, and of each repeat its seconds and its loss in nats."""
    data = TokenData(folder, gpt2.BLOCK)
    rows = [{"name": c.name, "steps": c.steps, "seconds": [], "loss": []} for c in contenders]
    bar = tqdm(total=repeats * len(contenders), disable=None, leave=False)
    for seed in range(1, repeats + 1):
        for contender, row in zip(contenders, rows, strict=True):
            bar.set_description(f"{contender.name}, {contender.steps} steps")
            run_out = out / f"{contender.name.replace(', ', '-').replace(' ', '-')}-{contender.steps}-{seed}"
            row["seconds"].append(contender.train(folder, run_out, seed))
            model = contender.load(data, run_out)
            row["parameters"] = sum(p.numel() for p in model.parameters())
            row["loss"].append(evaluate(model, data))
            bar.update()
    bar.close()
    return rows


def medians(row: dict) -> tuple[float, float]:
    return statistics.median(row["seconds"]), statistics.median(row["loss"])


def table(rows: list[dict]) -> str:
    """Medians as a Markdown table; losses with the lowest and highest of the repeats, times also as shares."""
    baselines = rows[:len(LEARNING_RATES)]
    shares = " | ".join(f"of {row['name']}" for row in baselines)
    lines = [f"| | parameters | steps | validation loss, nats | seconds | {shares} |",
             f"|---|--:|--:|--:|--:|{'--:|' * len(baselines)}"]
    for row in rows:
        seconds, loss = medians(row)
        shares = [f"{seconds / medians(baseline)[0]:.2f}" for baseline in baselines]
        lines.append(f"| {row['name']} | {row['parameters']:,} | {row['steps']:,} | {loss:.3f} ({min(row['loss']):.3f} "
                     f"to {max(row['loss']):.3f}) | {seconds:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def draw(rows: list[dict], title: str, path: Path) -> None:
    """Every run a point, seconds across and loss up; a line where each baseline ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, row in enumerate(rows):
        axes.plot(row["seconds"], row["loss"], "o", label=f"{row['name']}, {row['steps']:,} steps")
        if i < len(LEARNING_RATES):
            axes.axhline(medians(row)[1], color=f"C{i}", lw=0.8, ls="--", zorder=0)
    axes.set(title=title, xlabel="seconds, everything counted", ylabel="validation loss, nats", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


# ---------------------------------------------------------------- command line

@dataclass
class LossConfig:
    data: Path | None = None
    """Folder made by data/prepare.py; default: the newest under data/."""
    steps: tuple[int, ...] = (210, 460, 2000)
    """owlet's runs; the first two reach the losses of the two baselines on tinyshakespeare."""
    repeats: int = 3
    """Rounds, each with another seed."""
    out: Path = Path("out/loss")
    """Folder for the models, and for loss.json and loss.png."""


def main() -> None:
    config = parse(LossConfig, "owlet's training beside that of a plain GPT-2: how long until the loss is the same.")
    for flag, values in (("steps", config.steps), ("repeats", [config.repeats])):
        if not values or min(values) < 1:
            raise UserError(f"--{flag}: expected 1 or more, got {' '.join(map(str, values)) or 'nothing'}")
    folder = config.data or newest(Path("data"), "meta.json", "python data/prepare.py")[0]
    contenders = [Contender(name, gpt2.STEPS, rate) for name, rate in LEARNING_RATES.items()]
    contenders += [Contender("owlet tiny", steps) for steps in config.steps]
    rows = contest(contenders, folder, config.out, config.repeats)
    machine = f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(table(rows))
    write_json(config.out / "loss.json", {"machine": machine, "data": str(folder), "rows": rows})
    draw(rows, f"{folder.name}, {gpt2.BATCH} x {gpt2.BLOCK} tokens a step", config.out / "loss.png")
    print(f"{machine}; {config.repeats} rounds, medians; also in {config.out}/loss.json and .png")


if __name__ == "__main__":
    run(main)
