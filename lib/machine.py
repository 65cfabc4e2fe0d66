"""What this machine has: devices, number formats, compilers, cores, and how fast it multiplies."""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import time
import timeit
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from torch import nn

from lib.cli import UserError, note


def pick_device(name: str) -> torch.device:
    """auto: CUDA, else Apple's GPU, else the CPU. Of several GPUs the first. Raises UserError if it is not there."""
    here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    kind, colon, index = (next(filter(here.get, here)) if name == "auto" else name).partition(":")
    if kind not in here or (colon and not index.isdecimal()):
        raise UserError(f"--device: expected auto, cpu, cuda or mps, got {name}")
    if int(index or 0) >= here[kind]:
        raise UserError(f"--device {name}: this machine has {here[kind] or 'none'} of them")
    return torch.device(kind, int(index or 0) if kind == "cuda" else None)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":  # no stopwatch, so that the same command computes the same
        found = torch.cpu.get_capabilities()
        return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else torch.float32
    return torch.bfloat16 if gpu_has_bf16(device) else torch.float32


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether this is a CUDA GPU with bfloat16 arithmetic in hardware."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler it needs."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return device.type == "cpu" and cxx() is not None


def cxx() -> str | None:
    """The C++ compiler that CXX names (of "ccache g++" the second word), or else g++; None if it is not here."""
    words = [word for word in shlex.split(os.environ.get("CXX", "g++")) if not word.startswith("-")]
    return shutil.which(words[-1]) if words else None


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile blocks that have the same code, which then is compiled once, when the first of them is called."""
    import torch._inductor.config
    import torch.utils.cpp_extension as extension

    torch._inductor.config.cpp.cxx = (None, cxx())  # torch takes $CXX for one word
    extension.TORCH_LIB_PATH = shlex.quote(f"{torch.__path__[0]}/lib")  # and does not quote its own path
    for block in blocks:
        block.forward = torch.compile(block.forward)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class CPUThreads:
    """Torch's CPU threads: `asked`, or $OMP_NUM_THREADS, or the cores shared by `ranks` processes of ours.

    One process by itself leaves out the cores that others keep busy: threads wait for each other some thousand times a
    second, so that one on a busy core delays all (docs/log.md, "A busy core").
    """

    def __init__(self, asked: int | None, ranks: int = 1) -> None:
        self.most = cores() // ranks if ranks > 1 else torch.get_num_threads()  # torchrun sets OMP_NUM_THREADS to 1
        self.fixed = asked is not None or ranks > 1 or "OMP_NUM_THREADS" in os.environ
        torch.set_num_threads(asked or max(1, self.most))
        self.seen = core_seconds()

    def adapt(self) -> bool:
        """Fewer threads, or more again, by what other processes used since the last call. Whether it changed them."""
        if self.fixed:
            return False
        time.sleep(max(0.0, self.seen[0] + 0.1 - time.monotonic()))  # the system counts in steps of 0.01 s
        before, self.seen = self.seen, core_seconds()
        seconds, busy, own = (now - then for now, then in zip(self.seen, before, strict=True))
        others = max(0.0, busy - own) / seconds
        threads = max(1, min(self.most, cores() - round(others)))
        if threads == torch.get_num_threads():
            return False
        note(f"other processes use {others:.1f} of {cores()} cores; going on with {threads} of {self.most} threads "
             "(--threads sets a number that stays)")
        torch.set_num_threads(threads)
        return True


def core_seconds() -> tuple[float, float, float]:
    """Seconds of the clock; those our cores were busy; those of this process and the children it has waited for."""
    ours = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(cores())
    times = [spent for core, spent in enumerate(psutil.cpu_times(percpu=True)) if core in ours]
    return time.monotonic(), sum(t.user + t.nice + t.system for t in times), sum(os.times()[:4])


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def free_memory() -> int:
    """Bytes that programs can still take."""
    return psutil.virtual_memory().available + psutil.swap_memory().free


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What this device reaches on a large matrix product (FLOP/s), measured: best of twenty."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=20)  # .item() waits for the device
    return 2 * n**3 / min(seconds)
