"""int8_linear by the reference, by every instruction set of this CPU and on the emulated GPU.

tests/test_cuda.py runs some of these tests on a GPU, with a `product` of its own.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from conftest import assert_equals_reference, full_range, make_linear, random_int8
from test_cuda_kernels import emulated_linear
from torch import Tensor

import int8
from int8 import int8_linear_reference

ISAS = int8.owlet_kernels.isas() if int8.owlet_kernels is not None else []
SIZES = [1, 3, 7, 16, 63, 64, 65, 257, 1408]
MAX_K = (2**31 - 1) // (128 * 127)


@dataclass
class Product:
    """A way to compute int8_linear(x (M, K), w (N, K), scale, residual, swiglu), and the sizes that it is tested at."""

    linear: Callable[..., Tensor]
    M: list[int]
    N: list[int]
    K: list[int]


def packed_linear(x: Tensor, w: Tensor, *more: object) -> Tensor:
    return torch.ops.owlet.int8_linear(x, torch.ops.owlet.pack_int8(w), *more)


@pytest.fixture(params=[*ISAS, "reference", "emulated", pytest.param("emulated long", marks=pytest.mark.long)])
def product(request, monkeypatch) -> Product:
    if request.param in ISAS:
        monkeypatch.setenv("OWLET_ISA", request.param)
        return Product(packed_linear, SIZES, SIZES, SIZES)
    if request.param == "reference":
        return Product(int8_linear_reference, [1, 65], [1, 66, 264], SIZES)
    # up to 4 tokens, which gemv quantizes itself; one to four groups of 16; whole and partial blocks of 128 for gemm
    tokens, K = ([1, 3, 4, 5, 16, 17, 33, 64, 65, 130], [1408]) if "long" in request.param else ([1, 5, 65], [])
    return Product(emulated_linear, tokens, [1, 66, 264], [1, 63, 64, 257, *K])


@functools.cache
def exact_product(kind: str, K: int) -> tuple[Tensor, Tensor, Tensor]:
    """x of whole numbers, int8 w, and the sums in float32, rounded once.

    The largest of every row of x is 127, so that its scale is 1, or 0, so that its scale is 0.
    """
    torch.manual_seed(0)
    make = full_range if kind == "full range" else random_int8
    x, w = make(max(SIZES), K).float(), make(max(SIZES), K)
    x[:, 0] = 127
    if kind == "full range":
        x[0], w[0] = 127, 127  # the largest sum there is
    if kind == "zeros":
        x[::2], w[1::2] = 0, 0
    return x, w, (x.double() @ w.double().T).float()  # float64: exact to 2^53


@pytest.mark.parametrize("kind", ["random", "full range", "zeros"])
@pytest.mark.parametrize("K", SIZES)
def test_sums_are_exact(product, K, kind):
    x, w, sums = exact_product(kind, K)
    for N in product.N if K in product.K else ():
        for M in product.M:
            assert torch.equal(product.linear(x[:M], w[:N], torch.ones(N)), sums[:M, :N]), (M, N)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("M", [1, 20, 70])
def test_largest_k_does_not_overflow(product, M, sign):
    if product.linear is emulated_linear and M > 20:
        pytest.skip("takes minutes on the emulator")
    x, w = torch.full((M, MAX_K), 127.0 * sign), torch.full((2, MAX_K), 127, dtype=torch.int8)
    assert torch.equal(product.linear(x, w, torch.ones(2)), torch.full((M, 2), float(sign * 127 * 127 * MAX_K)))


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("M", [2, 20, 70])
@pytest.mark.parametrize("N", [130, 131])
def test_equals_reference(product, M, N, swiglu):
    x, w, scale, residual = make_linear(M, N + N % 2 if swiglu else N, 257, swiglu)
    for added in (None, residual):
        y = product.linear(x, w, scale, added, swiglu)
        assert_equals_reference(y, x, w, scale, added, swiglu)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("M", [1, 9, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_yields_nan_and_no_other_does(product, M, bad, swiglu):
    x, w, scale, residual = make_linear(M, 130, 200, swiglu)
    good = product.linear(x, w, scale, residual, swiglu)
    x[M // 2, 77] = bad
    y = product.linear(x, w, scale, residual, swiglu)
    assert y[M // 2].isnan().all()
    y[M // 2] = good[M // 2]
    assert torch.equal(y, good)


@pytest.mark.parametrize("M", [1, 5, 70])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-31, 1e-29, 1e34])
def test_tiny_and_huge_tokens(product, M, value):
    x, w, scale = torch.full((M, 64), value), random_int8(10, 64), torch.full((10,), 1e-4)
    y = product.linear(x, w, scale)
    assert torch.equal(y, int8_linear_reference(x, w, scale)) and y.isfinite().all()
