"""The int8 kernels of a CPU: any shape, the same bits on every instruction set and thread count, clear errors."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_equals_reference, make_linear, random_int8, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from int8 import arrays, quantize_state, quantize_tokens

owlet_kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

ISAS = owlet_kernels.isas()
MAX_K = owlet_kernels.MAX_K

int8_linear = torch.ops.owlet.int8_linear
pack_int8 = torch.ops.owlet.pack_int8


@pytest.fixture(autouse=True)
def restore_settings(monkeypatch):
    monkeypatch.setenv("OWLET_ISA", "")
    yield
    torch.set_num_threads(1)


# ---------------------------------------------------------------- the whole op

@settings(deadline=None, max_examples=200)
@given(M=st.integers(1, 40), N=st.integers(1, 200), K=st.integers(1, 300), swiglu=st.booleans(), added=st.booleans(),
       isa=st.sampled_from(ISAS), threads=st.integers(1, 4))
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
    """The gates are v, and each up is 127 / 127."""
    v = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([-1e15, -1e4, -0.0, 1e4, 1e15])])
    x = torch.stack([v, v.abs().clamp(min=1)], dim=1)
    w, scale = torch.tensor([[127, 0], [0, 127]], dtype=torch.int8), torch.tensor([1 / 127, 1 / 127])
    gate, up = int8_linear(x, pack_int8(w), scale).unbind(1)
    y = int8_linear(x, pack_int8(w), scale, swiglu=True)
    expected = torch.nn.functional.silu(gate.double()) * up
    torch.testing.assert_close(y[:, 0].double(), expected, rtol=1e-6, atol=1e-33)


def test_tokens_are_quantized_as_the_reference_does():
    """The identity as weights shows every q * scale."""
    torch.manual_seed(0)
    halves = torch.arange(-126.5, 127)
    halves[0] = 127  # makes the scale 1, so that every half is a tie, to be rounded to even
    x = torch.stack([halves, torch.randn(len(halves)), torch.zeros(len(halves))])
    q, scale = quantize_tokens(x)
    y = int8_linear(x, pack_int8(torch.eye(len(halves), dtype=torch.int8)), torch.ones(len(halves)))
    assert torch.equal(y, q * scale)


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


# ---------------------------------------------------------------- errors

X, PACKED, SCALE = torch.randn(2, 8), pack_int8(random_int8(6, 8)), torch.rand(6)


@pytest.mark.parametrize("args, message", [
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
    ({"x": torch.ones(1, MAX_K + 1), "weight": pack_int8(random_int8(1, MAX_K + 1)), "scale": torch.ones(1)},
     f"K must be 1 to {MAX_K}, .*, got {MAX_K + 1}")],
    ids=lambda v: v if isinstance(v, str) else "")
def test_int8_linear_refuses(args, message):
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        int8_linear(**{"x": X, "weight": PACKED, "scale": SCALE, **args})


SIZE_NAMES = ["n_embd", "n_head", "n_kv_head", "head_dim", "n_hidden", "vocab_size", "block_size", "n_layer", "qk_norm",
              "slices", "fine_head", "tied"]


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
    ({"n_layer": 2}, "must be"),
    ({0: torch.zeros(3).long()}, "sizes must be 12 numbers"),
    ({2: torch.rand(5, 3, device="meta")}, "cos must be .* on meta"),
    ({4: torch.rand(10).double()}, "input_norm must be Float, got Double"),
    ({5: torch.rand(48, 10)}, "qkv must be Char, got Float"),
    ({5: torch.full((48, 10), -128, dtype=torch.int8)}, "got a -128"),
    ({6: torch.rand(47)}, r"qkv must be \(1, 48\)"),
    ({18: None}, "is missing"),
    ({19: torch.zeros(1)}, "more arrays")])
def test_the_decoder_refuses(change, message):
    """A change is a size by its name, or the array at an index of the flat list of 19; None removes the array."""
    model = random_model(n_layer=1, n_head=4, n_kv_head=2, head_dim=6, n_embd=10, n_hidden=7, vocab_size=11,
                         tie_embeddings=False, qk_norm=False, block_size=5)
    flat = list(arrays(model.config, quantize_state(model), slices=1, fine_head=False))
    owlet_kernels.Decoder(flat)
    for at, value in change.items():
        if at in SIZE_NAMES:
            flat[0][SIZE_NAMES.index(at)] = value
        else:
            flat[at:at + 1] = [] if value is None else [value]
    with pytest.raises(RuntimeError, match=message):
        owlet_kernels.Decoder(flat)


@pytest.mark.parametrize("w, message", [
    (torch.tensor([[1, -128]], dtype=torch.int8), "got a -128"),
    (torch.zeros(2, 2), r"w must be Char \(N, K\), not empty, got Float"),
    (torch.zeros(2, dtype=torch.int8), r"w must be Char \(N, K\), not empty, got Char \[2\]"),
    (torch.zeros(0, 2, dtype=torch.int8), r"got Char \[0, 2\]")])
def test_pack_int8_refuses(w, message):
    with pytest.raises(RuntimeError, match=message):
        pack_int8(w)


# ---------------------------------------------------------------- torch's machinery

def test_the_operators_have_the_right_schema():
    x, w, scale, residual = make_linear(3, 66, 20, swiglu=True)
    checks = ("test_schema", "test_autograd_registration")  # nothing compiles an int8 model, so no fake tensors
    library.opcheck(pack_int8.default, (w,), test_utils=checks)
    library.opcheck(int8_linear.default, (x, pack_int8(w), scale, residual, True), test_utils=checks)


# ---------------------------------------------------------------- instruction sets, threads

@pytest.mark.parametrize("isa", ["", *ISAS])
def test_owlet_isa_chooses(isa):
    os.environ["OWLET_ISA"] = isa
    assert owlet_kernels.isa() == (isa or ISAS[0])


@pytest.mark.parametrize("isa", ["sse9", "neon" if "avx2" in ISAS else "avx2"])
def test_owlet_isa_refuses(isa):
    os.environ["OWLET_ISA"] = isa
    message = f"instruction set '{isa}' (OWLET_ISA) is unknown or not supported by this CPU, which has: "
    with pytest.raises(ValueError, match=re.escape(message + ", ".join(ISAS))):
        owlet_kernels.isa()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_runs_on_torchs_threads():
    """The op starts as many threads as torch is told to, in the one OpenMP runtime there is."""
    if b"GOMP_parallel" not in Path(owlet_kernels.__file__).read_bytes():
        pytest.skip("the kernels were built without OpenMP: the decoder has threads of its own, the op has one")
    code = """if True:
        import os, re, torch, owlet_kernels
        x, w, scale = torch.ones(64, 512), torch.ones(2048, 512, dtype=torch.int8), torch.ones(2048)
        before = len(os.listdir("/proc/self/task"))
        for threads in (1, 3):
            torch.set_num_threads(threads)
            torch.ops.owlet.int8_linear(x, torch.ops.owlet.pack_int8(w), scale)
            print(len(os.listdir("/proc/self/task")) - before)
        print(len(set(re.findall(r"\\S*/lib(?:gomp|omp|iomp5)\\S*", open("/proc/self/maps").read()))))
    """
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                            capture_output=True, text=True)
    assert result.stdout.split() == ["0", "2", "1"], result.stderr


# ---------------------------------------------------------------- without torch

@pytest.mark.long  # compiles for half a minute; tests/test_product.py and tests/test_decoder.py have quick ones
@pytest.mark.parametrize("compiler, flags, runner", [
    ("c++", ["-O2"], []),
    ("c++", ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"], []),
    ("c++", ["-O1", "-fsanitize=thread"], []),
    ("aarch64-linux-gnu-g++", ["-O2", "-static"], ["qemu-aarch64"]),
    ("clang++", ["-O2"], [])], ids=["native", "sanitized", "threads", "aarch64", "clang"])
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
