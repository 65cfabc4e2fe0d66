"""The ladder of docs/int8.md: one token's int8 product, from the naive loop to owlet's kernel.

    python tests/bench/bench_ladder.py               a table, also in out/bench/ladder.md; two minutes

The rungs, in ladder.cpp, must give the reference's result to the last bit, except for the first, which sums floats.
They take turns (A B C A B C ...), so that a slow moment of the machine is everybody's; medians. A turn reads the matrix
once untimed, then for at least 30 ms. GB/s count a byte for each weight, also where it is an fp32 number; the limit is
what probe.cpp reads in the same run, as many bytes on as many threads.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
import torch.nn.functional as F
from report import OUT, machine_name, publish, take_turns
from msgspec import Meta
from probe import Limits, compiled, owlet_kernels
from torch import Tensor

from int8 import int8_linear_reference, quantize_rows, quantize_tokens
from lib.cli import Count, flag, parse, run
from lib.machine import cores

NOISY = 0.1  # between the quartiles, as a share of the median: from there on a figure is marked
THREADS = sorted({1, min(2, cores())})


def on_threads(name: str, threads: int) -> str:
    return f"{name}, {threads} threads" if threads > 1 else name


def rungs(N: int, K: int) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Name -> threads, and how to multiply the same random w (N, K) by the same token: y (1, N). Each is checked."""
    torch.manual_seed(0)
    ladder, x, w32 = compiled("ladder"), torch.randn(1, K), torch.randn(N, K)
    (w, scale), (q, x_scale) = quantize_rows(w32), quantize_tokens(x)
    huge = torch.ops.owlet.pack_int8(w)  # on pages of 2 MB
    small = huge.clone()  # on pages of 4 KB

    def climb(name: str, threads: int, panels: Tensor) -> Tensor:
        y = torch.empty(1, N)
        ladder.multiply(name, threads, *(t.flatten().numpy() for t in (w, panels, scale, q)), x_scale.item(),
                        y.view(N).numpy())
        return y

    found = {name: (1, partial(climb, name, 1, small)) for name in ladder.rungs()}
    fast = [name for name in ladder.rungs() if name.startswith("vpdpbusd")]
    found |= {on_threads(f"{name}, pages of 2 MB", threads): (threads, partial(climb, name, threads, huge))
              for threads in THREADS for name in fast}
    for threads in THREADS:
        found[on_threads(f"owlet's kernel ({owlet_kernels.isa()})", threads)] = threads, partial(
            torch.ops.owlet.int8_linear, x, huge, scale)
        found[on_threads("fp32, torch", threads)] = threads, partial(F.linear, x, w32)

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
def measure(mib: int, K: int, rounds: int) -> dict[str, dict[str, str]]:
    """Rung -> GB/s and share of the limit, as cells of the table."""
    found = rungs((mib << 20) // K, K)
    limits = {threads: Limits(mib << 20, threads) for threads in THREADS}
    calls = {threads: limit.probe for threads, limit in limits.items()}
    calls |= {name: partial(seconds, *rung) for name, rung in found.items()}
    times = take_turns(calls, rounds, title=f"{mib} MiB")
    cells = {}
    for name, (threads, _) in found.items():
        low, middle, high = statistics.quantiles([(mib << 20) * 1e-9 / time for time in times[name]], n=4)
        noisy = "~" * ((high - low) / middle > NOISY)
        cells[name] = {f"speed {mib}": f"{noisy}{middle:.1f}",
                       f"share {mib}": f"{middle / limits[threads].bandwidth:.0%}"}
    return cells | {on_threads("the limit", threads): {f"speed {mib}": f"{limit.bandwidth:.1f}", f"share {mib}": "100%"}
                    for threads, limit in limits.items()}


@dataclass
class LadderConfig:
    mib: tuple[Count, ...] = flag((12, 128), "Sizes of the int8 matrix in MiB: for the last cache, and for memory.")
    rounds: Annotated[int, Meta(ge=2)] = flag(15, "Turns of each rung.")


def main() -> None:
    config, K = parse(LadderConfig, "One token's int8 product, from the naive loop to owlet's kernel."), 1024
    sizes = {mib: measure(mib, K, config.rounds) for mib in config.mib}
    rows = [{"rung": name} | {key: cell for cells in sizes.values() for key, cell in cells[name].items()}
            for name in sizes[config.mib[0]]]
    columns = {"rung": "{rung}"}
    for mib in sizes:
        columns |= {f"{mib} MiB: GB/s": f"{{speed {mib}}}", f"{mib} MiB: of the limit": f"{{share {mib}}}"}
    note = (f"{machine_name()}; one token, K = {K}; medians of {config.rounds} rounds, "
            f"~ where the quartiles lie more than {NOISY:.0%} apart.")
    if not any(row["rung"].startswith("vpdpbusd") for row in rows):
        note += " The rungs above `packed in panels` need AVX512-VNNI, which this CPU lacks."
    publish(OUT / "ladder", note, (rows, columns))


if __name__ == "__main__":
    run(main)
