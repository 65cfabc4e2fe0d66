"""The limits of this machine, as probe.cpp measures them, and how the benchmarks' C++ is compiled."""

import functools
import importlib
import sys
from types import ModuleType

import pytest
from report import ROOT, machine_name
from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/bench"


def probe() -> ModuleType:
    """The module owlet_probe."""
    return compiled("probe")


@functools.cache
def compiled(stem: str) -> ModuleType:
    """The module owlet_STEM, from STEM.cpp beside this file, compiled when it is older than its sources."""
    # as in setup.py, linking without -fopenmp uses the OpenMP runtime that torch brings
    flags = ["-O3", *(["-fopenmp"] if sys.platform == "linux" else [])]
    headers = [str(path) for path in (ROOT / "csrc").glob("**/*.h")]
    extension = CppExtension(f"owlet_{stem}", [str(Path(__file__).with_name(f"{stem}.cpp"))], depends=headers,
                             extra_compile_args=flags)
    build = BuildExtension.with_options(use_ninja=False)(Distribution({"ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(BUILD)
    build.ensure_finalized()
    build.run()
    if str(BUILD) not in sys.path:
        sys.path.append(str(BUILD))
    return importlib.import_module(f"owlet_{stem}")
