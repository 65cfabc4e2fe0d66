"""csrc/writer.cpp: the sampler against a slow one, and guesses, which must not change a text."""

import copy
import functools
import math
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import random_model, save_model

import int8
import sample
from generate import generate, random_keys, sample_next
from int8 import KernelGPT
from lib.checkpoint import copy_companions
from lib.cli import UserError
from model import GPT

kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")


def noisy(model: GPT, std: float) -> KernelGPT:
    """A draft: the model with noise on its weights, so that it guesses right now and then."""
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * std
    return int8.quantize(model, "owlet")


@functools.cache
def make_pair(in_parts: bool, isa: str = "") -> tuple[KernelGPT, KernelGPT]:
    """A model, some of whose products are in parts or none, and a draft of half its context."""
    model = random_model(vocab_size=61, tie_embeddings=False, n_hidden=64)
    draft = copy.deepcopy(model)
    draft.config.block_size, draft.cos, draft.sin = 16, draft.cos[:16], draft.sin[:16]
    slices = 4 if in_parts else 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWLET_ISA", isa)
        state = int8.quantize_state(model, slices)
        return int8.build(model.config, state, "owlet", model.device, slices, in_parts), noisy(draft, 0.01)


@pytest.fixture(params=[False, True], ids=["plain", "in parts"])
def pair(request) -> tuple[KernelGPT, KernelGPT]:
    return make_pair(request.param)


def text(model: KernelGPT, prompt: torch.Tensor, new: int, seed: int = 0, **settings: object) -> torch.Tensor:
    return torch.stack(list(generate(model, prompt, new, seed=seed, **settings)), dim=1)


# ---------------------------------------------------------------- guesses

@pytest.mark.parametrize("block", range(8))
def test_guesses_do_not_change_the_text(block):
    threads, guessed = torch.get_num_threads(), 0
    for case in range(25 * block, 25 * (block + 1)):
        rng = random.Random(case)
        settings = {
            "seed": case, "temperature": rng.choice([0, 0.1, 0.8, 1.0, 1.5]), "eos": rng.choice([None, 7, [7, 8]]),
            "top_k": rng.choice([None, 1, 5, 1000]), "top_p": rng.choice([None, 0.3, 0.9]),
            "repetition_penalty": rng.choice([1.0, 0.7, 1.3])}
        prompt = torch.randint(0, 61, (rng.choice([1, 1, 2, 5, 40]), rng.choice([1, 5, 32])),
                               generator=torch.Generator().manual_seed(case))
        new, in_parts = rng.choice([1, 20, 80]), rng.choice([False, True])  # 80: past the context, which is 32
        reference, _ = make_pair(in_parts)
        plain = text(reference, prompt, new, **settings, most_guesses=0)
        assert reference.guesses == (0, 0)
        model, draft = make_pair(in_parts, rng.choice(kernels.isas()))
        torch.set_num_threads(rng.choice([1, 2, 3]))
        try:
            for more in ({}, {"draft": draft}):
                assert torch.equal(text(model, prompt, new, **settings, **more), plain), case
                guessed += model.guesses[0]
        finally:
            torch.set_num_threads(threads)
    assert guessed > 0


@pytest.mark.parametrize("context", [1, 2, 16, 100])
def test_a_draft_may_have_another_context(context):
    model = random_model(vocab_size=61, n_layer=4)
    draft = noisy(random_model(vocab_size=61, n_layer=1, block_size=context), 0.0)
    model, prompt = int8.quantize(model, "owlet"), torch.randint(0, 61, (2, 20))
    plain = text(model, prompt, 100, most_guesses=0)
    assert torch.equal(text(model, prompt, 100, draft=draft), plain)


def test_a_draft_shares_the_random_numbers():
    """At a high temperature they decide, so that other weights draw the same token."""
    model = int8.quantize(random_model(n_layer=16), "owlet")
    draft = int8.quantize(random_model(seed=1, n_layer=1, n_embd=16), "owlet")
    text(model, torch.zeros(1, 4, dtype=torch.long), 28, draft=draft, temperature=1e4)
    assert model.guesses[1] > 0.9 * model.guesses[0] > 5


def test_guesses_come_true(pair):
    model, draft = pair
    text(model, torch.zeros(1, 1, dtype=torch.long), 400, temperature=0, draft=draft)
    assert 0 < model.guesses[1] <= model.guesses[0]


def test_a_text_is_its_own_draft():
    model = int8.quantize(random_model(), "owlet")
    prompt = torch.tensor([[1, 2, 3, 4] * 5])
    new = text(model, prompt, 300, temperature=0)  # a small model soon repeats itself
    assert model.guesses[1] > 20
    assert torch.equal(new, text(model, prompt, 300, temperature=0, most_guesses=0))


def test_a_row_does_not_know_of_the_others(pair):
    model, draft = pair
    prompt = torch.randint(0, 61, (3, 9))
    together = text(model, prompt, 40, temperature=0, draft=draft)
    for row in range(3):
        assert torch.equal(text(model, prompt[row:row + 1], 40, temperature=0), together[row:row + 1])


def test_sample_takes_a_draft(data, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, layers in (("large", 2), ("little", 1)):
        int8.save_quantized(random_model(n_layer=layers), Path("out", name))
        copy_companions(data, Path("out", name))
    save_model(random_model(), Path("out/fp32"))
    copy_companions(data, Path("out/fp32"))
    words = ["--prompt", "Owl", "--max-new-tokens", 60, "--seed", 3]
    texts = [script(sample.main, "--checkpoint", "out/large", *words, *more)
             for more in ([], ["--draft", "out/little"], ["--draft", "auto"])]
    assert len({(code, out) for code, out, _ in texts}) == 1 and texts[0][0] == 0
    for folder, wrong, said in (("out/large", "out/large", "smaller than"), ("out/large", "nowhere", "nowhere"),
                                ("out/large", "out/fp32", "--draft out/fp32: expected an int8 folder")):
        code, _, err = script(sample.main, "--checkpoint", folder, "--draft", wrong, *words)
        assert code == 2 and said in err and "Traceback" not in err
    for folder, said in (("out/little", "found no int8 folder"), ("out/fp32", "are for int8 folders")):
        code, _, err = script(sample.main, "--checkpoint", folder, "--draft", "auto", *words)
        assert code == 0 and said in err


# ---------------------------------------------------------------- the sampler

@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5, "temperature": 1.4},
    {"repetition_penalty": 1.5}, {"temperature": 1e-9}, {"top_p": 1e-6}, {"top_k": 1}],
    ids=lambda settings: ", ".join(settings) or "plain")
def test_tokens_are_drawn_as_often_as_is_right(settings):
    model, rows = int8.quantize(random_model(vocab_size=31), "owlet"), 20_000
    settings = {"temperature": 1.0, "top_k": 31, "top_p": 1.0, "repetition_penalty": 1.0} | settings
    prompt = torch.tensor([[1, 2, 3, 2]])
    drawn = text(model, prompt.expand(rows, -1), 1, **settings).flatten()
    with torch.inference_mode():
        logits = model(prompt, cache=model.new_cache(1, 4))[0][:, -1]
    keys = random_keys(0, rows, range(4, 5), torch.device("cpu"))[:, 0]
    other = sample_next(logits.expand(rows, -1), prompt.expand(rows, -1), keys, **settings)
    assert torch.equal(drawn, other)  # with the same random numbers, the same token
    x = logits[0].double()
    if settings["repetition_penalty"] != 1:
        x[[1, 2, 3]] = torch.where(x > 0, x / 1.5, x * 1.5)[[1, 2, 3]]
    p = (x / settings["temperature"]).softmax(0)
    order = p.argsort(descending=True)
    kept = (torch.arange(31) < settings["top_k"])
    share = p[order] / p[order][kept].sum()
    p[order[~(kept & (share.cumsum(0) - share < settings["top_p"]))]] = 0
    expected, counts = rows * p / p.sum(), drawn.bincount(minlength=31)
    assert not counts[expected == 0].any()
    kept = expected > 0.5
    chi2, free = ((counts - expected)[kept] ** 2 / expected[kept]).sum(), max(1, int(kept.sum()) - 1)
    assert chi2 < free + 5 * math.sqrt(2 * free) + 5


@pytest.mark.parametrize("seed", range(20))
def test_ties_and_extremes_are_drawn_by_the_same_rule(seed):
    """Logits of few values, so that top-k and top-p end within equals: by C++ and by PyTorch."""
    rng, model = random.Random(seed), random_model(vocab_size=40, std=0.0, tie_embeddings=False)
    model.model.norm.weight.data[:] = 0.02
    model.model.embed_tokens.weight.data[:] = 1
    model.lm_head.weight.data[:] = torch.randint(-2, 3, (40, 1), generator=torch.Generator().manual_seed(seed))
    settings = {"temperature": rng.choice([0, 1e-30, 0.7, 1.0, 1e30]), "top_k": rng.choice([None, 1, 3, 17]),
                "top_p": rng.choice([None, 1e-6, 0.3, 0.9]), "repetition_penalty": rng.choice([1.0, 1e15, 1e-15, 1.2])}
    prompt = torch.randint(0, 40, (50, 3), generator=torch.Generator().manual_seed(seed))
    ours, theirs = (text(int8.quantize(model, backend), prompt, 6, seed=seed, **settings)
                    for backend in ("owlet", "reference"))
    assert torch.equal(ours, theirs)


def test_positions_and_seeds_draw_alike():
    """The random numbers of neighbouring positions, rows and seeds have nothing to do with each other."""
    model = int8.quantize(random_model(std=1e-4), "owlet")  # all tokens are equally likely
    tokens = torch.stack([text(model, torch.zeros(8, 1, dtype=torch.long), 400, seed=seed) for seed in (0, 1)])
    for a, b in ((tokens[0], tokens[1]), (tokens[:, 0], tokens[:, 1]), (tokens[..., :-1], tokens[..., 1:])):
        assert abs((a == b).float().mean() - 1 / 256) < 5 * math.sqrt(1 / 256 / a.numel())
    counts = tokens.flatten().bincount(minlength=256)
    assert ((counts - 25) ** 2 / 25).sum() < 255 + 5 * math.sqrt(2 * 255)


def test_texts_of_several_python_threads(pair):
    model, draft = pair
    prompts = [torch.randint(0, 61, (1, 3 + i)) for i in range(6)]
    expected = [text(model, prompt, 60, most_guesses=0) for prompt in prompts]
    with ThreadPoolExecutor(3) as pool:
        for ours, theirs in zip(pool.map(lambda prompt: text(model, prompt, 60, draft=draft), prompts), expected,
                                strict=True):
            assert torch.equal(ours, theirs)


def test_an_end_that_no_model_draws_is_none(pair):
    model, prompt = pair[0], torch.zeros(2, 3, dtype=torch.long)
    plain = text(model, prompt, 20)
    assert torch.equal(text(model, prompt, 20, eos=[10**6, -1], repetition_penalty=1.0), plain)
    end = int(plain[0, 5])
    assert (text(model, prompt, 20, eos=[10**6, end])[0, 5:] == end).all()


@pytest.mark.parametrize("make", [
    lambda: random_model(vocab_size=61), lambda: int8.quantize(random_model(), "owlet"),
    lambda: int8.quantize(random_model(vocab_size=61), "reference")], ids=["fp32", "other tokens", "reference"])
def test_another_kind_of_draft_is_refused(pair, make):
    with pytest.raises(UserError, match="draft: expected an int8 model with 61 tokens"):
        generate(pair[0], torch.zeros(1, 3, dtype=torch.long), 4, draft=make())


def test_misuse_is_refused(pair):
    model, draft = pair
    prompt = torch.zeros(1, 3, dtype=torch.long)
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0, "stops": [],
                "most_guesses": 4}
    for words, draft_model, more, said in (
            (prompt + 61, None, {}, "token must be 0 to 60"), (prompt, model, {}, "another decoder"),
            (prompt, int8.quantize(random_model(), "owlet"), {}, "another decoder"),
            (prompt, None, {"stops": [61]}, "token must be 0 to 60")):
        with pytest.raises(RuntimeError, match=said):
            model.new_writer(words, 4, draft_model, settings | more)
    writer = model.new_writer(prompt, 2, draft, settings)
    assert writer.write(10.0).shape == (1, 2)
    with pytest.raises(RuntimeError, match="all 5 tokens are written"):
        writer.write(1.0)
