"""The C++ decoder against the Python path over the same weights and cache."""

import math

import pytest
import torch
from conftest import assert_same_choice, random_model, step_by_step

import int8
from generate import generate
from int8 import Int8GPT, KernelGPT
from lib.cli import UserError

kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

MODELS = {
    "mha": {},
    "gqa": {"n_kv_head": 2},
    "one-kv-head": {"n_kv_head": 1, "head_dim": 10},
    "untied": {"tie_embeddings": False},
    "llama": {"qk_norm": False, "rope_theta": 500.0},
    "odd": {"n_head": 3, "head_dim": 6, "n_embd": 37, "n_hidden": 41, "vocab_size": 101, "n_layer": 3},
}


def both(**fields) -> tuple[KernelGPT, Int8GPT]:
    """The same int8 model in C++ and in PyTorch."""
    model = random_model(**fields)
    return int8.quantize(model, "owlet"), int8.quantize(model, "reference")


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def models(request) -> tuple[KernelGPT, Int8GPT]:
    return both(**request.param)


def assert_near(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for the last bits, which int8 can turn into a whole step here and there."""
    assert a.shape == b.shape and (a - b).norm() < 0.02 * b.norm()
    if b[..., 0].numel() >= 10:  # most rows have no such step
        assert ((a - b).abs().amax(-1) < 1e-5 * b.norm(dim=-1)).float().mean() > 0.4


@pytest.mark.parametrize("prompt", [0, 1, 9])
def test_logits_are_those_of_the_reference(models, prompt):
    fast, slow = models
    tokens = torch.randint(0, fast.config.vocab_size, (1, fast.config.block_size))
    ours, theirs = step_by_step(fast, tokens, prompt), step_by_step(slow, tokens, prompt)
    assert_near(ours, theirs)
    assert_same_choice(ours, theirs)


@pytest.mark.parametrize("B, parts", [(1, [2]), (1, [17, 1, 3]), (3, [16, 5]), (2, [1, 1]), (5, [3, 33, 1]),
                                      (2, [100, 60, 1]), (1, [64, 1, 63, 1, 1]),
                                      (2, [601, 1]), (300, [3, 1])])  # more than go through at once
def test_prompts_and_batches_are_those_of_the_reference(B, parts):
    fast, slow = both(block_size=700, n_kv_head=2)
    ours, theirs = fast.new_cache(B, sum(parts)), slow.new_cache(B, sum(parts))
    for part in torch.randint(0, 256, (B, sum(parts))).split(parts, dim=1):
        assert_near(fast(part, cache=ours)[0], slow(part, cache=theirs)[0])
    assert ours.pos == theirs.pos == sum(parts)


@pytest.mark.parametrize("T", [1, 31, 300])
def test_all_logits_and_the_loss_are_those_of_single_tokens(T):
    """The bits of one token at a time, whatever goes through together."""
    fast, slow = both(block_size=300, n_kv_head=2)
    tokens, targets = torch.randint(0, 256, (2, 2, T))
    logits, loss = fast(tokens, targets)
    assert torch.equal(logits[1], step_by_step(fast, tokens[1:]))
    assert torch.equal(logits, fast(tokens)[0]) and fast(tokens)[1] is None
    torch.testing.assert_close(loss, slow(tokens, targets)[1], rtol=1e-3, atol=0)
    assert torch.equal(fast(tokens[:1], targets[:1], fast.new_cache(1, T))[0], logits[:1])
    with pytest.raises(ValueError, match="do not fit"):
        fast(torch.zeros(1, 301, dtype=torch.long))


def test_a_sequence_does_not_know_of_the_others(models):
    fast, _ = models
    tokens = torch.randint(0, fast.config.vocab_size, (4, 19))
    together = fast.new_cache(4, 20)
    first, second = (fast(part, cache=together)[0] for part in tokens.split([18, 1], dim=1))
    for b in range(4):
        alone = fast.new_cache(1, 20)
        assert torch.equal(fast(tokens[b:b + 1, :18], cache=alone)[0], first[b:b + 1])
        assert torch.equal(fast(tokens[b:b + 1, 18:], cache=alone)[0], second[b:b + 1])


@pytest.mark.parametrize("B", [1, 2])
def test_generation_past_the_context(models, B):
    fast, slow = models
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
    assert torch.equal(new, torch.stack(list(generate(fast, prompt, block + 20, temperature=0, use_cache=False)), 1))


def prompt_and_steps(model: Int8GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after most of tokens (B, T) at once and then each of the others, for all sequences and for the first."""
    logits = []
    for part in (tokens, tokens[:1]):
        cache = model.new_cache(*part.shape)
        for some in part.split([part.size(1) - 3, 1, 1, 1], dim=1):
            logits.append(model(some, cache=cache)[0].flatten())
    return torch.cat(logits)


@pytest.mark.parametrize("fields", MODELS.values(), ids=MODELS)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(monkeypatch, fields):
    results, before = [], torch.get_num_threads()
    for isa in kernels.isas():
        monkeypatch.setenv("OWLET_ISA", isa)
        fast, _ = both(**fields)
        assert isa in fast.backend
        tokens = torch.randint(0, fast.config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(0))
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(prompt_and_steps(fast, tokens))
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("name, at, value", [
    ("model.norm.weight", ..., math.nan),
    ("model.norm.weight", ..., 1e38),  # finite, but its products are not
    *(("lm_head.weight_scale", row, math.nan) for row in (0, 5, 255))])
def test_logits_that_are_not_finite_are_said(name, at, value):
    model = random_model(std=1.0, tie_embeddings=False)
    state = int8.quantize_state(model)
    state[name][at] = value  # a norm is the fp32 model's too
    models = [int8.build(model.config, state, backend, model.device) for backend in ("owlet", "reference")]
    for broken in models if "lm_head" in name else (model, *models):
        assert not broken(torch.zeros(1, 9, dtype=torch.long))[0].isfinite().all()
        for settings in ({"temperature": 0}, {"top_k": 5}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}):
            with pytest.raises(UserError, match="the model's logits are not finite"):
                list(generate(broken, torch.zeros(2, 3, dtype=torch.long), 5, **settings))


@pytest.mark.parametrize("new", [1, 9])
def test_a_nan_in_one_layer_comes_out_as_nan(new):
    model = random_model(n_kv_head=2)
    model.model.layers[1].self_attn.k_norm.weight.data[0] = math.nan
    fast = int8.quantize(model, "owlet")
    assert fast(torch.zeros(1, new, dtype=torch.long))[0].isnan().all()


def test_tokens_handed_out_are_copies(models):
    for model in models:
        expected = [t.clone() for t in generate(model, torch.zeros(1, 3, dtype=torch.long), 40, temperature=0)]
        for token, right in zip(generate(model, torch.zeros(1, 3, dtype=torch.long), 40, temperature=0), expected,
                                strict=True):
            assert torch.equal(token, right)
            token.numpy()[:] = 10**9


def test_misuse_is_refused():
    fast, _ = both()
    token = torch.zeros(1, 1, dtype=torch.long)
    for tokens, pos in [(token - 1, 0), (token + 10**6, 0), (token.int(), 0), (token[0], 0), (token[:0], 0), (token, 8),
                        (token, -1), (token.expand(1, 9), 0), (token.expand(2, 1), 0)]:
        cache = fast.new_cache(1, 8)
        cache.pos = pos
        with pytest.raises(RuntimeError, match="must be"):
            fast.decoder.forward(tokens, cache)
    for batch, length in ((1, 0), (0, 1), (1, fast.config.block_size + 1), (-1, 1)):
        with pytest.raises(RuntimeError, match="the cache must hold 1 to"):
            fast.new_cache(batch, length)
    other, _ = both(n_layer=5, n_embd=64)
    with pytest.raises(RuntimeError, match="one of this decoder's"):
        other.decoder.forward(token, fast.new_cache(1, 8))
    with pytest.raises(RuntimeError, match="one for all"):
        fast.decoder.forward(token.expand(2, 1), fast.new_cache(2, 8), all=True)
    with pytest.raises(TypeError):
        kernels.Decoder(n_embd=3)


def test_a_width_whose_sums_could_overflow_is_one_line():
    model = random_model(n_layer=1, n_embd=2, n_head=1, head_dim=2, n_hidden=kernels.MAX_K + 4)
    with pytest.raises(UserError, match=f"n_hidden must be 1 to {kernels.MAX_K}"):
        int8.quantize(model, "owlet")


def test_two_models_each_have_their_own_kernel(monkeypatch):
    fast, _ = both()
    monkeypatch.setenv("OWLET_ISA", "generic")
    slow, _ = both()
    monkeypatch.delenv("OWLET_ISA")
    assert (slow.backend == "owlet (generic)" and "generic" not in fast.backend) or kernels.isas() == ["generic"]
