"""What a run leaves to look at: log.jsonl, TensorBoard events under runs/, loss.png. What fails of it is a note."""

import json
from pathlib import Path
from typing import Required, TypedDict, Unpack

import msgspec

from lib.cli import UserError, note, optional
from lib.files import checked, regular_file, write_text


class Record(TypedDict, total=False):
    step: Required[int]
    train_loss: float  # in nats a token
    val_loss: float
    val_bits_per_byte: float
    lr_scale: float
    tokens_per_second: float
    sample: str  # text that the model wrote


class RunLog:
    """One record a line in log.jsonl: {"step": ..., "train_loss": ...} or {"step": ..., "val_loss": ...}."""

    def __init__(self, folder: Path, step: int, bits_per_nat: float, epoch_steps: float, title: str) -> None:
        self.path, self.bits_per_nat, self.title, self.board = folder / "log.jsonl", bits_per_nat, title, None
        self.epoch_steps = epoch_steps  # steps that read the text once
        self.records: list[Record] = []  # after a resume, also those of the steps before
        with optional(self.path):
            self.records = [record for record in read_records(self.path) if record["step"] <= step > 0]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        with optional(folder / "runs"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder / "runs", purge_step=step + 1)  # hides earlier events from there on

    def add(self, **record: Unpack[Record]) -> None:
        self.records.append(record)
        with optional(self.path), regular_file(self.path, "the log of a run").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            with optional(self.board.log_dir):
                for name in record.keys() - {"step"}:
                    add = self.board.add_text if name == "sample" else self.board.add_scalar
                    add(name, record[name], record["step"])
                self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            with optional(self.board.log_dir):
                self.board.close()

    def curve(self, width: int = 40) -> str:
        """The validation losses as a line of text: ▇▅▃▂▁."""
        values = [r["val_loss"] for r in self.records if "val_loss" in r][-width:]
        low, high = min(values), max(values)
        return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)

    def plot(self) -> None:
        """loss.png: training and validation loss in bits per byte against steps."""
        with optional(path := self.path.with_name("loss.png")):
            from lib import picture
            figure = picture.new_figure(8, 4.5)
            axes = figure.subplots()
            for loss, style in {"train_loss": {"color": "#9ecae1", "lw": 1},
                                "val_loss": {"color": "#08519c", "marker": "o", "ms": 4}}.items():
                points = [(r["step"], r[loss] * self.bits_per_nat) for r in self.records if loss in r]
                if points:
                    label = f"{loss.removesuffix('_loss')} ({points[-1][1]:.3f})"
                    axes.plot(*zip(*points, strict=True), label=label, **style)
            if evaluated := [(bits, step) for step, bits in points if step]:  # the points of val_loss
                kept = min(evaluated)[1]
                axes.axvline(kept, color="#08519c", lw=0.8, ls=":", label=f"kept: step {kept:,}")
            axes.set(title=self.title, xlabel="step", ylabel="bits per byte")
            passes = axes.secondary_xaxis("top", (lambda step: step / self.epoch_steps, lambda n: n * self.epoch_steps))
            passes.set_xlabel("passes through the text")
            axes.grid(alpha=0.3)
            axes.legend()
            picture.save(figure, path)


def read_records(path: Path) -> list[Record]:
    """The lines of log.jsonl that are records; a killed run may leave half a line, and a note names the others."""
    records = []
    lines = regular_file(path, "the log of a run", 1e9).read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            records.append(checked(msgspec.json.decode(line), Record, path))
        except (ValueError, RecursionError, UserError):
            note(f"{path}: line {number} is no record; going on without it")
    return records
