"""The int8 kernels: exact sums, the same bits on every instruction set and thread count, clear errors."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_equals_reference, full_range, make_linear, random_int8, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from int8 import arrays, int8_linear_reference, quantize_state, quantize_tokens

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

ROOT = Path(__file__).resolve().parent.parent
ISAS = owlet_kernels.isas()
SIZES = [1, 3, 7, 16, 63, 64, 65, 257, 1408]
MAX_K = owlet_kernels.MAX_K

int8_linear = torch.ops.owlet.int8_linear
pack_int8 = torch.ops.owlet.pack_int8


@pytest.fixture(autouse=True)
def restore_settings():
    isa, threads = os.environ.pop("OWLET_ISA", None), torch.get_num_threads()
    yield
    os.environ.pop("OWLET_ISA", None)
    if isa is not None:
        os.environ["OWLET_ISA"] = isa
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
    os.environ["OWLET_ISA"] = isa
    for x, w, sums in exact_products(kind):
        for N in SIZES:
            packed, ones = pack_int8(w[:N]), torch.ones(N)
            for M in SIZES:
                y = int8_linear(x[:M], packed, ones)
                assert torch.equal(y, sums[:M, :N]), (M, N, w.shape[1])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sign", [1, -1])
def test_largest_k_does_not_overflow(isa, sign):
    os.environ["OWLET_ISA"] = isa
    w = torch.full((2, MAX_K), 127, dtype=torch.int8)
    y = int8_linear(torch.full((1, MAX_K), 127.0 * sign), pack_int8(w), torch.ones(2))
    assert torch.equal(y, torch.full((1, 2), float(sign * 127 * 127 * MAX_K)))


# --- the whole op -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    M=st.integers(1, 40),
    N=st.integers(1, 200),
    K=st.integers(1, 300),
    swiglu=st.booleans(),
    added=st.booleans(),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 4),
)
def test_equals_reference_for_any_shape(M, N, K, swiglu, added, isa, threads):
    N += N % 2 if swiglu else 0
    os.environ["OWLET_ISA"] = isa
    torch.set_num_threads(threads)
    x, w, scale, residual = make_linear(M, N, K, swiglu)
    x[M // 2] = 0
    residual = residual if added else None
    y = int8_linear(x, pack_int8(w), scale, residual, swiglu)
    assert_equals_reference(y, x, w, scale, residual, swiglu)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("M", [1, 200])
def test_same_bits_on_every_isa_and_thread_count(M, swiglu):
    x, w, scale, residual = make_linear(M, 1408, 520, swiglu)
    packed = pack_int8(w)
    results = []
    for isa in ISAS:
        for threads in [1, 2, 3, 5]:
            os.environ["OWLET_ISA"] = isa
            torch.set_num_threads(threads)
            results.append(int8_linear(x, packed, scale, residual, swiglu))
    assert all(torch.equal(y, results[0]) for y in results[1:])


def test_silu_over_its_whole_range():
    """Of gates v beside an up of 127 / 127."""
    v = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e15, -1e4, -0.0, 1e4, 1e15])])
    x = torch.stack([v, v.abs().clamp(min=1)], dim=1)
    w, scale = torch.tensor([[127, 0], [0, 127]], dtype=torch.int8), torch.tensor([1 / 127, 1 / 127])
    gate, up = int8_linear(x, pack_int8(w), scale).unbind(1)
    y = int8_linear(x, pack_int8(w), scale, swiglu=True)
    expected = torch.nn.functional.silu(gate.double()) * up
    torch.testing.assert_close(y[:, 0].double(), expected, rtol=1e-6, atol=1e-33)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("swiglu", [False, True])
def test_a_token_that_is_not_finite_yields_nan_and_no_other_does(bad, swiglu):
    x, w, scale, residual = make_linear(9, 130, 200, swiglu)
    packed = pack_int8(w)
    good = int8_linear(x, packed, scale, residual, swiglu)
    x[4, 77] = bad
    y = int8_linear(x, packed, scale, residual, swiglu)
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
    x, w, scale, residual = make_linear(6, 70, 33)
    packed = pack_int8(w)
    y = int8_linear(x, packed, scale, residual)

    def strided(t):
        return t.t().contiguous().t()

    assert torch.equal(int8_linear(strided(x), packed, scale, strided(residual)), y)
    assert torch.equal(pack_int8(strided(w)), packed)
    doubled = torch.stack([scale, scale], 1)[:, 0]
    assert torch.equal(int8_linear(x, packed, doubled, residual), y)
    batch = int8_linear(x.view(2, 3, 33), packed, scale, residual.view(2, 3, 70))
    assert torch.equal(batch, y.view(2, 3, 70))
    assert torch.equal(int8_linear(x[0], packed, scale, residual[0]), y[0])
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


# --- errors -------------------------------------------------------------------------------------

X, PACKED, SCALE = torch.randn(2, 8), pack_int8(random_int8(6, 8)), torch.rand(6)


@pytest.mark.parametrize(
    "args, message",
    [
        ({"x": X.double()}, "x must be Float, got Double"),
        ({"x": torch.tensor(1.0)}, "x must have shape"),
        ({"x": torch.ones(2, 0), "weight": PACKED[:, :0]}, "K must be 1 to .*, got 0"),
        ({"x": torch.randn(2, 9)}, r"weight must have shape \[1, 3, 64, 4\], got \[1, 2, 64, 4\]"),
        ({"weight": PACKED.char()}, "weight must be Byte, got Char"),
        ({"weight": PACKED[0]}, r"weight must have shape .*, got \[2, 64, 4\]"),
        ({"scale": SCALE.half()}, "scale must be Float, got Half"),
        ({"scale": SCALE[None]}, r"scale must have shape \[6\], got \[1, 6\]"),
        ({"scale": torch.rand(65)}, r"weight must have shape \[2, 2, 64, 4\]"),
        ({"residual": torch.rand(6)}, r"residual must have shape \[2, 6\], got \[6\]"),
        ({"residual": torch.rand(2, 6).double()}, "residual must be Float, got Double"),
        ({"residual": torch.rand(2, 6), "swiglu": True}, r"residual must have shape \[2, 3\]"),
        ({"scale": SCALE[:5], "swiglu": True}, "swiglu needs an even N"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_int8_linear_refuses(args, message):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        int8_linear(**{"x": X, "weight": PACKED, "scale": SCALE, **args})


def test_int8_linear_refuses_a_k_whose_sums_could_overflow():
    K = MAX_K + 1
    with pytest.raises(RuntimeError, match=f"K must be 1 to {MAX_K}, .*, got {K}"):
        int8_linear(torch.ones(1, K), pack_int8(random_int8(1, K)), torch.ones(1))


SIZE_NAMES = ["n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "vocab_size", "block_size", "n_layer", "qk_norm",
              "slices", "fine_head", "tied"]


def flat_list(**changes):
    """A model of one block as a flat list: n_head 4, n_kv_head 2, head_dim 6, n_embd 10, n_hidden 7, 11 tokens."""
    model = random_model(n_layer=1, n_head=4, n_kv_head=2, head_dim=6, n_embd=10, n_hidden=7, vocab_size=11,
                         tie_embeddings=False, qk_norm=False, block_size=5)
    flat = list(arrays(model.config, quantize_state(model), slices=1, fine_head=False))
    for name, value in changes.items():
        flat[0][SIZE_NAMES.index(name)] = value
    return flat


@pytest.mark.parametrize("change, message", [
    *(({name: size}, f"{name} must be 1 to {MAX_K}, got {size}")
      for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden") for size in (0, -1, 2**62)),
    *(({name: 0}, f"{name} must be 1 to 1048576, got 0") for name in ("vocab_size", "block_size", "n_layer")),
    ({"n_head": MAX_K // 6 + 1, "n_kv_head": 1}, "n_head \\* head_dim must be at most"),
    ({"n_kv_head": 3}, "n_kv_head must be a divisor of n_head, got 3"),
    ({"n_kv_head": 8}, "n_kv_head must be a divisor of n_head, got 8"),
    ({"head_dim": 5}, "head_dim must be even, got 5"),
    ({"slices": 2}, "slices must be a divisor of n_hidden, got 2"),
    ({"slices": 0}, "slices must be a divisor of n_hidden, got 0"),
    ({"n_hidden": 8}, r"gate_up must be \(16, 10\) on the CPU, got \[14, 10\]"),
    ({"block_size": 4}, r"cos must be \(4, 3\) on the CPU, got \[5, 3\]"),
    ({"n_head": 2}, r"qkv must be \(36, 10\) on the CPU, got \[48, 10\]"),
    ({"n_layer": 2}, r"input_norm must be Float|qkv must be|must be")])
def test_the_decoder_refuses_sizes(change, message):
    owlet_kernels.Decoder(flat_list())
    with pytest.raises(RuntimeError, match=message):
        owlet_kernels.Decoder(flat_list(**change))


@pytest.mark.parametrize("at, array, message", [
    (0, torch.zeros(3).long(), "sizes must be 12 numbers"),
    (2, torch.rand(5, 3, device="meta"), "cos must be .* on meta"),
    (4, torch.rand(10).double(), "input_norm must be Float, got Double"),
    (5, torch.rand(48, 10), "qkv must be Char, got Float"),
    (5, torch.full((48, 10), -128, dtype=torch.int8), "got a -128"),
    (6, torch.rand(47), r"qkv must be \(1, 48\)")])
def test_the_decoder_refuses_arrays(at, array, message):
    flat = flat_list()
    flat[at] = array
    with pytest.raises(RuntimeError, match=message):
        owlet_kernels.Decoder(flat)
    with pytest.raises(RuntimeError, match="is missing"):
        owlet_kernels.Decoder(flat_list()[:-1])
    with pytest.raises(RuntimeError, match="more arrays"):
        owlet_kernels.Decoder([*flat_list(), torch.zeros(1)])


@pytest.mark.parametrize("w, message", [
    (torch.tensor([[1, -128]], dtype=torch.int8), "got a -128"),
    (torch.zeros(2, 2), r"w must be Char \(N, K\), not empty, got Float"),
    (torch.zeros(2, dtype=torch.int8), r"w must be Char \(N, K\), not empty, got Char \[2\]"),
    (torch.zeros(0, 2, dtype=torch.int8), r"got Char \[0, 2\]")])
def test_pack_int8_refuses(w, message):
    with pytest.raises(RuntimeError, match=message):
        pack_int8(w)


# --- torch's machinery --------------------------------------------------------------------------


def test_the_operators_have_the_right_schema():
    x, w, scale, residual = make_linear(3, 66, 20, swiglu=True)
    checks = ("test_schema", "test_autograd_registration")  # nothing compiles an int8 model, so no fake tensors
    library.opcheck(pack_int8.default, (w,), test_utils=checks)
    library.opcheck(int8_linear.default, (x, pack_int8(w), scale, residual, True), test_utils=checks)


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
