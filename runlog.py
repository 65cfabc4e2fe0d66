"""What a run leaves to look at: log.jsonl, TensorBoard events under runs/, and loss.png.

None of them may end a run: what cannot be read or written is a note.
"""

import contextlib
import json
import math
from pathlib import Path

from cli import UserError, note, optional

from files import checked, plain_file, write_text

Record = dict[str, float]


class RunLog:
    """One record a line in log.jsonl: {"step": ..., "train_loss": ...} or {"step": ..., "val_loss": ...}."""

    def __init__(self, folder: Path, step: int, bits_per_nat: float, title: str) -> None:
        self.path, self.bits_per_nat, self.title = folder / "log.jsonl", bits_per_nat, title
        self.records: list[Record] = []  # of the steps before the resume
        self.picture = self.board = None
        with optional(self.path):
            if self.path.exists():
                self.records = [record for record in read_records(self.path) if record["step"] <= step]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        # imported now, not with the first picture: from here on the memory of the process stays as it is
        with optional(folder / "loss.png"):
            import picture
            self.picture = picture
        with optional(folder / "runs"):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(folder / "runs", purge_step=step)

    def add(self, **record: float) -> None:
        self.records.append(record)
        with optional(self.path), plain_file(self.path, "the log of a run").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self.board is not None:
            with optional(self.board.log_dir):
                for name, value in record.items():
                    if name != "step":
                        self.board.add_scalar(name, value, record["step"])
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
        if self.picture is None:
            return
        path = self.path.with_name("loss.png")
        with optional(path):
            figure = self.picture.new_figure(8, 4.5)
            axes = figure.subplots()
            for name, style in {"train": {"color": "#9ecae1", "lw": 1},
                                "val": {"color": "#08519c", "marker": "o", "ms": 4}}.items():
                points = [(r["step"], r[loss] * self.bits_per_nat) for r in self.records
                          if (loss := f"{name}_loss") in r]
                if points:
                    axes.plot(*zip(*points, strict=True), label=f"{name} ({points[-1][1]:.3f})", **style)
            axes.set(title=self.title, xlabel="step", ylabel="bits per byte")
            axes.grid(alpha=0.3)
            axes.legend()
            self.picture.save(figure, path)


def read_records(path: Path) -> list[Record]:
    """The lines of log.jsonl that are records; a killed run may leave half a line, and a note names the others."""
    records, lines = [], plain_file(path, "the log of a run", 1e9).read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        with contextlib.suppress(ValueError, UserError, RecursionError):
            record = json.loads(line)
            checked(record, Record, path)
            if record.keys() >= {"step"} and all(map(math.isfinite, record.values())):
                records.append(record)
                continue
        note(f"{path}: line {number} is no record; going on without it")
    return records
