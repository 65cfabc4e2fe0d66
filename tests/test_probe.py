"""The C++ of the benchmarks. No test can know the machine's limits, only that they are positive and finite."""

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from probe import probe

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(b"GOMP_parallel" not in Path(owlet_kernels.__file__).read_bytes(),
                                reason="the compiler has another OpenMP than torch brings: the benchmarks need GCC")


@pytest.fixture(scope="module")
def owlet_probe():
    return probe()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [3 * 256, 1_000_001, 5 << 20], ids=["least", "odd", "several huge pages"])
def test_read_bandwidth(owlet_probe, size, threads):
    speed = owlet_probe.read_bandwidth(size, threads)
    assert math.isfinite(speed) and speed > 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", owlet_kernels.isas())
def test_dot_peak(owlet_probe, isa, threads):
    speed = owlet_probe.dot_peak(threads, isa)
    assert math.isfinite(speed) and speed > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("call", ["read_bandwidth(1 << 20, {})", "dot_peak({}, 'generic')"])
def test_probes_start_the_threads_they_are_told_to(owlet_probe, call, threads):
    code = f"""if True:
        import os, sys, torch
        sys.path += [{os.fspath(Path(owlet_probe.__file__).parent)!r}]
        import owlet_probe
        before = len(os.listdir("/proc/self/task"))
        owlet_probe.{call.format(threads)}
        print(len(os.listdir("/proc/self/task")) - before)
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True)
    assert result.stdout.split() == [str(threads - 1)], result.stderr


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_probes_refuse_threads(owlet_probe, threads):
    for call in (lambda: owlet_probe.read_bandwidth(1 << 20, threads),
                 lambda: owlet_probe.dot_peak(threads, "generic")):
        with pytest.raises(ValueError, match=f"threads must be 1 to 1024, got {threads}"):
            call()


@pytest.mark.parametrize("size", [-1, 0, 511])
def test_read_bandwidth_refuses_too_few_bytes(owlet_probe, size):
    with pytest.raises(ValueError, match=f"bytes must be 256 a thread or more, got {size}"):
        owlet_probe.read_bandwidth(size, 2)


@pytest.mark.parametrize("isa", ["sse9", "neon" if "avx2" in owlet_kernels.isas() else "avx2"])
def test_dot_peak_refuses(owlet_probe, isa):
    with pytest.raises(ValueError, match=f"instruction set '{isa}' is unknown or not supported by this CPU"):
        owlet_probe.dot_peak(1, isa)


def test_every_rung_of_the_ladder_equals_the_reference(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/bench")
    rungs = importlib.import_module("bench_ladder").rungs(512, 64)  # it checks each against the reference
    assert "packed in panels" in rungs
    assert "avx512_vnni" not in owlet_kernels.isas() or "vpdpbusd" in rungs
