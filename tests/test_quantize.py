"""int8: the arithmetic, the model, the folder, the table."""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import damage, forks, random_model, refused, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

import int8
import quantize
import train
from dataloader import TokenData, evaluate
from generate import generate
from int8 import int8_linear_reference, quantize_rows, quantize_tokens
from lib import corpus, recipe
from lib.checkpoint import load_model, read_tokenizer, weights_size
from lib.cli import UserError
from lib.recipe import TrainConfig
from model import GPT, GPTConfig, attention

BACKENDS = ["owlet", "torch.ao", "reference"]
# Relative error of one product of random numbers. torch.ao has one scale for all tokens, and on
# some CPUs only 7 bits for activations.
ROUNDING = {"owlet": 0.015, "reference": 0.015, "torch.ao": 0.04}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "owlet" and int8.owlet_kernels is None:
        pytest.skip("the kernels are not built: python setup.py build_ext")
    return request.param


@pytest.fixture
def quick(monkeypatch):
    """quantize.py measures each model's memory in a process that is forked, which need not load torch first."""
    context = forks()
    monkeypatch.setattr(quantize.multiprocessing, "get_context", lambda method: context)


@functools.cache
def train_model(data: Path) -> Path:
    """The folder of a tiny model that has learned its text; trained once for all tests."""
    out = data.with_name("trained") / "wood"
    config = TrainConfig(data=data, out=out, n_layer=2, n_embd=64, block_size=64, batch_size=16, max_steps=150,
                         eval_every=150, dtype="float32", device="cpu")
    assert train.train(config, train.Ranks("cpu", threads=1)) == 0
    return out


@pytest.fixture
def trained(data):
    return train_model(data)


# ---------------------------------------------------------------- primitives

@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 70), st.floats(1e-6, 1e6), st.integers(0, 1000))
def test_rows_are_rounded_to_the_nearest_step(N, K, size, seed):
    w = size * torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    q, scale = quantize_rows(w)
    assert q.dtype == torch.int8 and q.min() >= -127
    assert torch.equal(q.abs().amax(1), torch.full((N,), 127, dtype=torch.int8))
    error = (q.double() * scale.double()[:, None] - w.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()


def test_a_row_of_zeros_stays_zero():
    q, scale = quantize_rows(torch.zeros(2, 5))
    assert not q.any() and not scale.any()
    assert not int8_linear_reference(torch.ones(3, 5), q, scale).any()


def test_tokens_are_quantized_each_by_itself():
    x = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0], [1e-35, 0.0, 0.0], [3e38, -3e38, 1.0]])
    q, scale = quantize_tokens(x)
    assert q.tolist() == [[64, -127, 32], [0, 0, 0], [0, 0, 0], [127, -127, 0]]
    assert scale.isfinite().all()


def test_reference_epilogue():
    x, w = torch.randn(2, 8), torch.randn(6, 8)
    q, scale = quantize_rows(w)
    plain = int8_linear_reference(x, q, scale)
    torch.testing.assert_close(plain, x @ w.T, atol=0.1, rtol=0.05)
    residual = torch.randn(2, 6)
    torch.testing.assert_close(int8_linear_reference(x, q, scale, residual), plain + residual)
    torch.testing.assert_close(int8_linear_reference(x, q, scale, swiglu=True),
                               torch.nn.functional.silu(plain[:, 0::2]) * plain[:, 1::2])


@pytest.mark.parametrize("pos, T", [(0, 1), (0, 70), (130, 3)])
def test_attention_over_an_int8_cache_is_near_attention(pos, T):
    """What is not seen may be NaN; two query heads share a key."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, T, 16), torch.randn(2, 2, pos + T, 16), torch.randn(2, 2, pos + T, 16)
    mask = torch.ones(T, pos + T, dtype=torch.bool).tril(pos)
    (k8, k_scale), (v8, v_scale) = quantize_tokens(k), quantize_tokens(v)
    ours, theirs = int8.int8_attention_reference(q, k8, k_scale, v8, v_scale, mask), attention(q, k, v, mask)
    assert ours.shape == theirs.shape and (ours - theirs).norm() < 0.02 * theirs.norm()
    if T > 1:
        k_scale[:, :, -1] = v_scale[:, :, -1] = math.nan
        again = int8.int8_attention_reference(q, k8, k_scale, v8, v_scale, mask)
        assert torch.equal(again[:, :, :-1], ours[:, :, :-1]) and again[:, :, -1].isnan().all()


# ---------------------------------------------------------------- layers and models

FIELDS = [{}, {"n_kv_head": 1}, {"tie_embeddings": False}, {"qk_norm": False, "n_embd": 36, "n_head": 2}]


def test_trained_model_keeps_its_loss_and_its_words(trained, data, backend):
    model, texts = load_model(trained), TokenData(data, 64)
    small = int8.quantize(model, backend)
    before, after = evaluate(model, texts), evaluate(small, texts)
    assert before < 1.0  # it has learned: a guess is 5.5
    assert after == pytest.approx(before, rel=0.001 if backend != "torch.ao" else 0.05)
    prompt = torch.tensor([list(b"Owl sees ")])
    words = bytes(token.item() for token in generate(small, prompt, 60, temperature=0)).decode()
    assert {word.strip(".") for word in words.split()[:-1]} <= {
        "Owl", "Fox", "Wren", "Mole", "Hare", "sees", "likes", "hears", "follows", "at", "one", "two", "ten"}


# ---------------------------------------------------------------- the folder

@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_folder_round_trip(fields, backend, tmp_path):
    """And int8 is near fp32."""
    model = random_model(**fields)
    int8.save_quantized(model, tmp_path)
    x = torch.randint(0, 256, (2, 24))
    exact, near, again = (each(x)[0] for each in (model, int8.quantize(model, backend),
                                                  int8.load_quantized(tmp_path, backend)))
    assert 0 < (near - exact).norm() < 3 * ROUNDING[backend] * exact.norm()
    assert torch.equal(again, near)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape == (model.config.n_hidden,)
    assert ("lm_head.weight" in stored) is not model.config.tie_embeddings


def test_models_of_others_can_be_quantized_and_still_end(script, quick, tmp_path):
    config = LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, bos_token_id=1,
                         num_attention_heads=2, max_position_embeddings=5000, eos_token_id=[5, 10])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama", max_shard_size="10KB")
    code, _, err = script(quantize.main, "--checkpoint", tmp_path / "llama")
    assert code == 0, err
    assert int8.load_quantized(tmp_path / "llama-int8").config.eos == [5, 10]


def test_base_size_shrinks_to_a_quarter(tmp_path):
    torch.manual_seed(0)
    base = GPT(recipe.shape(recipe.defaults("base"), {"vocab_size": 256}))
    save_model(base, tmp_path / "fp32")
    int8.save_quantized(base, tmp_path / "int8")
    before, after = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("fp32", "int8"))
    assert after <= 0.257 * before


def test_a_damaged_folder_is_refused(tiny, tmp_path):
    int8.save_quantized(tiny, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"down_proj\.weight_scale is missing"):
        int8.load_quantized(tmp_path)
    damage(tmp_path / "config.json", quantization_config=int8.FORMAT | {"bits": 4})
    with pytest.raises(UserError, match="quantization_config"):
        int8.load_quantized(tmp_path)


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(int8, "owlet_kernels", None)
    monkeypatch.setattr(int8, "why_no_kernels", "owlet's int8 kernels are not built", raising=False)


def test_without_the_extension_the_table_says_who_computed(no_kernels, trained, script, quick):
    code, out, err = script(quantize.main, "--checkpoint", trained, "--eval-tokens", 500)
    assert code == 0 and "| owlet's format by torch.ao |" in out and "| owlet int8 |" not in out
    assert err.count("not built") == 1


def test_without_the_extension_the_next_best_is_used_and_said(no_kernels, monkeypatch, capsys):
    assert int8.pick_backend("auto", torch.device("cpu")) == "torch.ao"
    assert "not built; going on with torch.ao" in capsys.readouterr().err
    monkeypatch.setattr(int8, "has_torch_ao", lambda: False)
    assert int8.pick_backend("auto", torch.device("cpu")) == "reference"
    with pytest.raises(UserError, match="not built"):
        int8.pick_backend("owlet", torch.device("cpu"))


def test_a_decoder_that_differs_or_refuses_is_left_out(tiny, monkeypatch, capsys):
    """Stands in for a GPU's decoder: one that computes what PyTorch does, one that adds noise, one that refuses."""
    state = int8.quantize_state(tiny)
    flat = list(int8.arrays(tiny.config, state, slices=1, fine_head=False))

    def decoder(noise: float) -> type:
        class Decoder:
            def __init__(self, flat: list[torch.Tensor]) -> None:
                if math.isnan(noise):
                    raise RuntimeError("head_dim must be 16, 32, ... 128, got 8")
                self.model = int8.Int8GPT(tiny.config, flat, "reference")

            def forward(self, idx: torch.Tensor, *caches: torch.Tensor) -> torch.Tensor:
                return self.model(idx)[0] + noise * torch.randn(256)

        return Decoder

    for noise, said in ((0.0, ""), (1.0, "differs from PyTorch on this GPU"), (math.nan, "must be 16, 32")):
        monkeypatch.setattr(int8.owlet_kernels, "CudaDecoder", decoder(noise), raising=False)
        model = int8.Int8GPT(tiny.config, flat, "owlet (cuda)")
        model.add_decoder(flat)
        assert (model.decoder is None) == bool(said) and said in capsys.readouterr().err


# ---------------------------------------------------------------- the script

def test_quantize_script_compares(trained, script, quick):
    code, out, err = script(quantize.main, "--checkpoint", trained, "--eval-tokens", 2000)
    assert code == 0, err
    result = json.loads((trained.with_name("wood-int8") / "comparison.json").read_text())
    assert list(result["rows"]) == ["fp32", "torch.ao int8", "owlet int8"]
    for row in result["rows"].values():
        assert row["file_bytes"] > 0 and row["prompt_tokens_per_second"] > 0 and row["decode_tokens_per_second"] > 0
        assert 0 < row["bits_per_byte"] < 2
    assert abs(result["rows"]["owlet int8"]["bits_per_byte_change"]) < 0.005
    stored = trained.with_name("wood-int8") / "model.safetensors"
    assert result["rows"]["owlet int8"]["file_bytes"] == stored.stat().st_size
    assert "| owlet int8 |" in out
    assert (trained.with_name("wood-int8") / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_losses_of_another_tokenizers_tokens_are_refused(trained, script, text_file, tmp_path):
    """With as many different tokens as the model's."""
    tokenizer = read_tokenizer(trained).to_str().replace('"a":', '"?":').replace('"b":', '"a":').replace('"?":', '"b":')
    (tmp_path / "tokenizer.json").write_text(tokenizer)
    other = corpus.prepare(corpus.PrepareConfig(input=(text_file,), out=tmp_path / "data", tokenizer=tmp_path))
    refused(script(quantize.main, "--checkpoint", trained, "--data", other), "another's; make some with")


@pytest.mark.skipif(int8.owlet_kernels is None, reason="the kernels are not built")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize(("tied", "slices"), [(True, 1), (True, 4), (False, 1), (False, 4)])
def test_a_loaded_model_lets_go_of_its_file(tmp_path, tied, slices):
    int8.save_quantized(random_model(tie_embeddings=tied, n_embd=64), tmp_path, slices=slices)
    model = int8.load_quantized(tmp_path, "owlet")
    assert model.new_writer and str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_memory_is_that_of_the_model(tmp_path):
    torch.manual_seed(0)
    save_model(GPT(GPTConfig(n_embd=512)), tmp_path / "big")
    int8.save_quantized(load_model(tmp_path / "big"), tmp_path / "big-int8")
    stored = weights_size(tmp_path / "big")
    for row, least, most in (("fp32", 0.9, 1.5), ("owlet int8", 0.2, 0.5)):
        if row == "fp32" or int8.owlet_kernels is not None:
            with forks().Pool(1) as fresh:
                memory = fresh.apply(quantize.resident_memory,
                                     (row, tmp_path / "big", tmp_path / "big-int8", "owlet", 1))
            assert least * stored < memory < most * stored


def test_quantize_script_takes_the_newest_fp32_folder(tiny, script, tmp_path, monkeypatch):
    save_model(tiny, tmp_path / "out" / "a")
    int8.save_quantized(tiny, tmp_path / "out" / "newer-int8")
    monkeypatch.chdir(tmp_path)
    code, _, err = script(quantize.main, "--no-compare")
    assert code == 0, err
    assert (tmp_path / "out" / "a-int8" / "model.safetensors").exists()
