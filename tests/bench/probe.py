"""The limits of this machine, as probe.cpp measures them."""

import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

from setuptools import Distribution
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = Path(__file__).resolve().parents[2] / "build/probe"


@functools.cache
def probe() -> ModuleType:
    """owlet_probe, compiled the first time that it is asked for."""
    # without -fopenmp for the linker: as in setup.py, for the OpenMP runtime that torch brings
    flags = ["-O3", *(["-fopenmp"] if sys.platform == "linux" else [])]
    extension = CppExtension("owlet_probe", [str(SOURCE)], extra_compile_args=flags)
    build = BuildExtension.with_options(use_ninja=False)(Distribution({"ext_modules": [extension]}))
    build.build_lib = build.build_temp = str(BUILD)
    build.ensure_finalized()
    build.run()
    sys.path.append(str(BUILD))
    return importlib.import_module("owlet_probe")
