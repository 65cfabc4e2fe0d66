"""The int8 kernels: exact sums, the same bits on every instruction set and thread count, clear errors."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_equals_reference, full_range, make_linear, random_int8
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from int8 import int8_linear_reference, quantize_tokens

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

ROOT = Path(__file__).resolve().parent.parent
ISAS = owlet_kernels.isas()
SIZES = [1, 3, 7, 16, 63, 64, 65, 257, 1408]
MAX_K = (2**31 - 1) // (128 * 127)

int8_linear = torch.ops.owlet.int8_linear
pack_int8 = torch.ops.owlet.pack_int8
int8_rows = torch.ops.owlet.int8_rows
pack_tiles = owlet_kernels.pack_tiles


@pytest.fixture(autouse=True)
def restore_settings():
    isa, threads = owlet_kernels.isa(), torch.get_num_threads()
    yield
    owlet_kernels.use_isa(isa)
    torch.set_num_threads(threads)


# --- exact sums ---------------------------------------------------------------------------------


@functools.cache
def exact_products(kind):
    """For every K of SIZES: x of whole numbers, int8 w, and the sums in float32, rounded once.

    The largest of every row of x is 127, so that its scale is 1, or 0, so that its scale is 0.
    """
    torch.manual_seed(0)
    M = N = max(SIZES)
    products = []
    for K in SIZES:
        make = full_range if kind == "full range" else random_int8
        x, w = make(M, K).float(), make(N, K).to(torch.int8)
        x[:, 0] = 127
        if kind == "full range":
            x[0], w[0] = 127, 127  # the largest sum there is
        if kind == "zeros":
            x[::2], w[1::2] = 0, 0
        products.append((x, w, (x.double() @ w.double().T).float()))  # float64: exact to 2^53
    return products


@pytest.mark.parametrize("kind", ["random", "full range", "zeros"])
@pytest.mark.parametrize("isa", ISAS)
def test_sums_are_exact(isa, kind):
    owlet_kernels.use_isa(isa)
    for x, w, sums in exact_products(kind):
        for N in SIZES:
            packed, ones = pack_int8(w[:N]), torch.ones(N)
            for M in SIZES:
                y = int8_linear(x[:M], packed, ones)
                assert torch.equal(y, sums[:M, :N]), (M, N, w.shape[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_k_does_not_overflow(isa, sign):
    owlet_kernels.use_isa(isa)
    w = torch.full((2, MAX_K), 127, dtype=torch.int8)
    y = int8_linear(torch.full((1, MAX_K), 127.0 * sign), pack_int8(w), torch.ones(2))
    assert torch.equal(y, torch.full((1, 2), float(sign * 127 * 127 * MAX_K)))


# --- the whole op -------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "silu", "swiglu"])
@pytest.mark.parametrize("extras", ["", "bias", "residual", "bias residual"])
def test_equals_reference(activation, extras):
    x, w, scale, bias, residual = make_linear(13, 130, 257, activation)
    x[3] = 0
    kwargs = {
        "bias": bias if "bias" in extras else None,
        "residual": residual if "residual" in extras else None,
        "activation": activation,
    }
    y = int8_linear(x, pack_int8(w), scale, **kwargs)
    assert_equals_reference(y, x, w, scale, **kwargs)


@settings(deadline=None, max_examples=200)
@given(
    M=st.integers(1, 40),
    N=st.integers(1, 200),
    K=st.integers(1, 300),
    activation=st.sampled_from(["none", "silu", "swiglu"]),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 4),
)
def test_equals_reference_for_any_shape(M, N, K, activation, isa, threads):
    N += N % 2 if activation == "swiglu" else 0
    owlet_kernels.use_isa(isa)
    torch.set_num_threads(threads)
    x, w, scale, bias, residual = make_linear(M, N, K, activation)
    y = int8_linear(x, pack_int8(w), scale, bias, residual, activation)
    assert_equals_reference(y, x, w, scale, bias, residual, activation)


@pytest.mark.parametrize("activation", ["none", "silu", "swiglu"])
@pytest.mark.parametrize("M", [1, 200])
def test_same_bits_on_every_isa_and_thread_count(M, activation):
    x, w, scale, bias, residual = make_linear(M, 1408, 520, activation)
    packed = pack_int8(w)
    results = []
    for isa in ISAS:
        for threads in [1, 2, 3, 5]:
            owlet_kernels.use_isa(isa)
            torch.set_num_threads(threads)
            results.append(int8_linear(x, packed, scale, bias, residual, activation))
    assert all(torch.equal(y, results[0]) for y in results[1:])


def test_silu_over_its_whole_range():
    v = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e30, -1e4, -0.0, 1e4, 1e30])])
    packed, scale = pack_int8(torch.tensor([[127]], dtype=torch.int8)), torch.tensor([1 / 127])
    x = int8_linear(v[:, None], packed, scale)
    y = int8_linear(v[:, None], packed, scale, activation="silu")
    expected = torch.nn.functional.silu(x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-35)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["none", "silu", "swiglu"])
def test_a_token_that_is_not_finite_yields_nan_and_no_other_does(bad, activation):
    x, w, scale, bias, residual = make_linear(9, 130, 200, activation)
    packed = pack_int8(w)
    good = int8_linear(x, packed, scale, bias, residual, activation)
    x[4, 77] = bad
    y = int8_linear(x, packed, scale, bias, residual, activation)
    assert y[4].isnan().all()
    y[4] = good[4]
    assert torch.equal(y, good)


def test_tokens_are_quantized_as_the_reference_does():
    """The identity as weights shows every q * scale."""
    torch.manual_seed(0)
    halves = torch.arange(-126.5, 127)
    halves[0] = 127  # makes the scale 1, so that every half is a tie, to be rounded to even
    x = torch.stack([halves, torch.randn(len(halves)), torch.zeros(len(halves))])
    q, scale = quantize_tokens(x)
    y = int8_linear(x, pack_int8(torch.eye(len(halves), dtype=torch.int8)), torch.ones(len(halves)))
    assert torch.equal(y, q * scale)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-31, 1e-29, 1e34])
def test_tiny_and_huge_tokens(value):
    x, w = torch.full((2, 64), value), random_int8(5, 64)
    scale = torch.full((5,), 1e-4)
    y = int8_linear(x, pack_int8(w), scale)
    assert torch.equal(y, int8_linear_reference(x, w, scale))
    assert torch.isfinite(y).all()


def test_strides_leading_dimensions_and_empty_batches():
    x, w, scale, bias, residual = make_linear(6, 70, 33)
    packed = pack_int8(w)
    y = int8_linear(x, packed, scale, bias, residual)

    def strided(t):
        return t.t().contiguous().t()

    assert torch.equal(int8_linear(strided(x), packed, scale, bias, strided(residual)), y)
    assert torch.equal(pack_int8(strided(w)), packed)
    doubled = torch.stack([scale, scale], 1)[:, 0]
    assert torch.equal(int8_linear(x, packed, doubled, bias, residual), y)
    batch = int8_linear(x.view(2, 3, 33), packed, scale, bias, residual.view(2, 3, 70))
    assert torch.equal(batch, y.view(2, 3, 70))
    assert torch.equal(int8_linear(x[0], packed, scale, bias, residual[0]), y[0])
    assert int8_linear(torch.empty(4, 0, 33), packed, scale).shape == (4, 0, 70)


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("K", SIZES)
def test_packed_layout(N, K):
    w = random_int8(N, K)
    packed = pack_int8(w)
    panels, quads = -(-N // 64), -(-K // 4)
    assert packed.shape == (panels, quads, 64, 4) and packed.dtype == torch.uint8
    rows = packed.transpose(1, 2).reshape(panels * 64, quads * 4).int() - 128
    assert torch.equal(rows[:N, :K], w.int())
    assert not rows[N:].any() and not rows[:, K:].any()


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("K", SIZES)
def test_tiled_layout(N, K):
    w = random_int8(N, K)
    tiles = pack_tiles(w)
    assert tiles.shape == (-(-N // 8), -(-K // 64), 8, 64) and tiles.dtype == torch.int8 and tiles.is_contiguous()
    rows = tiles.transpose(1, 2).flatten(2).flatten(0, 1)
    assert torch.equal(rows[:N, :K], w)
    assert not rows[N:].any() and not rows[:, K:].any()
    assert torch.equal(pack_tiles(w.t().contiguous().t()), tiles)


@pytest.mark.parametrize("pack", [pack_int8, pack_tiles], ids=["panels", "tiles"])
@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("K", SIZES)
def test_rows(N, K, pack):
    w, scale = random_int8(N, K), torch.rand(N)
    for shape in [(), (0,), (1,), (7,), (2, 3)]:
        idx = torch.randint(N, shape)
        expected = w[idx].float() * scale[idx].unsqueeze(-1)
        assert torch.equal(int8_rows(pack(w), scale, idx, K), expected)
    every_other, doubled = torch.arange(N).expand(2, N).t(), torch.stack([scale, scale], 1)[:, 0]
    assert torch.equal(int8_rows(pack(w), doubled, every_other, K)[:, 1], w.float() * scale[:, None])


# --- memory -------------------------------------------------------------------------------------

def test_panels_are_one_block_in_order_of_use():
    for shapes in [[(70, 33), (1, 1), (64, 257)], [(640, 4096), (1000, 4096)]]:  # without and with huge pages
        panels = owlet_kernels.Panels(shapes)
        weights = [random_int8(*shape) for shape in shapes]
        packed = [panels.pack(w) for w in weights]
        with pytest.raises(RuntimeError, match=r"w must fit: \[1, 4\] takes 256 bytes, of which 0 are left"):
            panels.pack(random_int8(1, 4))
        del panels  # the tensors keep the block
        for w, p, following in zip(weights, packed, [*packed[1:], None], strict=True):
            assert torch.equal(p, pack_int8(w)) and p.is_contiguous()
            assert following is None or following.data_ptr() == p.data_ptr() + p.numel()
        assert len({p.untyped_storage().data_ptr() for p in packed}) == 1


@pytest.mark.parametrize("w, message", [
    (torch.tensor([[1, -128]], dtype=torch.int8), "got a -128"),
    (torch.zeros(2, 2), "w must be Char, got Float"),
    (torch.zeros(2, dtype=torch.int8), r"w must have shape \(N, K\), got \[2\]"),
    (torch.zeros(65, 2, dtype=torch.int8), r"w must fit: \[65, 2\] takes 512 bytes, of which 256 are left")])
def test_panels_refuse(w, message):
    panels = owlet_kernels.Panels([(2, 2)])
    with pytest.raises(RuntimeError, match=message):
        panels.pack(w)


# --- errors -------------------------------------------------------------------------------------

X, PACKED, SCALE = torch.randn(2, 8), pack_int8(random_int8(6, 8)), torch.rand(6)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"x": X.double()}, "x must be Float, got Double"),
        ({"x": torch.tensor(1.0)}, "x must have shape"),
        ({"x": torch.ones(2, 0), "packed": PACKED[:, :0]}, "K must be 1 to .*, got 0"),
        ({"x": torch.randn(2, 9)}, r"packed must have shape \[1, 3, 64, 4\], got \[1, 2, 64, 4\]"),
        ({"packed": PACKED.char()}, "packed must be Byte, got Char"),
        ({"packed": PACKED[0]}, r"packed must have shape .*, got \[2, 64, 4\]"),
        ({"scale": SCALE.half()}, "scale must be Float, got Half"),
        ({"scale": SCALE[None]}, r"scale must have shape \(N\), got \[1, 6\]"),
        ({"scale": torch.rand(65)}, r"packed must have shape \[2, 2, 64, 4\]"),
        ({"scale": torch.rand(6, device="meta")}, "scale must be on x's device, cpu, got meta"),
        ({"bias": torch.rand(5)}, r"bias must have shape \[6\], got \[5\]"),
        ({"bias": torch.rand(6).double()}, "bias must be Float, got Double"),
        ({"residual": torch.rand(6)}, r"residual must have shape \[2, 6\], got \[6\]"),
        ({"residual": torch.rand(2, 6), "activation": "swiglu"}, r"residual must have shape \[2, 3\]"),
        ({"activation": "gelu"}, "activation must be none, silu or swiglu, got gelu"),
        ({"scale": SCALE[:5], "activation": "swiglu"}, "swiglu needs an even N"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_int8_linear_refuses(args, message):
    with pytest.raises(RuntimeError, match=message):
        int8_linear(**{"x": X, "packed": PACKED, "scale": SCALE, **args})


def test_int8_linear_refuses_a_k_whose_sums_could_overflow():
    K = MAX_K + 1
    with pytest.raises(RuntimeError, match=f"K must be 1 to {MAX_K}, .*, got {K}"):
        int8_linear(torch.ones(1, K), pack_int8(random_int8(1, K)), torch.ones(1))


@pytest.mark.parametrize("args, message", [
    ({"idx": torch.tensor([0, 6])}, "idx must be 0 to 5, got 6"),
    ({"idx": torch.tensor(-1)}, "idx must be 0 to 5, got -1"),
    ({"idx": torch.tensor([0]).int()}, "idx must be Long, got Int"),
    ({"K": 0}, "K must be 1 or more, got 0"),
    ({"K": 65}, r"packed must have shape \[1, (17, 64, 4|2, 8, 64)\], got \[1, (2, 64, 4|1, 8, 64)\]"),
    ({"packed": pack_tiles(random_int8(6, 65))}, r"packed must have shape \[1, 1, 8, 64\], got \[1, 2, 8, 64\]"),
    ({"scale": SCALE[None]}, r"scale must have shape \(N\), got \[1, 6\]"),
    ({"scale": SCALE.half()}, "scale must be Float, got Half"),
    ({"scale": SCALE.to("meta")}, "scale must be on idx's device, cpu, got meta")])
@pytest.mark.parametrize("pack", [pack_int8, pack_tiles], ids=["panels", "tiles"])
def test_int8_rows_refuses(pack, args, message):
    with pytest.raises((RuntimeError, IndexError), match=message):
        int8_rows(**{"packed": pack(random_int8(6, 8)), "scale": SCALE, "idx": torch.tensor([0]), "K": 8, **args})


def decoder_arguments():
    """A model of one block: n_head 4, n_kv_head 2, head_dim 6, n_embd 10, n_hidden 7, a vocabulary of 11."""
    def matrix(N, K):
        return pack_int8(random_int8(N, K)), torch.rand(N)

    block = (torch.rand(10), matrix(48, 10), None, None, matrix(10, 24), torch.rand(10), matrix(14, 10),
             [matrix(10, 7)])
    return {"n_embd": 10, "n_head": 4, "n_kv_head": 2, "head_dim": 6, "n_hidden": 7, "norm_eps": 1e-6,
            "cos": torch.rand(5, 3), "sin": torch.rand(5, 3), "embedding": matrix(11, 10), "blocks": [block],
            "norm": torch.rand(10), "head": matrix(11, 10)}


@pytest.mark.parametrize("change, message", [
    *(({name: size}, f"{name} must be 1 to {MAX_K}, got {size}")
      for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden") for size in (0, -1, 2**62)),
    ({"n_kv_head": 3}, "n_head must be a multiple of n_kv_head, got 4 and 3"),
    ({"n_kv_head": 8}, "n_head must be a multiple of n_kv_head, got 4 and 8"),
    ({"head_dim": 5}, "head_dim must be a multiple of 2, .*, got 5"),
    ({"blocks": []}, "blocks must be 1 or more, got 0"),
    *(({"blocks": [(*decoder_arguments()["blocks"][0][:7], slices)]}, f"slices of equal size, got {len(slices)}")
      for slices in ([], [(torch.zeros(1, 1, 64, 4, dtype=torch.uint8), torch.rand(10))] * 2)),
    ({"cos": torch.rand(0)}, r"cos must be contiguous Float \[0, 3\] on cpu, got Float \[0\]"),
    ({"sin": torch.rand(4, 3)}, r"sin must be contiguous Float \[5, 3\] on cpu, got Float \[4, 3\]"),
    ({"cos": torch.rand(5, 3, device="meta")}, "cos must be on cpu, got meta"),
    ({"norm": torch.rand(10).double()}, r"norm must be contiguous Float \[10\] on cpu, got Double"),
    ({"n_hidden": 8}, r"gate_up must be contiguous Float \[16\] on cpu, got Float \[14\]"),
    ({"n_head": 2}, r"qkv must be contiguous Float \[36\] on cpu, got Float \[48\]")])
def test_the_decoder_refuses(change, message):
    owlet_kernels.Decoder(**decoder_arguments())
    with pytest.raises(RuntimeError, match=message):
        owlet_kernels.Decoder(**decoder_arguments() | change)


@pytest.mark.parametrize(
    "w, message",
    [
        (torch.tensor([[1, -128]], dtype=torch.int8), "got a -128"),
        (torch.zeros(2, 2), "w must be Char, got Float"),
        (torch.zeros(2, dtype=torch.int8), r"w must have shape \(N, K\), got \[2\]"),
        (torch.zeros(0, 2, dtype=torch.int8), r"w must not be empty, got \[0, 2\]"),
    ],
)
def test_pack_int8_refuses(w, message):
    with pytest.raises(RuntimeError, match=message):
        pack_int8(w)


# --- torch's machinery --------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["none", "silu", "swiglu"])
def test_opcheck(activation):
    x, w, scale, bias, residual = make_linear(3, 66, 20, activation)
    library.opcheck(pack_int8.default, (w,))
    for packed in (pack_int8(w), pack_tiles(w)):
        library.opcheck(int8_rows.default, (packed, scale, torch.tensor([[3, 0], [65, 3]]), 20))
    library.opcheck(int8_linear.default, (x, pack_int8(w), scale))
    library.opcheck(int8_linear.default, (x, pack_int8(w), scale, bias, residual, activation))


def test_compiles_into_one_graph():
    x, w, scale, bias, residual = make_linear(5, 66, 20)
    packed = pack_int8(w)

    def f(x, residual):
        return int8_linear(x * 2, packed, scale, bias, residual, activation="silu") + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for M in [5, 3]:
        assert torch.equal(compiled(x[:M], residual[:M]), f(x[:M], residual[:M]))


# --- instruction sets, threads ------------------------------------------------------------------


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("isa", ["", *ISAS])
def test_owlet_isa_chooses(isa):
    result = python("import torch, owlet_kernels; print(owlet_kernels.isa())", OWLET_ISA=isa)
    assert result.stdout.strip() == (isa or ISAS[0]), result.stderr


@pytest.mark.parametrize("isa", ["sse9", "neon" if "avx2" in ISAS else "avx2"])
def test_owlet_isa_refuses(isa):
    result = python("import torch, owlet_kernels; owlet_kernels.isa()", OWLET_ISA=isa)
    message = f"instruction set '{isa}' (OWLET_ISA) is unknown or not supported by this CPU"
    assert result.returncode != 0
    assert f"{message}, which has: {', '.join(ISAS)}" in result.stderr
    with pytest.raises(ValueError, match="unknown or not supported"):
        owlet_kernels.use_isa(isa)


@pytest.mark.parametrize("isa", ISAS)
def test_every_variant_sums_one_token_exactly(isa):
    """They differ in the order of reading alone; the first and the last panel have no neighbour to prefetch from."""
    owlet_kernels.use_isa(isa)
    for variant in owlet_kernels.variants():
        owlet_kernels.use_variant(variant)
        assert owlet_kernels.variant() == variant
        for K in (1, 4, 15, 63, 64, 257, 4097):
            for N in (1, 64, 130):
                x, w = full_range(1, K).float(), full_range(N, K)
                y = int8_linear(x, pack_int8(w), torch.ones(N))
                assert torch.equal(y, int8_linear_reference(x, w, torch.ones(N))), (variant, K, N)
    with pytest.raises(ValueError, match=r"9x9' .*, which has: "):
        owlet_kernels.use_variant("9x9")


@pytest.mark.parametrize("variant", ["", owlet_kernels.variants()[-1], "9x9"])
def test_owlet_kernel_chooses(variant):
    code = """if True:
        import torch, int8
        from generate import generate
        from model import GPT, GPTConfig
        model = int8.quantize(GPT(GPTConfig(n_layer=1)), "owlet")
        list(generate(model, torch.zeros(1, 1, dtype=torch.long), 50))
        print(model.backend)"""
    result = python(code, OWLET_KERNEL=variant)
    if variant == "9x9":
        assert "kernel '9x9' (OWLET_KERNEL) is unknown" in result.stderr
    else:
        expected = [variant] if variant else owlet_kernels.variants()
        assert result.stdout.strip() in [f"owlet ({ISAS[0]}, {name})" for name in expected], result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_runs_on_torchs_threads(threads):
    """The op starts as many threads as torch is told to, in the one OpenMP runtime there is."""
    if b"GOMP_parallel" not in Path(owlet_kernels.__file__).read_bytes():
        pytest.skip("the kernels were built without OpenMP: the decoder has threads of its own, the op has one")
    code = f"""if True:
        import os, re, torch, owlet_kernels
        x, w, scale = torch.ones(64, 512), torch.ones(2048, 512, dtype=torch.int8), torch.ones(2048)
        torch.set_num_threads({threads})
        before = len(os.listdir("/proc/self/task"))
        torch.ops.owlet.int8_linear(x, torch.ops.owlet.pack_int8(w), scale)
        after = len(os.listdir("/proc/self/task"))
        maps = open("/proc/self/maps").read()
        print(after - before, len(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp5)\\S*", maps))))
    """
    result = python(code, OMP_NUM_THREADS="1")
    assert result.stdout.split() == [str(threads - 1), "1"], result.stderr


# --- without torch ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "compiler, flags, runner",
    [
        ("c++", ["-O2"], []),
        pytest.param("c++", ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], [],
                     marks=pytest.mark.long),
        pytest.param("c++", ["-O1", "-fsanitize=thread"], [], marks=pytest.mark.long),
        pytest.param("aarch64-linux-gnu-g++", ["-O2", "-static"], ["qemu-aarch64"], marks=pytest.mark.long),
        pytest.param("clang++", ["-O2"], [], marks=pytest.mark.long),
    ],
    ids=["native", "sanitized", "threads", "aarch64", "clang"],
)
def test_native_self_test(compiler, flags, runner, tmp_path):
    for tool in [compiler, *runner]:
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    command = [compiler, "-std=c++20", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    sources = [ROOT / "tests/selftest.cpp", *(ROOT / "csrc").glob("[dw]*.cpp"), *(ROOT / "csrc/kernels").glob("*.cpp")]
    subprocess.run([*command, *sources, "-o", tmp_path / "selftest"], check=True)
    result = subprocess.run([*runner, tmp_path / "selftest"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "neon" in result.stdout or not runner
