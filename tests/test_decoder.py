"""The C++ decoder against the Python path over the same weights and cache."""

import math

import pytest
import torch
from conftest import assert_same_choice, random_model, step_by_step

import int8
from int8 import Int8GPT
from model import KVCache, generate

kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

MODELS = {
    "mha": {},
    "gqa": {"n_kv_head": 2},
    "one-kv-head": {"n_kv_head": 1, "head_dim": 10},
    "untied": {"tie_embeddings": False},
    "llama": {"qk_norm": False, "rope_theta": 500.0},
    "odd": {"n_head": 3, "head_dim": 6, "n_embd": 37, "n_hidden": 41, "vocab_size": 101, "n_layer": 3},
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def models(request) -> tuple[Int8GPT, Int8GPT]:
    """The same int8 model with the decoder and without."""
    model = random_model(**request.param)
    fast, slow = int8.quantize(model, "owlet"), int8.quantize(model, "owlet")
    slow.decoder = None
    assert fast.decoder is not None
    return fast, slow


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_logits_are_those_of_the_python_path(models, prompt):
    fast, slow = models
    tokens = torch.randint(0, fast.config.vocab_size, (1, fast.config.block_size))
    ours, theirs = step_by_step(fast, tokens, prompt), step_by_step(slow, tokens, prompt)
    torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=1e-2)
    assert_same_choice(ours, theirs)


def test_cache_is_that_of_the_python_path(models):
    config = models[0].config
    tokens = torch.randint(0, config.vocab_size, (1, 12))
    caches = [KVCache(config, 1, 20) for _ in range(2)]
    for model, cache in zip(models, caches, strict=True):
        cache.keys.zero_(), cache.values.zero_()
        for i in range(12):
            model(tokens[:, i:i + 1], cache=cache)
    assert caches[0].pos == caches[1].pos == 12
    torch.testing.assert_close(caches[0].keys[0], caches[1].keys[0], atol=1e-4, rtol=1e-4)  # before any attention
    torch.testing.assert_close(caches[0].values[0], caches[1].values[0], atol=1e-4, rtol=1e-4)
    assert not caches[0].keys[:, :, :, 12:].any() and not caches[0].values[:, :, :, 12:].any()


def test_generation_past_the_context(models):
    fast, slow = models
    prompt = torch.randint(0, fast.config.vocab_size, (1, 5))
    block = fast.config.block_size
    text = torch.stack(list(generate(fast, prompt, block + 20, temperature=0)), dim=1)
    window = torch.cat((prompt, text), dim=1)[:, :block]
    with torch.inference_mode():
        assert_same_choice(torch.nn.functional.one_hot(text[0, :block - 4], fast.config.vocab_size).float(),
                           slow(window)[0][0, 4:])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(models, threads, count):
    fast, _ = models
    tokens = torch.randint(0, fast.config.vocab_size, (1, 20))
    threads(1)
    one = step_by_step(fast, tokens, 0)
    threads(count)
    assert torch.equal(step_by_step(fast, tokens, 0), one)


def test_every_instruction_set_gives_the_same_bits(models):
    fast, _ = models
    tokens = torch.randint(0, fast.config.vocab_size, (1, 20))
    results, best = {}, kernels.isa()
    try:
        for isa in kernels.isas():
            kernels.use_isa(isa)
            results[isa] = step_by_step(fast, tokens, 0)
    finally:
        kernels.use_isa(best)
    assert all(torch.equal(result, results[best]) for result in results.values())


def test_a_nan_comes_out_as_nan(models):
    fast, _ = models
    cache = KVCache(fast.config, 1)
    fast(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    cache.keys[0, 0, 0, 0, 0] = math.nan
    assert fast(torch.zeros(1, 1, dtype=torch.long), cache=cache)[0].isnan().all()


def test_misuse_is_refused(models):
    fast, _ = models
    cache = KVCache(fast.config, 1, 8)
    for token, pos, keys in [(-1, 0, cache.keys), (10**6, 0, cache.keys), (0, 8, cache.keys), (0, -1, cache.keys),
                             (0, 0, cache.keys[:-1]), (0, 0, cache.keys.double()), (0, 0, cache.keys.transpose(3, 4))]:
        with pytest.raises(RuntimeError, match="must be"):
            fast.decoder.forward(token, pos, keys, cache.values)
    with pytest.raises(TypeError):
        kernels.Decoder(n_embd=3)
