"""Timings of owlet::int8_linear, by pytest-benchmark:  python -m pytest tests/bench/bench_kernels.py

Every matrix of a model, for one token to several hundred, beside what the machine allows; fp32 and torch.ao
on one of them. A round takes every one of as many copies of the matrix as weigh what the whole model does,
so that it is read from where it would be in a model: a matrix used again at once would lie in the second
level cache. Prints a table, also in out/bench/kernels.md. Settings: see roofline.py.
"""

import functools
from collections.abc import Iterator

import pytest
import roofline
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from int8 import LINEARS, activate, quantize_rows
from model import SIZES, GPTConfig

TOKENS = [1, 2, 4, 8, 16, 64, 256, 512]
CASES = [(size, matrix, contender) for size in roofline.sizes("base,medium")
         for matrix, contender in [*((matrix, "owlet") for matrix in ("qkv", "o", "gate_up", "down", "head")),
                                   ("gate_up", "fp32"), ("gate_up", "torch.ao")]]
rows: dict[tuple[str, str, str, int], dict[int, dict]] = {}


class Float(nn.Linear):
    """What an Int8Linear computes, in fp32."""

    def __init__(self, weight: Tensor, activation: str) -> None:
        super().__init__(*reversed(weight.shape), bias=False)
        self.weight.data, self.activation = weight.clone(), activation

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = activate(F.linear(x, self.weight), self.activation)
        return y if residual is None else y + residual


def shapes(size: str) -> tuple[dict[str, tuple[int, int]], int]:
    """(N, K) of a model's matrices, and the weights of all of them in all layers."""
    config = GPTConfig(**SIZES[size])
    C, width, kv_width = config.n_embd, config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    block = {"qkv": (width + 2 * kv_width, C), "o": (C, width), "gate_up": (2 * config.n_hidden, C),
             "down": (C, config.n_hidden)}
    head = (roofline.GPT2_VOCAB, C)
    return block | {"head": head}, sum(N * K for N, K in [*config.n_layer * list(block.values()), head])


@functools.cache
def limits(weights: int, threads: int) -> roofline.Limits:
    return roofline.Limits(weights, threads)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def linears(request: pytest.FixtureRequest) -> list[nn.Module]:
    size, matrix, contender = request.param
    matrices, total = shapes(size)
    N, K = matrices[matrix]
    activation = "swiglu" if matrix == "gate_up" else "none"
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    copies = range(-(-total // (N * K)))
    if contender == "fp32":
        return [Float(weight, activation).requires_grad_(False) for _ in copies]
    return [LINEARS[contender](*quantize_rows(weight), activation) for _ in copies]


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    per_threads = ["µs", "GB/s", "GOP/s", "of limit"]
    header = ["matrix", "tokens", "by", *(f"{name}, {n} T" for n in roofline.THREADS for name in per_threads)]
    note = ("Medians. GB/s are of weights as each holds them; of limit: the time to read the int8 weights, or to "
            "multiply by them, whichever is longer, at the speeds probed in the same run.")
    table = [[f"{size} {matrix}", str(tokens), contender, *(cell for n in roofline.THREADS for cell in cells(row[n]))]
             for (size, matrix, contender, tokens), row in rows.items()]
    roofline.publish(request, "kernels.md", header, table, note)


def cells(row: dict) -> list[str]:
    return [f"{row['microseconds']:,.0f}", f"{row['gigabytes_per_second']:.1f}", f"{row['gigaops_per_second']:,.0f}",
            f"{row['share_of_limit']:.0%}"]


@pytest.mark.parametrize("threads", roofline.THREADS)
@pytest.mark.parametrize("tokens", TOKENS)
def bench_int8_linear(benchmark, request, linears, tokens, threads):
    size, matrix, contender = request.node.callspec.params["linears"]
    N, K = shapes(size)[0][matrix]
    benchmark.group = f"{size} {matrix}, {tokens} tokens, {threads} threads"
    torch.set_num_threads(threads)
    x = torch.randn(tokens, K)
    residual = torch.randn(tokens, N) if matrix in ("o", "down") else None  # as in the model

    def every_copy():
        for linear in linears:
            linear(x, residual)

    with torch.inference_mode():
        benchmark.pedantic(every_copy, rounds=5 if tokens <= 16 else 3, warmup_rounds=1)  # the longer, the steadier
    seconds = benchmark.stats.stats.median
    weights = len(linears) * N * K
    benchmark.extra_info |= limits(weights, threads).figures(seconds, 1, 2 * tokens * weights)
    benchmark.extra_info["microseconds"] = seconds / len(linears) * 1e6
    if contender == "fp32":
        benchmark.extra_info["gigabytes_per_second"] *= 4
    rows.setdefault((size, matrix, contender, tokens), {})[threads] = benchmark.extra_info
