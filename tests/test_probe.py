"""The probes of what the machine allows. How fast it is, no test can know; that they measure something, it can."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [3 * 256, 1_000_001, 5 << 20], ids=["least", "odd", "several huge pages"])
def test_read_bandwidth(size, threads):
    speed = owlet_kernels.read_bandwidth(size, threads)
    assert math.isfinite(speed) and speed > 0


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("isa", owlet_kernels.isas())
def test_dot_peak(isa, threads):
    speed = owlet_kernels.dot_peak(threads, isa)
    assert math.isfinite(speed) and speed > 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("probe", ["read_bandwidth(1 << 20, {})", "dot_peak({}, 'generic')"])
def test_probes_start_the_threads_they_are_told_to(probe, threads):
    code = f"""if True:
        import os, torch, owlet_kernels
        before = len(os.listdir("/proc/self/task"))
        owlet_kernels.{probe.format(threads)}
        print(len(os.listdir("/proc/self/task")) - before)
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True)
    assert result.stdout.split() == [str(threads - 1)], result.stderr


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_probes_refuse_threads(threads):
    for probe in (lambda: owlet_kernels.read_bandwidth(1 << 20, threads),
                  lambda: owlet_kernels.dot_peak(threads, "generic")):
        with pytest.raises(ValueError, match=f"threads must be 1 to 1024, got {threads}"):
            probe()


@pytest.mark.parametrize("size", [-1, 0, 511])
def test_read_bandwidth_refuses_too_few_bytes(size):
    with pytest.raises(ValueError, match=f"bytes must be 256 a thread or more, got {size}"):
        owlet_kernels.read_bandwidth(size, 2)


@pytest.mark.parametrize("isa", ["sse9", "neon" if "avx2" in owlet_kernels.isas() else "avx2"])
def test_dot_peak_refuses(isa):
    with pytest.raises(ValueError, match=f"instruction set '{isa}' is unknown or not supported by this CPU"):
        owlet_kernels.dot_peak(1, isa)
