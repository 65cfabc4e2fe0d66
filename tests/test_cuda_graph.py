"""A token as a CUDA graph, run step by step on the CPU: everything but the capture itself."""

import pytest
import torch
from conftest import random_model

import generate as generation
import int8
from generate import TokenGraph, generate
from model import GPT

SETTINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "top-k": {"temperature": 0.9, "top_k": 5},
    "top-p": {"temperature": 0.9, "top_p": 0.8},
    "penalty": {"temperature": 0, "repetition_penalty": 1.5},
    "everything": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.3},
}


@pytest.fixture
def captures(monkeypatch) -> list[TokenGraph]:
    """Generating on the CPU as on CUDA: a replay is the step itself, and capturing one runs it a few times."""
    made = []

    def capture(work):
        for _ in range(3):
            work.step()
            work.cache.pos.zero_(), work.token.zero_()
        made.append(work)
        return work.step

    monkeypatch.setattr(generation, "capture", capture)
    monkeypatch.setattr(generation, "can_capture", lambda model: True)
    return made


def text(model: GPT, prompt: int = 5, new: int = 90, **settings: object) -> torch.Tensor:
    idx = torch.randint(0, model.config.vocab_size, (3, prompt), generator=torch.Generator().manual_seed(7))
    return torch.stack(list(generate(model, idx, new, seed=5, **settings)), dim=1)


@pytest.mark.parametrize("prompt", [1, 12, 32])
@pytest.mark.parametrize("kind, settings", [*(("fp32", name) for name in SETTINGS), ("int8", "everything")])
def test_tokens_are_those_of_the_ordinary_path_past_the_context(kind, settings, prompt, captures):
    model = random_model(n_kv_head=2)
    model = int8.quantize(model, "reference") if kind == "int8" else model
    ours = text(model, prompt, **SETTINGS[settings])
    assert len(captures) == 1
    assert torch.equal(ours, text(model, prompt, use_cache=False, **SETTINGS[settings]))


@pytest.mark.parametrize("settings", ["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("others", [0, 9])
def test_rows_end_at_eos_one_by_one(settings, rows, others, captures):
    model, settings = random_model(vocab_size=40), SETTINGS[settings]
    free = text(model, new=30, **settings)
    eos = [int(free[row, 8 + 3 * row]) for row in range(rows)] + list(range(100, 100 + others))
    ours = text(model, new=30, eos=eos, **settings)
    assert captures and torch.equal(ours, text(model, new=30, eos=eos, use_cache=False, **settings))
    ended = torch.isin(free, torch.tensor(eos)).cumsum(dim=1)
    after = torch.cat((torch.zeros(3, 1), ended[:, :-1]), dim=1) > 0
    assert torch.equal(ours, free.where(~after, eos[0])[:, :ours.size(1)])
    assert ours.size(1) == min(30, int((ended == 0).sum(dim=1).max()) + 1)


def test_two_generations_at_once_do_not_share_a_graph(captures):
    model = random_model()
    idx = torch.randint(0, 256, (2, 2, 5), generator=torch.Generator().manual_seed(7))
    both = zip(*(generate(model, prompt, 20, temperature=0) for prompt in idx), strict=True)
    both = [torch.stack(tokens) for tokens in zip(*both, strict=True)]
    assert len(captures) == 2
    for prompt, ours in zip(idx, both, strict=True):
        assert torch.equal(ours, torch.stack(list(generate(model, prompt, 20, temperature=0, use_cache=False))))


def test_one_token_is_worth_no_graph(captures):
    text(random_model(), new=1)
    assert not captures
