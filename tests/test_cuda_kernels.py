"""The CUDA kernels without a GPU: they compile for every target, and equal the reference on tests/cuda_emulator."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import assert_equals_reference, full_range, make_linear, random_int8, random_model
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from int8 import Int8GPT, Int8KVCache, arrays, build, int8_linear_reference, quantize_state, tiles

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tests" / "cuda_emulator"
SIZES = [1, 3, 7, 16, 63, 64, 65, 257, 1408]
TARGETS = [75, 80, 86, 89, 90, 100]
# up to 4 tokens, which gemv quantizes itself; one to four groups of 16; whole and partial blocks of 128 for gemm
TOKENS = [M if M in (1, 5, 65) else pytest.param(M, marks=pytest.mark.long) for M in
          (1, 3, 4, 5, 16, 17, 33, 64, 65, 130)]


# --- on the emulator ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if not shutil.which("c++"):
        pytest.skip("c++ is not installed")
    path = tmp_path_factory.mktemp("cuda_emulator") / "library.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
             "-Werror", "-Wno-unknown-pragmas", f"-fsanitize={os.environ.get('OWLET_SANITIZER', 'undefined')}",
             "-fno-sanitize-recover=all"]
    sources = [EMULATOR / "entry_points.cpp", "-x", "c++", *sorted(CUDA.glob("*.cu"))]
    subprocess.run(["c++", *flags, "-I", EMULATOR, *sources, "-o", path], check=True)
    return ctypes.CDLL(str(path))


def address(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def int8_linear(library, x, w, scale, residual=None, swiglu=False, norm=None, eps=0.0):
    """x (M, K), w (N, K) int8 -> y (M, N or N / 2), with the function that the operator calls."""
    (M, K), N = x.shape, len(w)
    y, packed = torch.full((M, N // 2 if swiglu else N), torch.nan), tiles(w)
    library.int8_linear(
        address(x), ctypes.c_int64(M), ctypes.c_int64(K), address(norm), ctypes.c_float(eps), address(packed),
        ctypes.c_int64(N), address(scale), swiglu, address(residual), address(y))
    return y


@pytest.mark.parametrize("N", SIZES)
@pytest.mark.parametrize("K", SIZES)
def test_tiled_layout(N, K):
    w = random_int8(N, K)
    packed = tiles(w)
    assert packed.shape == (-(-N // 8), -(-K // 64), 8, 64) and packed.dtype == torch.int8 and packed.is_contiguous()
    rows = packed.transpose(1, 2).flatten(2).flatten(0, 1)
    assert torch.equal(rows[:N, :K], w)
    assert not rows[N:].any() and not rows[:, K:].any()
    assert torch.equal(tiles(w.t().contiguous().t()), packed)


@pytest.mark.parametrize("N", [1, 66, 264])
@pytest.mark.parametrize("M", TOKENS)
def test_sums_are_exact(library, M, N):
    torch.manual_seed(0)
    for K in [1, 63, 64, 257, 1408]:
        for make in [random_int8, full_range]:
            x, w = make(M, K), make(N, K)
            x[:, 0] = 127  # the scale is 1
            x[M // 2] = 0
            y = int8_linear(library, x.float(), w, torch.ones(N))
            assert torch.equal(y, (x.double() @ w.double().T).float()), K


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("M", [2, 20, pytest.param(70, marks=pytest.mark.long)])
@pytest.mark.parametrize("N", [130, 131])
def test_equals_reference(library, M, N, swiglu):
    N += N % 2 if swiglu else 0
    x, w, scale, residual = make_linear(M, N, 257, swiglu)
    for added in (None, residual):
        y = int8_linear(library, x, w, scale, added, swiglu)
        assert_equals_reference(y, x, w, scale, added, swiglu)


@pytest.mark.parametrize("M", [1, 6])
def test_norm_joins_the_quantization(library, M):
    """RMSNorm's factor is multiplied into the scale, so a value close to a rounding boundary may go the other way."""
    x, w, scale, residual = make_linear(M, 72, 200)
    weight = torch.rand(200) + 0.5
    y = int8_linear(library, x * 3, w, scale, residual=residual, norm=weight, eps=1e-6)
    normed = torch.nn.functional.rms_norm(x * 3, (200,), weight, 1e-6)
    expected = int8_linear_reference(normed, w, scale, residual)
    step = scale * 127 * (x * weight).abs().amax() / 127  # the change by one step of one value
    assert ((y - expected).abs() <= 2 * step).all() and (y - expected).abs().median() < 1e-6


@pytest.mark.parametrize("M", [1, 9, 70])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_yields_nan_and_no_other_does(library, M, bad):
    x, w, scale, _ = make_linear(M, 72, 200)
    good = int8_linear(library, x, w, scale)
    x[M // 2, 77] = bad
    y = int8_linear(library, x, w, scale)
    assert y[M // 2].isnan().all()
    y[M // 2] = good[M // 2]
    assert torch.equal(y, good)


@pytest.mark.parametrize("M", [1, 5, 70])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-31, 1e-29, 1e34])
def test_tiny_and_huge_tokens(library, M, value):
    x, w, scale = torch.full((M, 64), value), random_int8(10, 64), torch.full((10,), 1e-4)
    assert torch.equal(int8_linear(library, x, w, scale), int8_linear_reference(x, w, scale))


class Decoder:
    """A model's decoder of csrc/cuda, with the launches that a GPU would run."""

    def __init__(self, library, model, state):
        self.decode, self.vocab_size = library.decode, model.config.vocab_size
        self.held = [tiles(t) if t.dtype == torch.int8 else t.contiguous()
                     for t in arrays(model.config, state, slices=1, fine_head=False)]

    def forward(self, tokens, pos, *caches):
        """tokens (B, 1) int64 at pos (1,) -> logits (B, 1, V)."""
        logits, tokens = torch.full((len(tokens), 1, self.vocab_size), torch.nan), tokens.contiguous()
        pointers = (ctypes.c_void_p * len(self.held))(*[t.data_ptr() for t in self.held])
        self.decode(pointers, address(tokens), address(pos), ctypes.c_int64(len(tokens)),
                    *map(address, caches), ctypes.c_int64(caches[0].size(3)), address(logits))
        return logits


def emulated(library, **fields) -> tuple[Int8GPT, Decoder]:
    model = random_model(std=0.3, **{"vocab_size": 67, "block_size": 140, "n_head": 2} | fields)
    state = quantize_state(model)
    model = build(model.config, state, "reference", model.device)
    return model, Decoder(library, model, state)


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": False}, {"tie_embeddings": False}, {"n_head": 4, "n_kv_head": 2, "head_dim": 32},
    {"n_head": 1, "n_embd": 128, "n_hidden": 100}], ids=str)
@pytest.mark.parametrize("B", [1, pytest.param(6, marks=pytest.mark.long)])
def test_decoder_equals_the_model(library, B, changes):
    """At positions where one key, one warp or several warps have keys."""
    model, decoder = emulated(library, **changes)
    tokens = torch.randint(67, (B, 136))
    apart = []
    for pos in [0, 1, 7, 40, 63, 64, 75, 130]:
        cache = Int8KVCache(model.config, B, 140)
        cache.key_scales.fill_(torch.nan), cache.value_scales.fill_(torch.nan)
        if pos:
            model(tokens[:, :pos], cache=cache)
        memory = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
        got = decoder.forward(tokens[:, pos:pos + 1], torch.tensor([pos]), *memory)[:, 0]
        ours = [t[..., pos, :].clone() for t in memory]
        logits, _ = model(tokens[:, pos:pos + 1], cache=cache)
        for mine, theirs in zip(ours, memory, strict=True):
            torch.testing.assert_close(mine[0], theirs[0, ..., pos, :])
        apart.append((got - logits[:, 0]).abs().amax(1) / logits.std())
    # a value that rounds the other way changes the logits by such a step
    apart = torch.cat(apart)
    assert apart.median() < 1e-4 and apart.max() < 0.1


@pytest.mark.long
def test_reads_and_writes_within_bounds():
    """Some tests from above with every access checked. The sanitizer must be loaded when Python starts."""
    found = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("c++ has no address sanitizer here")
    environment = os.environ | {"LD_PRELOAD": found, "OWLET_SANITIZER": "address", "OMP_NUM_THREADS": "1",
                                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    chosen = "(sums and 66) or (decoder and n_kv_head and 6)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-m", "", "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --- compiled -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("source", sorted(CUDA.glob("*.cu")), ids=lambda path: path.name)
def test_compiles_for_every_target(source, tmp_path):
    targets = [flag for target in TARGETS for flag in ("-gencode", f"arch=compute_{target},code=sm_{target}")]
    flags = ["-std=c++20", "-fmad=false", "-Werror", "all-warnings", "-Xptxas", "-v", "--threads", "2",
             *COMMON_NVCC_FLAGS, *targets]
    command = ["nvcc", *flags, "-c", source, "-o", tmp_path / "kernels.o"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spilt = [int(size) for size in re.findall(r"(\d+) bytes spill stores", result.stderr)]
    assert spilt and max(spilt) <= 32  # registers spilt to memory; none with CUDA 13.0


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("source", ["ops.cpp", "cuda/ops.cpp"])
def test_operators_compile_for_cuda(source, tmp_path):
    """A CPU build of torch has its CUDA headers too, except for one with macros."""
    macros = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.touch()
    toolkit = Path(shutil.which("nvcc")).resolve().parent.parent
    includes = [tmp_path, *include_paths(), sysconfig.get_paths()["include"], toolkit / "include",
                *toolkit.glob("cuda*/include")]
    flags = ["-std=c++20", "-fsyntax-only", "-DOWLET_CUDA", "-DTORCH_EXTENSION_NAME=owlet_kernels"]
    subprocess.run(["c++", *flags, *(f"-isystem{path}" for path in includes), ROOT / "csrc" / source], check=True)
