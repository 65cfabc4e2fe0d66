"""A token as a recording, run step by step on the CPU: all but the recording itself."""

import pytest
import torch
from conftest import random_model

import cuda_graph
import int8
from cuda_graph import TokenGraph
from model import GPT, KVCache, generate

SETTINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "top-k": {"temperature": 0.9, "top_k": 5},
    "top-p": {"temperature": 0.9, "top_p": 0.8},
    "penalty": {"temperature": 0, "repetition_penalty": 1.5},
    "everything": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.3},
}


@pytest.fixture
def recordings(monkeypatch) -> list[int]:
    """Generating on the CPU as on CUDA, each replay being the step itself; the keys that each recording reads."""
    made = []

    def record(rehearse, step):
        made.append(rehearse.__self__.static.visible)
        rehearse()
        return step

    monkeypatch.setattr(KVCache, "recordable", True)
    monkeypatch.setattr(cuda_graph, "recorder", lambda device, generator: record)
    monkeypatch.setattr(cuda_graph, "BUCKET", 8)
    return made


def text(model: GPT, prompt: int = 5, new: int = 90, **settings: object) -> torch.Tensor:
    idx = torch.randint(0, model.config.vocab_size, (3, prompt), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(5)
    return torch.stack(list(generate(model, idx, new, generator=generator, **settings)), dim=1)


@pytest.mark.parametrize(("prompt", "visible"), [(1, [8, 16, 24, 32]), (12, [16, 24, 32]), (32, [24, 32])])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_the_ordinary_path_past_the_context(settings, prompt, visible, recordings):
    model = random_model(n_kv_head=2)
    ours = text(model, prompt, **settings)
    assert recordings == visible
    assert torch.equal(ours, text(model, prompt, use_cache=False, **settings))


def test_the_last_recording_reads_no_more_than_the_cache_holds(recordings):
    model = random_model(block_size=30, n_head=2)
    assert torch.equal(text(model), text(model, use_cache=False)) and recordings == [8, 16, 24, 30]


@pytest.mark.parametrize("settings", [SETTINGS["greedy"], SETTINGS["sampled"]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("others", [0, 9])
def test_rows_end_at_eos_one_by_one(settings, rows, others, recordings):
    model = random_model(vocab_size=40)
    free = text(model, new=30, **settings)
    eos = [int(free[row, 8 + 3 * row]) for row in range(rows)] + list(range(100, 100 + others))
    ours = text(model, new=30, eos=eos, **settings)
    assert recordings and torch.equal(ours, text(model, new=30, eos=eos, use_cache=False, **settings))
    ended = torch.isin(free, torch.tensor(eos)).cumsum(dim=1)
    after = torch.cat((torch.zeros(3, 1), ended[:, :-1]), dim=1) > 0
    assert torch.equal(ours, free.where(~after, eos[0])[:, :ours.size(1)])
    assert ours.size(1) == min(30, int((ended == 0).sum(dim=1).max()) + 1)


def test_a_rehearsal_leaves_nothing_behind(monkeypatch, recordings):
    model, settings = random_model(vocab_size=40), SETTINGS["everything"]
    eos = text(model, new=30, **settings)[0, [20, 12]].tolist()
    expected, step = text(model, eos=eos, use_cache=False, **settings), TokenGraph.step

    def rehearsed(work: TokenGraph) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(TokenGraph, "step", step)
            work.rehearse()
        step(work)

    monkeypatch.setattr(TokenGraph, "step", rehearsed)
    assert torch.equal(text(model, eos=eos, **settings), expected) and recordings


def test_int8_models_too_but_for_an_int8_cache(recordings):
    model = int8.quantize(random_model(), "reference")
    ours = text(model, new=20, temperature=0)
    assert recordings == [8, 16, 24]
    assert torch.equal(ours, text(model, new=20, temperature=0, use_cache=False))
    model.int8_cache = True
    text(model, new=20)
    assert recordings == [8, 16, 24]


def test_without_recording_nothing_changes(monkeypatch):
    monkeypatch.setattr(cuda_graph, "recorder", None)
    text(random_model())
