"""What a run leaves to look at: log.jsonl, TensorBoard events under runs/, and loss.png."""

import contextlib
import json
from functools import partial
from pathlib import Path

from files import atomic_path, write_text


class RunLog:
    """One record a line in log.jsonl: {"step": ..., "train_loss": ...} or {"step": ..., "val_loss": ...}."""

    def __init__(self, folder: Path, step: int, bits_per_nat: float, title: str) -> None:
        # imported now, not with the first picture: from here on the memory of the process stays as it is
        from matplotlib.figure import Figure
        from torch.utils.tensorboard import SummaryWriter

        self.new_figure = partial(Figure, figsize=(8, 4.5), layout="constrained")
        self.path, self.bits_per_nat, self.title = folder / "log.jsonl", bits_per_nat, title
        self.records = []  # of the steps before the resume
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):  # a line that a killed run left half-written
                self.records += [record for record in [json.loads(line)] if record["step"] <= step]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        self.board = SummaryWriter(folder / "runs", purge_step=step)

    def add(self, **record: float) -> None:
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            if name != "step":
                self.board.add_scalar(name, value, record["step"])
        self.board.flush()

    def curve(self, width: int = 40) -> str:
        """The validation losses as a line of text: ▇▅▃▂▁."""
        values = [r["val_loss"] for r in self.records if "val_loss" in r][-width:]
        low, high = min(values), max(values)
        return "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / (high - low or 1))] for v in values)

    def plot(self) -> None:
        """loss.png: training and validation loss in bits per byte against steps."""
        figure = self.new_figure()
        axes = figure.subplots()
        for name, style in {"train": {"color": "#9ecae1", "lw": 1},
                            "val": {"color": "#08519c", "marker": "o", "ms": 4}}.items():
            points = [(r["step"], r[f"{name}_loss"] * self.bits_per_nat) for r in self.records if f"{name}_loss" in r]
            if points:
                axes.plot(*zip(*points, strict=True), label=f"{name} ({points[-1][1]:.3f})", **style)
        axes.set(title=self.title, xlabel="step", ylabel="bits per byte")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(self.path.with_name("loss.png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
