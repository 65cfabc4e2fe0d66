"""The C++ of the benchmarks. No test can know the machine's limits, only that they are positive and finite."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from probe import probe

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

ISAS = owlet_kernels.isas()
pytestmark = pytest.mark.skipif(b"GOMP_parallel" not in Path(owlet_kernels.__file__).read_bytes(),
                                reason="the compiler has another OpenMP than torch brings: the benchmarks need GCC")


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("call, what", [
    *(("read_bandwidth", {"bytes": size}) for size in (3 * 256, 1_000_001, 5 << 20)),  # 5 << 20: several huge pages
    *(("dot_peak", {"isa": isa}) for isa in ISAS)], ids=str)
def test_speeds_are_positive_and_finite(call, what, threads):
    speed = getattr(probe(), call)(threads=threads, **what)
    assert math.isfinite(speed) and speed > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("call", ["read_bandwidth(1 << 20, {})", "dot_peak({}, 'generic')"])
def test_probes_start_the_threads_they_are_told_to(call):
    code = f"""if True:
        import os, sys, torch
        sys.path += [{os.fspath(Path(probe().__file__).parent)!r}]
        import owlet_probe
        before = len(os.listdir("/proc/self/task"))
        owlet_probe.{call.format(1)}
        print(len(os.listdir("/proc/self/task")) - before)
        owlet_probe.{call.format(3)}
        print(len(os.listdir("/proc/self/task")) - before)
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True)
    assert result.stdout.split() == ["0", "2"], result.stderr


@pytest.mark.parametrize("call, arguments, message", [
    *((call, {"threads": threads} | more, f"threads must be 1 to 1024, got {threads}") for threads in (0, -1, 1025)
      for call, more in (("read_bandwidth", {"bytes": 1 << 20}), ("dot_peak", {"isa": "generic"}))),
    *(("read_bandwidth", {"bytes": size, "threads": 2}, f"bytes must be 256 a thread or more, got {size}")
      for size in (-1, 0, 511)),
    *(("dot_peak", {"threads": 1, "isa": isa}, f"instruction set '{isa}' is unknown or not supported by this CPU")
      for isa in ("sse9", "neon" if "avx2" in ISAS else "avx2"))], ids=str)
def test_probes_refuse(call, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(probe(), call)(**arguments)


def test_every_rung_of_the_ladder_equals_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/bench")
    rungs = importlib.import_module("bench_ladder").rungs(512, 64)  # it checks each against the reference
    assert "packed in panels" in rungs
    assert "avx512_vnni" not in ISAS or "vpdpbusd" in rungs
