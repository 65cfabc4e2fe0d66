"""Which size for which book and how much time: each size on texts of several lengths, for several lengths of time.

    python tests/bench/bench_sizes.py --texts data/alice data/shakespeare data/library
    python tests/bench/bench_sizes.py --sizes tiny small --minutes 1 4 15

Each cell is a run of train.py by itself with all its defaults and --max-minutes, at its end the loss of the model it
kept, over all of the validation text. Cells that --out holds from an earlier call are not run again.
"""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from report import ROOT, machine_name, picture, publish, run_process
from msgspec import Meta

from dataloader import TokenData, evaluate
from lib.checkpoint import load_model
from lib.cli import flag, parse, run
from lib.files import write_json

COLORS = {"tiny": "#9ecae1", "small": "#4292c6", "base": "#08519c", "medium": "#000000"}


def cell(size: str, folder: Path, minutes: float, out: Path) -> dict:
    """Train, and evaluate what was kept. Raises UserError if train.py fails."""
    out /= f"{folder.name}-{size}-{minutes:g}"
    result = out / "cell.json"
    if result.exists():
        return json.loads(result.read_text())
    seconds = run_process([ROOT / "train.py", size, "--data", folder, "--out", out, f"--max-minutes={minutes}"],
                          out.with_suffix(".txt"))
    records = [json.loads(line) for line in (out / "log.jsonl").open()]
    model, run = load_model(out), json.loads((out / "run.json").read_text())
    data = TokenData(folder, model.config.block_size)
    steps = records[-1]["step"]
    row = {"size": size, "text": folder.name, "bytes": data.meta["train"]["bytes"],
           "megabytes": data.meta["train"]["bytes"] / 1e6, "minutes": minutes,
           "seconds": seconds, "steps": steps, "parameters": model.num_params(),
           "passes": steps * run["flags"]["batch_size"] * run["plan"]["block_size"] / data.tokens["train"],
           "bits_per_byte": evaluate(model, data) * data.bits_per_nat}
    write_json(result, row)
    return row


def plot(rows: list[dict], title: str, path: Path) -> None:
    """A panel a text: bits a byte over minutes, a line a size."""
    texts = list(dict.fromkeys(row["text"] for row in rows))
    with picture(path, title, (3.2 * len(texts), 3.4), (1, len(texts))) as axes:
        for axis, text in zip(axes[0], texts, strict=True):
            of_text = [row for row in rows if row["text"] == text]
            for size in dict.fromkeys(row["size"] for row in of_text):
                found = sorted((row["minutes"], row["bits_per_byte"]) for row in of_text if row["size"] == size)
                axis.plot(*zip(*found, strict=True), "o-", label=size, color=COLORS[size])
            axis.set_xscale("log")
            axis.set_xticks(minutes := sorted({row["minutes"] for row in of_text}), [f"{m:g}" for m in minutes])
            axis.minorticks_off()
            axis.set(title=f"{text}, {of_text[0]['bytes'] / 1e6:.2g} MB", xlabel="minutes")
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel("bits a byte, validation")


@dataclass
class SizesConfig:
    texts: tuple[Path, ...] = flag((Path("data/shakespeare"),), "Folders made by data/prepare.py.")
    sizes: tuple[Literal["tiny", "small", "base", "medium"], ...] = flag(("tiny", "small", "base"), "Models to train.")
    minutes: tuple[Annotated[float, Meta(ge=0.1, le=1e4)], ...] = flag((1.0, 4.0), "Lengths of the runs.")
    out: Path = flag(Path("out/sizes"), "Folder for the models, and for sizes.md, sizes.json and sizes.png.")


def main() -> None:
    config = parse(SizesConfig, "Which size for which book and how much time: a table of real runs.")
    machine, rows = f"{machine_name()}, {torch.get_num_threads()} threads", []
    for minutes, text, size in itertools.product(sorted(config.minutes), config.texts, config.sizes):
        rows.append(cell(size, text, minutes, config.out))
        rows.sort(key=lambda row: (row["bytes"], row["minutes"], row["parameters"]))
        plot(rows, machine, config.out / "sizes.png")
        publish(config.out / "sizes", machine, (rows, {
            "text": "{text}, {megabytes:.2g} MB", "minutes": "{minutes:g}", "size": "{size}", "steps": "{steps:,}",
            "passes": "{passes:.2g}", "bits a byte": "{bits_per_byte:.3f}"}))


if __name__ == "__main__":
    run(main)
