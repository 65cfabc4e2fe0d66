"""The limits of this machine, as probe.cpp measures them, and the share of them that an int8 model reaches.

The benchmarks' C++ is compiled here.
"""

import functools
import importlib
import sys
from types import ModuleType

import pytest
from report import ROOT, machine_name
from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension, CppExtension

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

BUILD = ROOT / "build/bench"
LIMIT = "the time to read the int8 weights or to multiply by them, whichever is longer, at the speeds probed"


def probe() -> ModuleType:
    """The module owlet_probe."""
    return compiled("probe")


@functools.cache
def compiled(stem: str) -> ModuleType:
    """The module owlet_STEM, from STEM.cpp beside this file, compiled when it is older than its sources."""
    # as in setup.py, linking without -fopenmp uses the OpenMP runtime that torch brings
    flags = ["-O3", *(["-fopenmp"] if sys.platform == "linux" else [])]
    headers = [str(path) for path in (ROOT / "csrc").glob("**/*.h")]
    extension = CppExtension(f"owlet_{stem}", [str(ROOT / f"tests/bench/{stem}.cpp")], depends=headers,
                             extra_compile_args=flags)
    build = BuildExtension.with_options(use_ninja=False)(Distribution({"ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(BUILD)
    build.ensure_finalized()
    build.run()
    if str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    return importlib.import_module(f"owlet_{stem}")


class Limits:
    """What this machine allows int8 products by `weights` bytes of weights."""

    def __init__(self, weights: int, threads: int) -> None:
        self.weights, self.threads = weights, threads
        self.bandwidth = self.dot_peak = 0.0  # GB/s, GOP/s
        self.probe()

    def probe(self) -> None:
        """Measure again and keep the best, since a shared machine's speed drifts."""
        self.bandwidth = max(self.bandwidth, probe().read_bandwidth(self.weights, self.threads))
        self.dot_peak = max(self.dot_peak, probe().dot_peak(self.threads, owlet_kernels.isa()))

    def figures(self, seconds: float, passes: int, operations: int) -> dict[str, float | str]:
        """Speeds, and the share of the roofline (Williams et al., 2009): the time to read the weights `passes` times
        or to do the operations, whichever is longer.
        """
        gigabytes, gigaops = self.weights * passes * 1e-9, operations * 1e-9
        reading, multiplying = gigabytes / self.bandwidth, gigaops / self.dot_peak
        return {"gigabytes_per_second": gigabytes / seconds, "gigaops_per_second": gigaops / seconds,
                "read_bandwidth": self.bandwidth, "dot_peak": self.dot_peak,
                "limit_seconds": max(reading, multiplying), "share_of_limit": max(reading, multiplying) / seconds,
                "limited_by": "reading" if reading > multiplying else "multiplying"}


def int8_machine() -> str:
    """The machine, its instruction set, and what one thread reaches in GOP/s on each."""
    peaks = ", ".join(f"{isa} {probe().dot_peak(1, isa):,.0f}" for isa in owlet_kernels.isas())
    return f"{machine_name()}, {owlet_kernels.isa()}; int8 peaks, GOP/s per thread: {peaks}"
