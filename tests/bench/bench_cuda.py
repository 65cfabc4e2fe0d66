"""int8 on a GPU beside what else there is, and beside what the hardware allows:

    python tests/bench/bench_cuda.py                     some 3 minutes; tables, also in out/cuda/cuda.md and .json

Products are recorded in one CUDA graph that goes, again and again, through as many copies of the matrix as overflow
the second level cache (for prompts, where weights are a small part of the work: four), so that neither launches nor
the cache count; contenders take turns, medians. Limits are measured in the same
run: bandwidth by copying 2 GB (read and written), arithmetic by a bf16 product of 8192 x 8192 matrices. For training
see tests/bench/bench_train.py --sizes medium.
"""

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))

import int8
from cli import UserError, parse, run
from files import write_json, write_text
from generate import BUCKET, generate
from int8 import quantize_rows, quantize_tokens
from machine import peak_flops
from model import GPT, SIZES, GPTConfig, KVCache

DEVICE = torch.device("cuda:0")
CACHE = 256 << 20  # bytes, more than any GPU's second level cache
DECODE = [(2304, 768), (768, 768), (4096, 768), (768, 2048), (8192, 8192), (16384, 4096)]  # (N, K): medium's, large
PROMPT = [(2304, 768), (768, 768), (4096, 768), (768, 2048), (4096, 4096), (8192, 8192)]
PROMPT_TOKENS, UNTIMED = 32, 8  # of a generation
MOST_TOKENS = BUCKET - PROMPT_TOKENS - UNTIMED  # behind which there would be a new recording, in the time that counts


# ---------------------------------------------------------------- products

def owlet(w: Tensor) -> Callable[[Tensor], Tensor]:
    q, scale = quantize_rows(w)
    tiles = torch.ops.owlet.pack_int8(q)
    return lambda x: torch.ops.owlet.int8_linear(x, tiles, scale)


def bf16(w: Tensor) -> Callable[[Tensor], Tensor]:
    w = w.bfloat16()
    return lambda x: F.linear(x, w)


@torch.compile(dynamic=False)
def int_mm_linear(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """torch._int_mm (cuBLASLt), with the same quantization around it fused by torch.compile."""
    q, x_scale = quantize_tokens(x.float())
    return (torch._int_mm(q, w.T).float() * x_scale * scale).to(x.dtype)


def int_mm(w: Tensor) -> Callable[[Tensor], Tensor]:
    q, scale = quantize_rows(w)
    return lambda x: int_mm_linear(x, q, scale)


def torchao(w: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linear = torch.nn.Linear(*reversed(w.shape), bias=False, device=w.device, dtype=torch.bfloat16)
    linear.weight.data = w.bfloat16()
    quantize_(linear, Int8DynamicActivationInt8WeightConfig())
    linear.compile(dynamic=False)
    return linear


def each(linears: list[Callable[[Tensor], Tensor]], x: Tensor) -> None:
    for linear in linears:
        linear(x)


def seconds_of(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, recorded as a graph and replayed; the contenders take turns."""
    graphs = {}
    for name, call in calls.items():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # so that the clock is up
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def contenders() -> dict[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]:
    """Each makes a function of x (M, K) from w (N, K)."""
    found = {"owlet": owlet, "bf16": bf16, "_int_mm": int_mm}
    if importlib.util.find_spec("torchao"):
        found["torchao int8"] = torchao
    else:
        print("note: torchao is not installed: left out", file=sys.stderr)
    return found


def products(makers: dict, shapes: list[tuple[int, int]], tokens: list[int], rounds: int) -> list[dict]:
    """A row for each shape, number of tokens and contender."""
    rows = []
    for (N, K), M in tqdm([(shape, M) for shape in shapes for M in tokens], disable=None, leave=False):
        x = torch.randn(M, K, device=DEVICE, dtype=torch.bfloat16)
        # weights or arithmetic for a millisecond or so, of which a graph's start is no part to speak of
        copies, repeats = (math.ceil(CACHE / (N * K)), 8) if M < 128 else (4, math.ceil(2**26 / (N * K)))
        torch.compiler.reset()  # its limit of recompilations holds for all shapes together
        calls = {}
        for name, make in makers.items():
            if name in ("_int_mm", "torchao int8") and M <= 16:  # which is what torch._int_mm asks for
                continue
            linears = [make(torch.randn(N, K, device=DEVICE)) for _ in range(copies)]
            calls[name] = partial(each, linears * repeats, x)
        for name, seconds in seconds_of(calls, rounds).items():
            width, seconds = 2 if name == "bf16" else 1, seconds / (copies * repeats)
            rows.append({"N": N, "K": K, "tokens": M, "by": name, "microseconds": seconds * 1e6,
                         "gigabytes_per_second": N * K * width / seconds / 1e9,
                         "teraops_per_second": 2 * M * N * K / seconds / 1e12})
    return rows


# ---------------------------------------------------------------- whole models

class Eager(KVCache):
    """A cache that generate.py captures no graph for."""


def decoding(size: str, new: int, rounds: int) -> list[dict]:
    """Tokens a second at batch 1, behind a short prompt; the weights are random, and read whole for each token."""
    torch.manual_seed(0)
    fp32 = GPT(GPTConfig(256, **SIZES[size])).eval().requires_grad_(False)
    for parameter in fp32.parameters():  # speed does not depend on their values, but for zeros
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.02)
    models = {"int8": int8.build(fp32.config, int8.quantize_state(fp32), "owlet", DEVICE), "fp32": fp32.to(DEVICE)}
    half = GPT(GPTConfig(256, **SIZES[size])).eval().requires_grad_(False).to(DEVICE)
    for ours, theirs in zip(half.parameters(), fp32.parameters(), strict=True):
        ours.data = theirs.data.bfloat16()
    models["bf16"] = half
    weights = sum(p.numel() for p in fp32.parameters() if p.dim() == 2)
    contenders = [("int8", True), ("bf16", True), ("bf16", False), ("fp32", True)]
    speeds = {contender: [] for contender in contenders}
    idx = torch.randint(256, (1, PROMPT_TOKENS), device=DEVICE)
    for turn in tqdm(range(rounds + 1), desc=size, disable=None, leave=False):
        for name, graph in contenders:
            speed = pace(models[name], idx, new, graph)
            if turn:  # the first one warms up
                speeds[name, graph].append(speed)
    width = {"int8": 1, "bf16": 2, "fp32": 4}
    rows = []
    for (name, graph), values in speeds.items():
        median = statistics.median(values)
        rows.append({"size": size, "by": f"{name}, one graph a token" if graph else f"{name}, launch by launch",
                     "tokens_per_second": median, "gigabytes_per_second": median * weights * width[name] / 1e9})
    return rows


@torch.inference_mode()
def pace(model: GPT, idx: Tensor, new: int, graph: bool) -> float:
    """Tokens a second, once those before have been recorded."""
    kind = KVCache if graph else Eager
    dtype = model.model.norm.weight.dtype
    model.new_cache = lambda streams, length: kind(model.config, streams, length, DEVICE, dtype)
    stream = generate(model, idx, UNTIMED + new, temperature=0)
    for _ in range(UNTIMED):
        next(stream)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for token in stream:
        token.tolist()  # as sample.py does, to print it
    return new / (time.perf_counter() - start)


# ---------------------------------------------------------------- limits, tables, command line

def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    source = torch.randn(1 << 28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of({"copy": lambda: target.copy_(source)}, 20)["copy"]


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] + ["--:"] * (len(header) - 1), *rows))


@dataclass
class CudaBenchConfig:
    sizes: tuple[str, ...] = ("small", "medium")
    """Models to decode with."""
    tokens: int = MOST_TOKENS
    """New tokens of a generation."""
    rounds: int = 7
    out: Path = Path("out/cuda")
    """Folder for cuda.md and cuda.json."""


def main() -> None:
    config = parse(CudaBenchConfig, "int8 on a GPU beside what else there is, and beside what the hardware allows.")
    if not 1 <= config.tokens <= MOST_TOKENS:
        raise UserError(f"--tokens: expected 1 to {MOST_TOKENS}, got {config.tokens}")
    if config.rounds < 1:
        raise UserError(f"--rounds: expected 1 or more, got {config.rounds}")
    for size in config.sizes:
        if size not in SIZES:
            raise UserError(f"--sizes: expected some of {' '.join(SIZES)}, got {size}")
    if not torch.cuda.is_available():
        raise UserError("needs a CUDA GPU, which torch does not see here")
    if not int8.has_cuda_kernels():
        raise UserError("the CUDA kernels are not built: python setup.py build_ext, where nvcc and a CUDA torch are")
    torch.manual_seed(0)
    with torch.inference_mode():
        bandwidth, peak = copy_bandwidth(), peak_flops(DEVICE, torch.bfloat16)
        makers = contenders()
        few = products(makers, DECODE, [1, 4, 16], config.rounds)
        many = products(makers, PROMPT, [2048], config.rounds)
    models = [row for size in config.sizes for row in decoding(size, config.tokens, config.rounds)]

    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    cells = [[f"{row['N']} x {row['K']}", str(row["tokens"]), row["by"], f"{row['microseconds']:.1f}",
              f"{row['gigabytes_per_second']:,.0f}", f"{row['gigabytes_per_second'] * 1e9 / bandwidth:.0%}",
              f"{row['teraops_per_second']:,.0f}", f"{row['teraops_per_second'] * 1e12 / peak:.0%}"]
             for row in few + many]
    text = "\n\n".join([
        f"{machine}; copies {bandwidth / 1e9:,.0f} GB/s, bf16 products {peak / 1e12:,.0f} TFLOP/s",
        table(["matrix", "tokens", "by", "us", "weights, GB/s", "of copying", "TOP/s", "of bf16 peak"], cells),
        table(["model, decoding", "tokens/s", "weights, GB/s", "of copying"],
              [[f"{row['size']}, {row['by']}", f"{row['tokens_per_second']:,.0f}",
                f"{row['gigabytes_per_second']:,.0f}", f"{row['gigabytes_per_second'] * 1e9 / bandwidth:.0%}"]
               for row in models])]) + "\n"
    print(text)
    write_json(config.out / "cuda.json", {"machine": machine, "copy_bandwidth": bandwidth, "bf16_peak": peak,
                                          "products": few + many, "decoding": models})
    write_text(config.out / "cuda.md", text)


if __name__ == "__main__":
    run(main)
