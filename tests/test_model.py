"""The decoder against transformers, against itself, and against arithmetic."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_same, random_model, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen3Config

from generate import StaticKVCache, generate, random_keys, sample_next
from lib.checkpoint import config_from_hf, config_to_hf, load_model
from lib.cli import UserError
from model import GPT, Block, GPTConfig, KVCache

VARIANTS = {
    "qwen3": {},
    "qwen3-gqa": {"n_kv_head": 2},
    "qwen3-untied": {"tie_embeddings": False},
    "qwen3-wide-heads": {"head_dim": 16, "n_kv_head": 1},
    "llama": {"qk_norm": False},
    "llama-gqa-untied": {"qk_norm": False, "n_kv_head": 1, "tie_embeddings": False, "rope_theta": 500.0},
}
TOKENS = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_transformers_reads_our_folder(fields, tmp_path):
    model = random_model(**fields)
    save_model(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if model.config.qk_norm else "LlamaForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("config_class", [Qwen3Config, LlamaConfig])
def test_we_read_theirs(config_class, tie, shard, tmp_path):
    torch.manual_seed(1)
    config = config_class(vocab_size=256, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                          num_attention_heads=6, num_key_value_heads=2, head_dim=8,
                          max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=tie)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(TOKENS)[0], theirs(TOKENS).logits, atol=1e-4, rtol=0)


def test_transformers_reads_our_tokenizer(data):
    text = "Owl sees Fox.\n  é 你好"
    assert AutoTokenizer.from_pretrained(data)(text)["input_ids"] == list(text.encode())


def test_save_and_load_is_exact(tiny, tmp_path):
    save_model(tiny, tmp_path)
    again = load_model(tmp_path)
    assert again.config == tiny.config
    assert_same(dict(again.state_dict()), dict(tiny.state_dict()))
    assert again.lm_head.weight is again.model.embed_tokens.weight


REFUSED = {
    "model_type": "gpt2",
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4},
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
}


@pytest.mark.parametrize("feature", REFUSED)
def test_unsupported_features_are_refused_by_name(feature, tiny, tmp_path):
    save_model(tiny, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {feature: REFUSED[feature]}))
    with pytest.raises(UserError, match=feature.split("_")[0]):
        load_model(tmp_path)


@pytest.mark.parametrize("change, message", [
    ({"model.norm.weight": torch.full((32,), math.nan)}, "model.norm.weight: expected numbers"),
    ({"model.norm.weight": torch.tensor([math.inf, -math.inf] * 16)}, "model.norm.weight: expected numbers"),
    ({"model.norm.weight": torch.ones(31)}, r"model.norm.weight: expected torch.float32 \(32,\), got .*31"),
    ({"model.extra.weight": torch.ones(1)}, "model.extra.weight has no place")],
    ids=["NaN", "infinite", "shape", "one too many"])
def test_wrong_tensors_are_refused_by_name(change, message, tiny, tmp_path):
    save_model(tiny, tmp_path)
    save_file(load_file(tmp_path / "model.safetensors") | change, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_loss_at_initialisation_is_that_of_a_guess():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    x, y = torch.randint(0, 256, (2, 8, 32))
    assert abs(model(x, y)[1].item() - math.log(256)) < 0.05


def test_gradients_match_finite_differences():
    model = random_model(std=0.3, block_size=8, n_head=2, n_embd=8, vocab_size=11, n_kv_head=1).double()
    x, y = torch.randint(0, 11, (2, 2, 8), generator=torch.Generator().manual_seed(3))

    def loss() -> torch.Tensor:  # GPT.forward takes the loss in fp32; here it must stay in float64
        return torch.nn.functional.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())

    loss().backward()
    step = 1e-6
    for name, parameter in model.named_parameters():
        flat, grad = parameter.data.view(-1), parameter.grad.view(-1)
        for i in torch.randperm(flat.numel())[:5].tolist():
            old = flat[i].item()
            flat[i] = old + step
            up = loss().item()
            flat[i] = old - step
            down = loss().item()
            flat[i] = old
            assert grad[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-5, abs=1e-8), name


def test_loss_is_the_mean_cross_entropy_of_the_logits(tiny):
    x, y = torch.randint(0, 256, (2, 4, 16))
    logits, loss = tiny(x, y)
    by_hand = -logits.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()
    torch.testing.assert_close(loss, by_hand)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    x, y = torch.randint(0, 256, (2, 2, 16))
    adam = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        adam.zero_grad()
        loss = model(x, y)[1]
        loss.backward()
        adam.step()
    assert loss.item() < 0.05


def test_no_token_sees_the_future(tiny):
    changed = TOKENS.clone()
    changed[:, 12:] = 255 - changed[:, 12:]
    before, after = tiny(TOKENS)[0], tiny(changed)[0]
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


ATTENTION = pytest.mark.parametrize("fields", [{}, {"n_kv_head": 2}, {"qk_norm": False}], ids=["mha", "gqa", "llama"])


@ATTENTION
@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 7, 11], [23, 1]], ids=str)
def test_cached_equals_uncached(fields, pieces):
    model = random_model(**fields)
    cache, position = KVCache(model.config, batch_size=3), 0
    whole = model(TOKENS)[0]
    for size in pieces:
        position += size
        logits, _ = model(TOKENS[:, position - size:position], cache=cache)
        torch.testing.assert_close(logits[:, 0], whole[:, position - 1], atol=1e-5, rtol=1e-5)


@ATTENTION
def test_a_static_cache_gives_the_logits_of_an_ordinary_one(fields):
    model, caches = random_model(**fields), []
    for _ in range(2):
        cache = KVCache(model.config, batch_size=3, length=30)
        cache.keys.fill_(math.nan)  # as memory never written may be
        cache.values.fill_(math.nan)
        model(TOKENS[:, :11], cache=cache)
        caches.append(cache)
    ours, theirs = StaticKVCache(caches[0]), caches[1]
    assert ours.keys is caches[0].keys and ours.values is caches[0].values
    pos = ours.pos
    for i in range(11, 24):
        token = TOKENS[:, i:i + 1]
        torch.testing.assert_close(model(token, cache=ours)[0], model(token, cache=theirs)[0], atol=1e-5, rtol=1e-5)
        assert ours.pos is pos and pos.tolist() == [theirs.pos]  # where a recording finds it
    with pytest.raises((IndexError, RuntimeError)):  # one token at a time
        model(TOKENS[:, :2], cache=ours)


@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
], ids=["greedy", "sampled"])
def test_generation_is_the_same_with_and_without_cache_past_the_context(tiny, settings):
    def text(use_cache: bool) -> torch.Tensor:
        return torch.stack(list(generate(tiny, TOKENS[:, :5], 90, use_cache=use_cache, seed=5, **settings)))

    assert torch.equal(text(True), text(False))


def test_rows_of_a_batch_do_not_mix(tiny):
    together = torch.stack(list(generate(tiny, TOKENS[:, :9], 20, temperature=0)), dim=1)
    for row in range(3):
        alone = torch.stack(list(generate(tiny, TOKENS[row:row + 1, :9], 20, temperature=0)), dim=1)
        assert torch.equal(alone[0], together[row])


def test_generation_stops_at_eos(tiny):
    greedy = [token.item() for token in generate(tiny, TOKENS[:1, :4], 10, temperature=0)]
    for eos in (greedy[3], [300, greedy[3]]):
        stopped = [token.item() for token in generate(tiny, TOKENS[:1, :4], 10, temperature=0, eos=eos)]
        assert stopped == greedy[:greedy.index(greedy[3]) + 1]


def test_configs_of_others_have_nulls_and_omissions(tiny):
    hf = config_to_hf(tiny.config) | {"rope_scaling": None, "attention_dropout": None, "rope_theta": None,
                                "rope_parameters": None, "sliding_window": None, "something_new": 1}
    assert config_from_hf(hf) == replace(tiny.config, rope_theta=10_000.0)
    del hf["head_dim"]
    assert config_from_hf(hf).head_dim == Qwen3Config().head_dim == 128
    assert config_from_hf(hf | {"model_type": "llama"}).head_dim == 8


def test_older_llamas_store_their_rotary_frequencies(tmp_path):
    model = random_model(qk_norm=False)
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "model.safetensors")
    assert torch.equal(load_model(tmp_path)(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize(("length", "wrong", "message"), [
    *[(4, wrong, "expected") for wrong in (
        {"temperature": -0.1}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1},
        {"repetition_penalty": 0.0})],
    (0, {}, "1 to 32 tokens"), (33, {}, "1 to 32 tokens")], ids=str)
def test_prompts_and_settings_out_of_range_are_refused_before_any_work(tiny, length, wrong, message):
    with pytest.raises(UserError, match=message):
        generate(tiny, torch.zeros(1, length, dtype=torch.long), 5, **wrong)


def draw(logits: list[float], seen: list[int] = (), count: int = 300, **settings) -> list[int]:
    settings = {"temperature": 1.0, "top_k": len(logits), "top_p": 1.0, "repetition_penalty": 1.0} | settings
    rows = torch.tensor([logits]).repeat(count, 1)
    past = torch.tensor([list(seen)], dtype=torch.long).repeat(count, 1)
    keys = random_keys(0, count, range(1), rows.device)[:, 0]
    return sample_next(rows, past, keys, **settings).tolist()


def test_sampling():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().tolist()
    assert set(draw(logits, temperature=0)) == {0}
    assert set(draw(logits)) == {0, 1, 2, 3}
    assert set(draw(logits, top_k=2)) == {0, 1}
    assert set(draw(logits, top_k=99)) == {0, 1, 2, 3}
    assert set(draw(logits, top_p=0.65)) == {0, 1}  # 0.4 alone does not reach 0.65, 0.4 + 0.3 does
    assert set(draw(logits, top_p=0.01)) == {0}
    assert set(draw(logits, seen=[0], temperature=0, repetition_penalty=2.0)) == {1}
    shares = np.bincount(draw(logits, count=20_000)) / 20_000
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.02)
    shuffled = [-math.inf, *reversed(logits)]  # 0.4 is the last; the first cannot be
    shares = np.bincount(draw(shuffled, top_p=0.75, count=20_000)) / 20_000
    assert shares == pytest.approx([0, 0, 2 / 9, 3 / 9, 4 / 9], abs=0.02) and not shares[:2].any()
    assert set(draw([-math.inf] * 49_999 + [0.0])) == {49_999}
    assert draw(logits) == draw(logits)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0.05, 1.0), st.integers(0, 10_000))
def test_top_p_keeps_the_smallest_set_that_reaches_p(size, p, seed):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)).tolist()
    probabilities = sorted(((v, i) for i, v in enumerate(torch.tensor(logits).softmax(0).tolist())), reverse=True)
    kept, mass = set(), 0.0
    for probability, i in probabilities:
        if mass >= p:
            break
        kept.add(i)
        mass += probability
    assert set(draw(logits, top_p=p, count=2000)) <= kept


def test_flops_and_mfu():
    model = GPT(GPTConfig(vocab_size=10, block_size=4, n_layer=1, n_head=1, n_embd=8, n_hidden=16, qk_norm=False))
    matrices = 10 * 8 + 4 * 8 * 8 + 3 * 8 * 16
    norms = 3 * 8
    assert model.flops_per_token() == 6 * (matrices + norms) + 12 * 8 * 4
    assert model.estimate_mfu(100.0, 1e6) == pytest.approx(model.flops_per_token() * 1e-4)


def test_model_compiles_to_one_graph(tiny):
    compiled = torch.compile(tiny, backend="eager", fullgraph=True)
    x, y = torch.randint(0, 256, (2, 2, 16))
    torch.testing.assert_close(compiled(x, y)[1], tiny(x, y)[1])


def test_dropout_drops_channels_of_a_sequence_and_positions_of_a_head(monkeypatch):
    model, T, real = random_model(dropout=0.5, n_layer=1, n_kv_head=2), 12, F.scaled_dot_product_attention
    block, values, outputs = model.model.layers[0], [], []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda q, k, v, **how: (values.append(v), real(q, k, v, **how))[1])
    monkeypatch.setattr(block, "drop", lambda y: (outputs.append((y, Block.drop(block, y))), outputs[-1][1])[1])
    tokens = torch.randint(model.config.vocab_size, (3, T))
    model(tokens)
    model.train()
    torch.manual_seed(0)
    model(tokens)
    (kept, dropped), (y, y_dropped) = values, outputs[2]  # v (B, nh, T, hd), y (B, T, C)
    for x, left in ((kept, dropped), (y.mT, y_dropped.mT)):
        gone = (left == 0).all(-1)
        assert torch.equal(left, torch.where(gone[..., None], 0, 2 * x)) and 0.3 < gone.float().mean() < 0.7
    assert all(torch.equal(a, b) for a, b in outputs[:2])  # none in evaluation
