"""int8 on a GPU beside what else there is, and beside what the hardware allows:

    python tests/bench/bench_cuda.py                     about 3 minutes; tables, also in out/cuda/

Products are captured in one CUDA graph. It multiplies, again and again, by as many copies of the matrix as overflow
the second-level cache (by four for prompts, where reading weights is a small part of the work), so that neither
launches nor the cache count. Engines take turns; figures are medians. The limits are measured in the same run:
bandwidth by copying 1 GB (read and written), arithmetic by a bf16 product of 8192 x 8192 matrices. For training see
tests/bench/bench_train.py --sizes medium.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from report import machine_name, publish, random_model, take_turns
from torch import Tensor

import int8
from generate import generate
from int8 import quantize_rows, quantize_tokens
from lib.cli import Count, UserError, flag, parse, run
from lib.machine import peak_flops
from model import GPT, SIZES, KVCache

DEVICE = torch.device("cuda:0")
CACHE = 256 << 20  # bytes, more than any GPU's second-level cache
DECODE = [(2304, 768), (768, 768), (4096, 768), (768, 2048), (8192, 8192), (16384, 4096)]  # (N, K): medium's, large
PROMPT = [(2304, 768), (768, 768), (4096, 768), (768, 2048), (4096, 4096), (8192, 8192)]
PROMPT_TOKENS, WARMUP = 32, 8  # tokens before those that are timed
NEW = 256 - PROMPT_TOKENS - WARMUP  # tokens that are timed, within the context of `small`

Linear = Callable[[Tensor], Tensor]  # x (M, K) -> (M, N)


# ---------------------------------------------------------------- products: w (N, K) -> Linear

def owlet(w: Tensor) -> Linear:
    q, scale = quantize_rows(w)
    weight = int8.tiles(q)
    return lambda x: torch.ops.owlet.int8_linear(x.float(), weight, scale).to(x.dtype)


def bf16(w: Tensor) -> Linear:
    w = w.bfloat16()
    return lambda x: F.linear(x, w)


@torch.compile(dynamic=False)
def int_mm_linear(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """torch._int_mm (cuBLASLt), with the same quantization around it, fused by torch.compile."""
    q, x_scale = quantize_tokens(x.float())
    return (torch._int_mm(q, w.T).float() * x_scale * scale).to(x.dtype)


def int_mm(w: Tensor) -> Linear:
    q, scale = quantize_rows(w)
    return lambda x: int_mm_linear(x, q, scale)


ENGINES = {"owlet": owlet, "bf16": bf16, "_int_mm": int_mm}


def each(linears: list[Linear], x: Tensor) -> None:
    for linear in linears:
        linear(x)


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # warm-up
            call()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        call()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()  # raises the GPU's clock
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def median_seconds(calls: dict[str, Callable[[], object]], rounds: int, title: str) -> dict[str, float]:
    """Each call captured as a graph and replayed in turn."""
    replays = {name: partial(replay_seconds, capture(call)) for name, call in calls.items()}
    times = take_turns(replays, rounds, warmup=0, title=title)
    return {name: statistics.median(values) for name, values in times.items()}


def products(shapes: list[tuple[int, int]], tokens: list[int], rounds: int) -> list[dict]:
    """A row for each shape, number of tokens and engine."""
    rows = []
    for (N, K), M in [(shape, M) for shape in shapes for M in tokens]:
        x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
        # about a millisecond of reading weights or of arithmetic, so that launching the graph does not count
        copies, repeats = (math.ceil(CACHE / (N * K)), 8) if M < 128 else (4, math.ceil(2**26 / (N * K)))
        torch.compiler.reset()  # its limit of recompilations holds for all shapes together
        calls = {}
        for name, engine in ENGINES.items():
            if name != "_int_mm" or M > 16:  # which torch._int_mm needs
                linears = [engine(torch.randn(N, K, device=DEVICE)) for _ in range(copies)]
                calls[name] = partial(each, linears * repeats, x)
        for name, seconds in median_seconds(calls, rounds, f"{N} x {K}, {M} tokens").items():
            width, seconds = 2 if name == "bf16" else 1, seconds / (copies * repeats)
            rows.append({"N": N, "K": K, "tokens": M, "engine": name, "microseconds": seconds * 1e6,
                         "gigabytes_per_second": N * K * width / seconds / 1e9,
                         "teraops_per_second": 2 * M * N * K / seconds / 1e12})
    return rows


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    # not copy_, which a graph leaves to the slower copy engine
    return 2 * source.nbytes / median_seconds({"copy": lambda: torch.neg(source, out=target)}, 20, "copy")["copy"]


# ---------------------------------------------------------------- whole models

class Eager(KVCache):
    """A cache that generate.py captures no graph for."""


def decoding(size: str, rounds: int) -> list[dict]:
    """Rows of tokens a second at batch 1, behind a short prompt."""
    fp32, half = random_model(size), random_model(size).to(DEVICE)
    for parameter in half.parameters():  # not half.bfloat16(), which would round the rope table too
        parameter.data = parameter.data.bfloat16()
    models = {"int8": int8.build(fp32.config, int8.quantize_state(fp32), "owlet", DEVICE), "bf16": half,
              "fp32": fp32.to(DEVICE)}
    weights = sum(p.numel() for p in fp32.parameters() if p.dim() == 2)
    idx = torch.randint(256, (1, PROMPT_TOKENS), device=DEVICE)
    calls = {(name, cache): partial(tokens_per_second, models[name], idx, cache)
             for name, cache in (("int8", KVCache), ("bf16", KVCache), ("bf16", Eager), ("fp32", KVCache))}
    rows = []
    for (name, cache), values in take_turns(calls, rounds, title=size).items():
        median, width = statistics.median(values), {"int8": 1, "bf16": 2, "fp32": 4}[name]
        rows.append({"model": f"{size}, {name}, {'launch by launch' if cache is Eager else 'one graph a token'}",
                     "tokens_per_second": median, "gigabytes_per_second": median * weights * width / 1e9})
    return rows


@torch.inference_mode()
def tokens_per_second(model: GPT, idx: Tensor, cache: type[KVCache]) -> float:
    dtype = model.model.norm.weight.dtype
    model.new_cache = lambda batch_size, length: cache(model.config, batch_size, length, DEVICE, dtype)
    stream = generate(model, idx, WARMUP + NEW, temperature=0)
    for _ in range(WARMUP):  # in which the graph is captured
        next(stream)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for token in stream:
        token.tolist()  # as sample.py does to print it
    return NEW / (time.perf_counter() - start)


# ---------------------------------------------------------------- command line

@dataclass
class CudaBenchConfig:
    sizes: tuple[Literal[tuple(SIZES)], ...] = flag(("small", "medium"), "Models to decode with.")
    rounds: Count = flag(7, "Turns of each engine that count.")
    out: Path = flag(Path("out/cuda"), "Folder for cuda.md and cuda.json.")


def main() -> None:
    config = parse(CudaBenchConfig, "int8 on a GPU beside what else there is, and beside what the hardware allows.")
    if not torch.cuda.is_available():
        raise UserError("needs a CUDA GPU, which torch does not see here")
    if int8.why_no_owlet(DEVICE):
        raise UserError("the CUDA kernels are not built: python setup.py build_ext, where nvcc and a CUDA torch are")
    torch.manual_seed(0)
    with torch.inference_mode():
        bandwidth, peak = copy_bandwidth(), peak_flops(DEVICE, torch.bfloat16)
        rows = products(DECODE, [1, 4, 16], config.rounds) + products(PROMPT, [2048], config.rounds)
    models = [row for size in config.sizes for row in decoding(size, config.rounds)]
    for row in rows + models:
        row["of_copying"] = row["gigabytes_per_second"] * 1e9 / bandwidth
    for row in rows:
        row["of_peak"] = row["teraops_per_second"] * 1e12 / peak

    note = (f"{machine_name(gpu=True)}, CUDA {torch.version.cuda}; copies {bandwidth / 1e9:,.0f} GB/s, "
            f"bf16 products {peak / 1e12:,.0f} TFLOP/s")
    speed = {"weights, GB/s": "{gigabytes_per_second:,.0f}", "of copying": "{of_copying:.0%}"}
    publish(config.out / "cuda", note, (rows, {
        "matrix": "{N} x {K}", "tokens": "{tokens}", "engine": "{engine}", "µs": "{microseconds:.1f}", **speed,
        "TOP/s": "{teraops_per_second:,.0f}", "of bf16 peak": "{of_peak:.0%}"}), (models, {
            "model, decoding": "{model}", "tokens/s": "{tokens_per_second:,.0f}", **speed}))


if __name__ == "__main__":
    run(main)
