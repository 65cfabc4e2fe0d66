"""The C++ decoder against the Python path over the same weights and cache."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import assert_same_choice, random_model, step_by_step

import int8
from generate import generate
from int8 import Int8GPT
from model import KVCache

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


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    """The same but for sums in another order, which int8 can turn into a whole step here and there."""
    assert a.shape == b.shape and (a - b).norm() < 0.02 * b.norm()


def caches(models, B: int, length: int):
    """A cache for each model, of zeros."""
    for model in models:
        cache = model.new_cache(B, length)
        for tensor in vars(cache).values():
            if isinstance(tensor, torch.Tensor):
                tensor.zero_()
        yield cache


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_logits_are_those_of_the_python_path(models, prompt, int8_cache):
    fast, slow = models
    fast.int8_cache = slow.int8_cache = int8_cache
    tokens = torch.randint(0, fast.config.vocab_size, (1, fast.config.block_size))
    ours, theirs = step_by_step(fast, tokens, prompt), step_by_step(slow, tokens, prompt)
    assert_near(ours, theirs)
    assert_same_choice(ours, theirs)


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("B, parts", [(1, [2]), (1, [17, 1, 3]), (3, [16, 5]), (2, [1, 1]), (5, [3, 33, 1])])
def test_prompts_and_batches_are_those_of_the_python_path(B, parts, int8_cache):
    model = random_model(block_size=40, n_kv_head=2)
    models = fast, slow = int8.quantize(model, "owlet"), int8.quantize(model, "owlet")
    slow.decoder = None
    fast.int8_cache = slow.int8_cache = int8_cache
    tokens = torch.randint(0, 256, (B, sum(parts))).split(parts, dim=1)
    ours, theirs = caches(models, B, 40)
    for part in tokens:
        assert_near(fast(part, cache=ours)[0], slow(part, cache=theirs)[0])
    assert ours.pos == theirs.pos == sum(parts)
    for name in ("keys", "values"):
        a, b = (getattr(cache, name)[0].float() for cache in (ours, theirs))  # before any attention
        torch.testing.assert_close(a, b, atol=1 if int8_cache else 1e-4, rtol=1e-4)
        assert not a[:, :, sum(parts):].any()


def test_a_prompt_longer_than_what_goes_through_at_once():
    model = random_model(block_size=700)
    fast, slow = int8.quantize(model, "owlet"), int8.quantize(model, "owlet")
    slow.decoder = None
    tokens = torch.randint(0, 256, (2, 601))
    ours, theirs = caches((fast, slow), 2, 700)
    assert_near(fast(tokens, cache=ours)[0], slow(tokens, cache=theirs)[0])
    assert_near(ours.keys[..., :601, :], theirs.keys[..., :601, :])
    assert_near(fast(tokens[:, :1], cache=ours)[0], slow(tokens[:, :1], cache=theirs)[0])


def test_a_stream_does_not_know_of_the_others(models):
    fast, _ = models
    tokens = torch.randint(0, fast.config.vocab_size, (4, 19))
    together = fast.new_cache(4, 20)
    first, second = (fast(part, cache=together)[0] for part in tokens.split([18, 1], dim=1))
    for b in range(4):
        alone = fast.new_cache(1, 20)
        assert torch.equal(fast(tokens[b:b + 1, :18], cache=alone)[0], first[b:b + 1])
        assert torch.equal(fast(tokens[b:b + 1, 18:], cache=alone)[0], second[b:b + 1])


@pytest.mark.parametrize("B, int8_cache", [(1, False), (2, True)])
def test_generation_past_the_context(models, B, int8_cache):
    fast, slow = models
    fast.int8_cache = slow.int8_cache = int8_cache
    block, vocab = fast.config.block_size, fast.config.vocab_size
    prompt = torch.randint(0, vocab, (B, 5))
    new = torch.stack(list(generate(fast, prompt, block + 20, temperature=0)), dim=1)
    text = torch.cat((prompt, new), dim=1)
    start, chosen, expected = 0, [], []
    with torch.inference_mode():
        for end in range(5, text.size(1)):
            if end - start > block:
                start = end - block // 2
            cache = slow.new_cache(B, block)
            expected.append(slow(text[:, start:end], cache=cache)[0][:, 0])
            chosen.append(torch.nn.functional.one_hot(text[:, end], vocab).float())
    assert_same_choice(torch.cat(chosen), torch.cat(expected))


def prompt_and_steps(model: Int8GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after most of tokens (B, T) at once and then each of the others, for all streams and for the first."""
    logits = []
    for part in (tokens, tokens[:1]):
        cache = model.new_cache(*part.shape)
        for some in part.split([part.size(1) - 3, 1, 1, 1], dim=1):
            logits.append(model(some, cache=cache)[0].flatten())
    return torch.cat(logits)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads_gives_the_same_bits(models, threads, count):
    fast, _ = models
    tokens = torch.randint(0, fast.config.vocab_size, (3, 20))
    threads(1)
    one = prompt_and_steps(fast, tokens)
    threads(count)
    assert torch.equal(prompt_and_steps(fast, tokens), one)


def test_every_instruction_set_gives_the_same_bits(models):
    fast, _ = models
    tokens = torch.randint(0, fast.config.vocab_size, (3, 20))
    results, best = {}, kernels.isa()
    try:
        for isa in kernels.isas():
            kernels.use_isa(isa)
            results[isa] = prompt_and_steps(fast, tokens)
    finally:
        kernels.use_isa(best)
    assert all(torch.equal(result, results[best]) for result in results.values())


@pytest.mark.parametrize("int8_cache", [False, True])
@pytest.mark.parametrize("new", [1, 9])
def test_a_nan_comes_out_as_nan(models, new, int8_cache):
    fast, _ = models
    fast.int8_cache = int8_cache
    cache = fast.new_cache(1, 10)
    fast(torch.zeros(1, 1, dtype=torch.long), cache=cache)
    (cache.key_scales if int8_cache else cache.keys)[0, 0, 0, 0] = math.nan
    assert fast(torch.zeros(1, new, dtype=torch.long), cache=cache)[0].isnan().all()


def test_more_streams_than_go_through_at_once():
    model = random_model()
    fast, slow = int8.quantize(model, "owlet"), int8.quantize(model, "owlet")
    slow.decoder = None
    tokens = torch.randint(0, 256, (300, 3))
    ours, theirs = caches((fast, slow), 300, 4)
    assert_near(fast(tokens, cache=ours)[0], slow(tokens, cache=theirs)[0])
    assert_near(fast(tokens[:, :1], cache=ours)[0], slow(tokens[:, :1], cache=theirs)[0])


def test_calls_from_several_python_threads(models):
    fast, _ = models
    prompts = [torch.randint(0, fast.config.vocab_size, (1, 3 + i)) for i in range(6)]

    def text(prompt: torch.Tensor) -> list[torch.Tensor]:
        return list(generate(fast, prompt, 20, temperature=0))

    expected = [text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(text, prompts)) == expected


def test_misuse_is_refused(models):
    fast, _ = models
    cache, token = KVCache(fast.config, 1, 8), torch.zeros(1, 1, dtype=torch.long)
    for tokens, pos, keys in [
            (token - 1, 0, cache.keys), (token + 10**6, 0, cache.keys), (token.int(), 0, cache.keys),
            (token[0], 0, cache.keys), (token[:0], 0, cache.keys), (token, 8, cache.keys), (token, -1, cache.keys),
            (token.expand(1, 9), 0, cache.keys), (token.expand(2, 1), 0, cache.keys), (token, 0, cache.keys[:-1]),
            (token, 0, cache.keys.double()), (token, 0, cache.keys.transpose(3, 4))]:
        with pytest.raises(RuntimeError, match="must be"):
            fast.decoder.forward(tokens, pos, keys, cache.values)
    with pytest.raises(RuntimeError, match="must be"):  # scales, but keys that are not int8
        fast.decoder.forward(token, 0, cache.keys, cache.values, cache.keys[..., 0], cache.values[..., 0])
    mixed = int8.Int8KVCache(fast.config, 1, 8)
    with pytest.raises(RuntimeError, match="must be given both or neither"):
        fast.decoder.forward(token, 0, mixed.keys, cache.values, mixed.key_scales)
    with pytest.raises(TypeError):
        kernels.Decoder(n_embd=3)
