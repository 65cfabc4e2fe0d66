"""Times owlet::int8_linear with pytest-benchmark:  python -m pytest tests/bench/bench_kernels.py

Every matrix of a model for 1 to 512 tokens, beside what the machine allows; fp32 and torch.ao for one of them. A round
multiplies by copies of the matrix that together weigh as much as the model, so that weights come from where they would
in a model: a single matrix would stay in the second-level cache. The table is printed and left in out/bench/ with a
.json of it. report.py says how to choose sizes and threads.
"""

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from report import GPT2_VOCAB, OUT, THREADS, matrix_shapes, matrix_sizes, publish, sizes, uncaptured
from probe import LIMIT, Limits, int8_machine
from torch import Tensor, nn

from int8 import quantize_rows, torch_ao
from model import SIZES, GPTConfig

TOKENS = [1, 2, 4, 8, 16, 64, 256, 512]
CONFIGS = {size: GPTConfig(GPT2_VOCAB, **SIZES[size]) for size in sizes("base,medium")}
CASES = [(size, matrix, engine) for size, config in CONFIGS.items() for matrix, engine in
         [*((matrix, "owlet") for matrix in matrix_shapes(config)), ("gate_up", "fp32"), ("gate_up", "torch.ao")]]
limits = functools.cache(Limits)
rows: list[dict] = []


def product(engine: str, weight: Tensor, swiglu: bool) -> Callable[[Tensor, Tensor | None], Tensor]:
    """(x, residual) -> y as the engine computes it."""
    if engine == "owlet":
        q, scale = quantize_rows(weight)
        panels = torch.ops.owlet.pack_int8(q)
        return lambda x, residual: torch.ops.owlet.int8_linear(x, panels, scale, residual, swiglu)
    linear = nn.Linear(weight.size(1), weight.size(0), bias=False)
    linear.weight.data = weight.clone()
    linear = torch_ao(nn.Sequential(linear)) if engine == "torch.ao" else linear

    def multiply(x: Tensor, residual: Tensor | None) -> Tensor:
        y = linear(x)
        y = F.silu(y[..., 0::2]) * y[..., 1::2] if swiglu else y
        return y if residual is None else y + residual

    return multiply


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def linears(request: pytest.FixtureRequest) -> list[Callable[[Tensor, Tensor | None], Tensor]]:
    size, matrix, engine = request.param
    N, K = matrix_shapes(CONFIGS[size])[matrix]
    torch.manual_seed(0)
    weight = torch.randn(N, K)
    copies = math.ceil(sum(matrix_sizes(CONFIGS[size])) / (N * K))
    return [product(engine, weight, matrix == "gate_up") for _ in range(copies)]


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("tokens", TOKENS)
def bench_int8_linear(benchmark, request, linears, tokens, threads):
    size, matrix, engine = request.node.callspec.params["linears"]
    N, K = matrix_shapes(CONFIGS[size])[matrix]
    benchmark.group = f"{size} {matrix}, {tokens} tokens, {threads} threads"
    torch.set_num_threads(threads)
    x = torch.randn(tokens, K)
    residual = torch.randn(tokens, N) if matrix in ("o", "down") else None  # as in the model

    def every_copy():
        for linear in linears:
            linear(x, residual)

    with torch.inference_mode():
        benchmark.pedantic(every_copy, rounds=5 if tokens <= 16 else 3, warmup_rounds=1)  # the longer, the steadier
    if benchmark.disabled:  # it ran once, untimed
        return
    seconds = benchmark.stats.stats.median
    weights = len(linears) * N * K
    benchmark.extra_info |= {
        "matrix": f"{size} {matrix}", "tokens": tokens, "engine": engine, "threads": threads,
        "microseconds": seconds / len(linears) * 1e6,
        **limits(weights, threads).figures(seconds, 1, 2 * tokens * weights)}
    if engine == "fp32":
        benchmark.extra_info["gigabytes_per_second"] *= 4
    rows.append(benchmark.extra_info)


@pytest.fixture(scope="module", autouse=True)
def report(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if rows:
        with uncaptured(request):
            publish(OUT / "kernels", "Medians. GB/s are of the weights as each engine holds them. "
                    f"The limit is {LIMIT} in the same run. {int8_machine()}.", (rows, {
                        "matrix": "{matrix}", "tokens": "{tokens}", "engine": "{engine}", "threads": "{threads}",
                        "µs": "{microseconds:,.0f}", "GB/s": "{gigabytes_per_second:.1f}",
                        "GOP/s": "{gigaops_per_second:,.0f}", "of limit": "{share_of_limit:.0%}"}))
