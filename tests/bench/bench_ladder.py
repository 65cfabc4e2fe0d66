"""The ladder of docs/int8.md: one token's int8 product, from the naive loop to owlet's kernel.

    python tests/bench/bench_ladder.py               a table, also in out/bench/ladder.md; two minutes

The rungs, in ladder.cpp, must give the reference's result to the last bit, except for the first, which sums floats.
They take turns (A B C A B C ...), so that a slow moment of the machine is everybody's; medians. A turn reads the matrix
once untimed, then for at least 30 ms. GB/s count a byte for each weight, also where it is an fp32 number; the limit is
what probe.cpp reads in the same run, as many bytes on as many threads.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

import owlet_kernels
from probe import ROOT, compiled, probe

from cli import flag, parse, run
from files import write_text
from int8 import int8_linear_reference, quantize_rows, quantize_tokens
from machine import cores, cpu_name

NOISY = 0.1  # between the quartiles, as a share of the median: from there on a figure is marked
THREADS = sorted({1, min(2, cores())})


def rungs(N: int, K: int) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Name -> threads, and how to multiply the same random w (N, K) by the same token: y (1, N). Each is checked."""
    torch.manual_seed(0)
    ladder, x, w32 = compiled("ladder"), torch.randn(1, K), torch.randn(N, K)
    (w, scale), (q, x_scale) = quantize_rows(w32), quantize_tokens(x)
    small, huge = torch.ops.owlet.pack_int8(w), owlet_kernels.Panels([(N, K)]).pack(w)  # pages of 4 KB, of 2 MB
    found = {}

    def add(name: str, threads: int, product: Callable[..., Tensor], *args: object) -> None:
        found[f"{name}, {threads} threads" if threads > 1 else name] = threads, lambda: product(*args)

    def climb(name: str, threads: int, panels: Tensor) -> Tensor:
        y = torch.empty(1, N)
        ladder.multiply(name, threads, *(t.flatten().numpy() for t in (w, panels, scale, q)), x_scale.item(),
                        y.view(N).numpy())
        return y

    for name in ladder.rungs():
        add(name, 1, climb, name, 1, small)
    for threads in THREADS:
        for name in ladder.rungs():
            if name.startswith("vpdpbusd"):
                add(f"{name}, pages of 2 MB", threads, climb, name, threads, huge)
    for threads in THREADS:
        add(f"owlet's kernel ({owlet_kernels.isa()})", threads, torch.ops.owlet.int8_linear, x, huge, scale)
        add("fp32, torch", threads, F.linear, x, w32)

    parts = zip(w.split(4096), scale.split(4096), strict=True)  # the reference needs 8 bytes a weight
    expected = torch.cat([int8_linear_reference(x, *part) for part in parts], dim=1)
    for name, (_, rung) in found.items():
        if name.startswith("naive"):
            assert (rung() - expected).norm() < 1e-5 * expected.norm()
        elif "fp32" not in name:
            assert torch.equal(rung(), expected), name
    return found


def seconds(threads: int, rung: Callable[[], Tensor]) -> float:
    torch.set_num_threads(threads)
    rung()
    times, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < 0.03:
        rung()
        times += 1
    return passed / times


@torch.inference_mode()
def measure(N: int, K: int, rounds: int) -> dict[str, list[str]]:
    """Rung -> GB/s and share of the limit, as cells of the table."""
    found, limits = rungs(N, K), dict.fromkeys(THREADS, 0.0)
    speeds = {name: [] for name in found}
    for _ in tqdm(range(rounds), desc=f"{N * K >> 20} MiB", disable=None, leave=False):
        for threads in THREADS:
            limits[threads] = max(limits[threads], probe().read_bandwidth(N * K, threads))
        for name, (threads, rung) in found.items():
            speeds[name].append(N * K * 1e-9 / seconds(threads, rung))
    cells = {}
    for name, (threads, _) in found.items():
        low, middle, high = statistics.quantiles(speeds[name], n=4)
        noisy = (high - low) / middle > NOISY
        cells[name] = [f"{'~' * noisy}{middle:.1f}", f"{middle / limits[threads]:.0%}"]
    return cells | {f"the limit, {threads} threads" if threads > 1 else "the limit": [f"{limits[threads]:.1f}", "100%"]
                    for threads in THREADS}


@dataclass
class LadderConfig:
    mib: tuple[int, ...] = flag((12, 128), "Sizes of the int8 matrix in MiB: for the last cache, and for memory.", 1)
    rounds: int = flag(15, "Turns of each rung.", 2)


def main() -> None:
    config, K = parse(LadderConfig, "One token's int8 product, from the naive loop to owlet's kernel."), 1024
    sizes = {mib: measure(mib * 2**20 // K, K, config.rounds) for mib in config.mib}
    header = ["rung", *(cell for mib in sizes for cell in (f"{mib} MiB: GB/s", "of the limit"))]
    rows = [[name, *(cell for cells in sizes.values() for cell in cells[name])] for name in sizes[config.mib[0]]]
    table = [f"| {' | '.join(row)} |" for row in (header, ["---", *["--:"] * (len(header) - 1)], *rows)]
    note = (f"{cpu_name()}, torch {torch.__version__}; one token, K = {K}; medians of {config.rounds} rounds, "
            f"~ where the quartiles lie more than {NOISY:.0%} apart.")
    if not any(name.startswith("vpdpbusd") for name in sizes[config.mib[0]]):
        note += " The rungs above `packed in panels` need AVX512-VNNI, which this CPU lacks."
    text = "\n".join([*table, "", note, ""])
    print(text)
    write_text(ROOT / "out/bench/ladder.md", text)


if __name__ == "__main__":
    run(main)
