"""On a GPU:  CUDA_VISIBLE_DEVICES=0 python -m pytest tests/test_cuda.py   (the other tests leave it alone)"""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, make_linear, random_int8, random_model, save_model
from test_product import (  # noqa: F401  (they run here with the product below)
    SIZES,
    Product,
    test_a_token_that_is_not_finite_yields_nan_and_no_other_does,
    test_largest_k_does_not_overflow,
    test_sums_are_exact,
)
from torch import library

import int8
import sample
from dataloader import TokenData, forward_loss
from generate import StaticKVCache, generate
from int8 import tiles
from lib import recipe
from lib.machine import gpu_has_bf16
from lib.muon import make_optimizers, update
from model import GPT

if not torch.cuda.is_available():
    pytest.skip("no GPU to be seen; with one, set CUDA_VISIBLE_DEVICES=0", allow_module_level=True)
if not hasattr(int8.owlet_kernels, "CudaDecoder"):
    pytest.skip("the CUDA kernels are not built: python setup.py build_ext, with nvcc", allow_module_level=True)

DEVICE = torch.device("cuda:0")
int8_linear = torch.ops.owlet.int8_linear


def on_gpu(x, w, scale, residual=None, swiglu=False):
    x, w, scale, residual = (t if t is None else t.to(DEVICE) for t in (x, tiles(w), scale, residual))
    return int8_linear(x, w, scale, residual, swiglu).cpu()


# ---------------------------------------------------------------- the operator

@pytest.fixture
def product() -> Product:
    return Product(on_gpu, SIZES, SIZES, SIZES)


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("M", [1, 4, 13, 64, 200])
def test_same_bits_as_on_the_cpu(M, swiglu):
    x, w, scale, residual = make_linear(M, 1408, 520, swiglu)
    cpu = int8_linear(x, torch.ops.owlet.pack_int8(w), scale, residual, swiglu)
    assert torch.equal(on_gpu(x, w, scale, residual, swiglu), cpu)


def test_strides_odd_addresses_and_empty_batches():
    x, w, scale, residual = (t.to(DEVICE) for t in make_linear(6, 70, 34))
    packed = tiles(w)
    y = int8_linear(x, packed, scale, residual)
    assert torch.equal(int8_linear(x.t().contiguous().t(), packed, scale, residual.t().contiguous().t()), y)
    for t in (x, residual):  # 4 bytes past where loads of 16 may begin
        odd = torch.empty(t.numel() + 1, device=DEVICE)[1:].view_as(t).copy_(t)
        assert odd.data_ptr() % 8
        ours = (odd, packed, scale, residual) if t is x else (x, packed, scale, odd)
        assert torch.equal(int8_linear(*ours), y)
    assert torch.equal(int8_linear(x.view(2, 3, 34), packed, scale, residual.view(2, 3, 70)).view(6, 70), y)
    assert int8_linear(x[:0], packed, scale).shape == (0, 70)


@pytest.mark.parametrize("changes, message", [
    ({"x": torch.randn(2, 8).half()}, "x must be Float, got Half"),
    ({"weight": torch.ops.owlet.pack_int8(random_int8(6, 8))}, "weight must be Char, got Byte"),
    ({"weight": tiles(random_int8(6, 80))}, r"weight must have shape \[1, 1, 8, 64\], got \[1, 2, 8, 64\]"),
    ({"residual": torch.rand(2, 6).half()}, "residual must be Float, got Half")],
    ids=["float16", "packed for the CPU", "another K", "another dtype"])
def test_int8_linear_refuses(changes, message):
    tensors = {"x": torch.randn(2, 8), "weight": tiles(random_int8(6, 8)), "scale": torch.rand(6)} | changes
    with pytest.raises(RuntimeError, match=message):
        int8_linear(**{name: t.to(DEVICE) for name, t in tensors.items()})


def test_the_operator_has_the_right_schema():
    x, w, scale, residual = (t.to(DEVICE) for t in make_linear(3, 66, 20, swiglu=True))
    checks = ("test_schema", "test_autograd_registration")
    library.opcheck(int8_linear.default, (x, tiles(w), scale, residual, True), test_utils=checks)


# ---------------------------------------------------------------- models
MODELS = {"mha": {"head_dim": 16}, "gqa": {"n_kv_head": 2, "head_dim": 32}, "llama": {"qk_norm": False, "head_dim": 64},
          "untied": {"tie_embeddings": False, "head_dim": 16}, "torch's attention": {"head_dim": 10}}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def fp32(request):
    return random_model(block_size=600, **request.param)


def int8_on_gpu(model, backend="owlet"):
    return int8.build(model.config, int8.quantize_state(model), backend, DEVICE)


def test_int8_logits_are_those_of_the_cpu(fp32):
    cpu, gpu = int8.quantize(fp32, "owlet"), int8_on_gpu(fp32)
    idx = torch.randint(fp32.config.vocab_size, (2, 40))
    expected, got = cpu(idx)[0], gpu(idx.to(DEVICE))[0].cpu()
    assert (got - expected).norm() < 0.02 * expected.norm()  # a rounding here and there goes another way


@pytest.mark.parametrize("B", [1, 3, 6])
def test_recorded_logits_are_those_of_the_python_path(fp32, B):
    """One token at a time, by the decoder in C++ where it takes the model, without capture."""
    model = int8_on_gpu(fp32)
    idx = torch.randint(fp32.config.vocab_size, (B, 90), device=DEVICE)
    with torch.inference_mode():
        expected = model(idx)[0]
        cache = model.new_cache(B, 128)
        model(idx[:, :2], cache=cache)
        static = StaticKVCache(cache)
        got = torch.cat([model(idx[:, i:i + 1], cache=static)[0] for i in range(2, 90)], dim=1)
    assert (got - expected[:, 2:]).norm() < 0.02 * expected.norm()


SETTINGS = {"greedy": {"temperature": 0}, "everything": {"temperature": 0.9, "top_k": 40, "top_p": 0.95,
                                                         "repetition_penalty": 1.3}}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_generating_captures_and_repeats(fp32, kind, settings):
    """Across the end of the context; the text depends on the seed alone."""
    model = fp32.to(DEVICE) if kind == "fp32" else int8_on_gpu(fp32)
    idx = torch.randint(fp32.config.vocab_size, (3, 200), device=DEVICE)

    def text(**more):
        return torch.stack(list(generate(model, idx, 450, seed=3, **settings, **more)), dim=1)

    first = text()
    assert torch.equal(first, text())
    if kind == "fp32" and not settings["temperature"]:
        same = (first == text(use_cache=False)).float().mean()
        assert same > 0.9  # fp32 sums in another order may turn a close choice, and all after it


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_text_is_that_of_the_cpu(fp32, settings):
    """Until rounding makes two logits swap: the first tokens at least, in most rows."""
    idx = torch.randint(fp32.config.vocab_size, (8, 20))
    cpu, gpu = (torch.stack([t.cpu() for t in generate(model, idx.to(model.device), 12, seed=3, **settings)], dim=1)
                for model in (int8.quantize(fp32, "owlet"), int8_on_gpu(fp32)))
    assert (cpu[:, :4] == gpu[:, :4]).all(dim=1).float().mean() > 0.7


def test_eos_ends_a_row(fp32):
    model = int8_on_gpu(fp32)
    idx = torch.randint(fp32.config.vocab_size, (2, 5), device=DEVICE)
    free = torch.stack(list(generate(model, idx, 30, temperature=0)), dim=1)
    eos = int(free[0, 7])
    ended = torch.stack(list(generate(model, idx, 30, temperature=0, eos=eos)), dim=1)
    first = (free[0] == eos).nonzero()[0, 0]
    assert (ended[0, first:] == eos).all() and torch.equal(ended[0, :first], free[0, :first])


# ---------------------------------------------------------------- scripts

def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_train_quantize_sample(data, tmp_path):
    out = tmp_path / "run"
    flags = ["--data", data, "--out", out, "--max-steps", 60, "--eval-every", 30, "--batch-size", 8]
    run("train.py", "tiny", *flags)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [row["val_loss"] for row in log if "val_loss" in row]
    assert losses[-1] < losses[0] < 5
    run("quantize.py", "--checkpoint", out)
    fp32 = "bf16" if gpu_has_bf16(DEVICE) else "fp32"
    for folder, how in ((out, fp32), (out.with_name("run-int8"), "int8 by owlet (cuda)")):
        done = run("sample.py", "--checkpoint", folder, "--max-new-tokens", 40, "--seed", 1, "--device", "cuda")
        assert how in done.stderr
    run("train.py", "--resume", "--out", out, "--max-steps", 70)


def test_the_loss_is_that_of_the_cpu(data):
    """One step's loss and the next one's, in fp32: the same model, batch and optimizers."""
    losses = {}
    for device in ("cpu", "cuda:0"):
        config = recipe.TrainConfig(dtype="float32", n_embd=64, n_layer=2)
        torch.manual_seed(0)
        model = GPT(recipe.shape(config, {"vocab_size": 256})).to(device)
        tokens = TokenData(data, config.block_size, device)
        optimizers = make_optimizers(model, config.muon_lr, torch.float32)
        losses[device] = []
        for step in range(5):
            x, y = tokens.batch(step * 8, 8, 1)[0]
            loss = forward_loss(model, x, y, torch.float32)
            loss.backward()
            update(model, optimizers, (config.muon_lr, config.adam_lr))
            losses[device].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses["cpu"]), torch.tensor(losses["cuda:0"]), rtol=0, atol=1e-3)


def test_bf16_folder_is_close_to_fp32(tmp_path):
    save_model(random_model(), tmp_path)
    idx = torch.randint(100, (1, 20), device=DEVICE)
    fp32, bf16 = (sample.load(tmp_path, dtype, "auto", DEVICE)[0](idx)[0].float()
                  for dtype in ("float32", "auto"))
    assert (fp32 - bf16).norm() < 0.05 * fp32.norm()
