"""The limits of this machine, as probe.cpp measures them."""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/probe"


@functools.cache
def probe() -> ModuleType:
    """The module owlet_probe, compiled when it is older than its sources."""
    # as in setup.py, linking without -fopenmp uses the OpenMP runtime that torch brings
    flags = ["-O3", *(["-fopenmp"] if sys.platform == "linux" else [])]
    headers = [str(path) for path in (ROOT / "csrc").glob("**/*.h")]
    extension = CppExtension("owlet_probe", [str(ROOT / "tests/bench/probe.cpp")], depends=headers,
                             extra_compile_args=flags)
    build = BuildExtension.with_options(use_ninja=False)(Distribution({"ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(BUILD)
    build.ensure_finalized()
    build.run()
    sys.path.append(str(BUILD))
    return importlib.import_module("owlet_probe")
