"""What the benchmarks share: their settings, the limits of the machine, and where the figures go.

OWLET_BENCH_SIZES=tiny,small and OWLET_BENCH_THREADS=1,4 choose what is measured.
"""

import os
import platform
from pathlib import Path

import pytest
import torch
from probe import probe

from files import write_text
from machine import cpu_name

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

OUT = Path(__file__).resolve().parents[2] / "out/bench"
THREADS = [int(n) for n in os.environ.get("OWLET_BENCH_THREADS", "1,2").split(",")]
GPT2_VOCAB = 50257


def sizes(default: str) -> list[str]:
    return os.environ.get("OWLET_BENCH_SIZES", default).split(",")


class Limits:
    """What this machine allows int8 products by `footprint` bytes of weights, probed in the same run."""

    def __init__(self, footprint: int, threads: int) -> None:
        self.footprint, self.threads = footprint, threads
        self.bandwidth = self.dot_peak = 0.0
        self.probe()

    def probe(self) -> None:
        """Once more: a shared machine's limits drift, and the best of them is the limit."""
        self.bandwidth = max(self.bandwidth, probe().read_bandwidth(self.footprint, self.threads))
        self.dot_peak = max(self.dot_peak, probe().dot_peak(self.threads, owlet_kernels.isa()))

    def figures(self, seconds: float, passes: int, operations: int) -> dict[str, float | str]:
        """Speed beside the roofline (Williams et al., 2009): the time to read the weights `passes` times,
        or to do the operations, whichever is longer.
        """
        gigabytes, gigaops = self.footprint * passes * 1e-9, operations * 1e-9
        reading, multiplying = gigabytes / self.bandwidth, gigaops / self.dot_peak
        return {"gigabytes_per_second": gigabytes / seconds, "gigaops_per_second": gigaops / seconds,
                "read_bandwidth": self.bandwidth, "dot_peak": self.dot_peak,
                "limit_seconds": max(reading, multiplying), "share_of_limit": max(reading, multiplying) / seconds,
                "limited_by": "reading" if reading > multiplying else "multiplying"}


def machine() -> dict[str, str]:
    return {"cpu": cpu_name(), "isa": owlet_kernels.isa(), "torch": torch.__version__, "system": platform.platform()}


def publish(request: pytest.FixtureRequest, name: str, header: list[str], rows: list[list[str]], note: str) -> None:
    """A Markdown table, into out/bench/ and on the terminal."""
    alignment = ["---", *["--:"] * (len(header) - 1)]
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, alignment, *rows)]
    peaks = ", ".join(f"{isa} {probe().dot_peak(1, isa):,.0f}" for isa in owlet_kernels.isas())
    text = "\n".join([*lines, "", f"{note} {', '.join(machine().values())}; int8 peaks, GOP/s a thread: {peaks}.", ""])
    write_text(OUT / name, text)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{text}")
