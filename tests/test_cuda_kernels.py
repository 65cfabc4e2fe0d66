"""The CUDA kernels without a GPU: they compile for every target, and equal the reference on tests/cuda_emulator."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_linear, random_model
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from int8 import Int8KVCache, arrays, build, int8_linear_reference, quantize_state, tiles

CUDA = ROOT / "csrc" / "cuda"
EMULATOR = ROOT / "tests" / "cuda_emulator"
TARGETS = [75, 80, 86, 89, 90, 100]

# ---------------------------------------------------------------- on the emulator

@functools.cache
def emulator() -> ctypes.CDLL:
    """csrc/cuda compiled for the emulator, once for all tests."""
    if not shutil.which("c++"):
        pytest.skip("c++ is not installed")
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
             "-Werror", "-Wno-unknown-pragmas", f"-fsanitize={os.environ.get('OWLET_SANITIZER', 'undefined')}",
             "-fno-sanitize-recover=all"]
    sources = [EMULATOR / "entry_points.cpp", "-x", "c++", *sorted(CUDA.glob("*.cu"))]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["c++", *flags, "-I", EMULATOR, *sources, "-o", f"{folder}/library.so"], check=True)
        return ctypes.CDLL(f"{folder}/library.so")


def address(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def emulated_linear(x, w, scale, residual=None, swiglu=False, norm=None, eps=0.0):
    """x (M, K), w (N, K) int8 -> y (M, N or N / 2), with the function that the operator calls."""
    (M, K), N = x.shape, len(w)
    y, packed = torch.full((M, N // 2 if swiglu else N), torch.nan), tiles(w)
    emulator().int8_linear(
        address(x), ctypes.c_int64(M), ctypes.c_int64(K), address(norm), ctypes.c_float(eps), address(packed),
        ctypes.c_int64(N), address(scale), swiglu, address(residual), address(y))
    return y


@pytest.mark.parametrize("M", [1, 6])
def test_norm_joins_the_quantization(M):
    """RMSNorm's factor is multiplied into the scale, so a value close to a rounding boundary may go the other way."""
    x, w, scale, residual = make_linear(M, 72, 200)
    weight = torch.rand(200) + 0.5
    y = emulated_linear(x * 3, w, scale, residual=residual, norm=weight, eps=1e-6)
    normed = torch.nn.functional.rms_norm(x * 3, (200,), weight, 1e-6)
    expected = int8_linear_reference(normed, w, scale, residual)
    step = scale * 127 * (x * weight).abs().amax() / 127  # the change by one step of one value
    assert ((y - expected).abs() <= 2 * step).all() and (y - expected).abs().median() < 1e-6


class Decoder:
    """A model's decoder of csrc/cuda, with the launches that a GPU would run."""

    def __init__(self, model, state):
        self.vocab_size = model.config.vocab_size
        self.held = [tiles(t) if t.dtype == torch.int8 else t.contiguous()
                     for t in arrays(model.config, state, slices=1, fine_head=False)]

    def forward(self, tokens, pos, *caches):
        """tokens (B, 1) int64 at pos (1,) -> logits (B, 1, V)."""
        logits, tokens = torch.full((len(tokens), 1, self.vocab_size), torch.nan), tokens.contiguous()
        pointers = (ctypes.c_void_p * len(self.held))(*[t.data_ptr() for t in self.held])
        emulator().decode(pointers, address(tokens), address(pos), ctypes.c_int64(len(tokens)),
                          *map(address, caches), ctypes.c_int64(caches[0].size(3)), address(logits))
        return logits


@pytest.mark.parametrize("changes", [
    {}, {"qk_norm": False}, {"tie_embeddings": False}, {"n_head": 4, "n_kv_head": 2, "head_dim": 32},
    {"n_head": 1, "n_embd": 128, "n_hidden": 100}], ids=str)
@pytest.mark.parametrize("B", [1, pytest.param(6, marks=pytest.mark.long)])
def test_decoder_equals_the_model(B, changes):
    """At positions where one key, one warp or several warps have keys."""
    model = random_model(std=0.3, **{"vocab_size": 67, "block_size": 140, "n_head": 2} | changes)
    state = quantize_state(model)
    model = build(model.config, state, "reference", model.device)
    decoder = Decoder(model, state)
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
    """Some tests with every access checked. The sanitizer must be loaded when Python starts."""
    found = subprocess.run(["c++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip("c++ has no address sanitizer here")
    environment = os.environ | {"LD_PRELOAD": found, "OWLET_SANITIZER": "address", "OMP_NUM_THREADS": "1",
                                "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    chosen = "(sums and random and emulated) or (decoder and n_kv_head and 6)"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__,
               ROOT / "tests/test_product.py", "-m", "", "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# ---------------------------------------------------------------- compiled

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
