"""A token as a CUDA graph, run step by step on the CPU: all but the capture itself."""

import pytest
import torch
from conftest import random_model

import generate as generation
import int8
from generate import TokenGraph, generate
from model import GPT, KVCache

SETTINGS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "top-k": {"temperature": 0.9, "top_k": 5},
    "top-p": {"temperature": 0.9, "top_p": 0.8},
    "penalty": {"temperature": 0, "repetition_penalty": 1.5},
    "everything": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.3},
}


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """Generating on the CPU as on CUDA, each replay being the step itself; the keys that each graph reads."""
    made = []

    def capture(warm_up, step):
        made.append(warm_up.__self__.static.visible)
        warm_up()
        return step

    monkeypatch.setattr(generation, "can_capture", lambda cache: type(cache) is KVCache)
    monkeypatch.setattr(generation, "capturer", lambda device, generator: capture)
    monkeypatch.setattr(generation, "BUCKET", 8)
    return made


def text(model: GPT, prompt: int = 5, new: int = 90, **settings: object) -> torch.Tensor:
    idx = torch.randint(0, model.config.vocab_size, (3, prompt), generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(5)
    return torch.stack(list(generate(model, idx, new, generator=generator, **settings)), dim=1)


@pytest.mark.parametrize(("prompt", "visible"), [(1, [8, 16, 24, 32]), (12, [16, 24, 32]), (32, [24, 32])])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_tokens_are_those_of_the_ordinary_path_past_the_context(settings, prompt, visible, captures):
    model = random_model(n_kv_head=2)
    ours = text(model, prompt, **settings)
    assert captures == visible
    assert torch.equal(ours, text(model, prompt, use_cache=False, **settings))


def test_the_last_graph_reads_no_more_than_the_cache_holds(captures):
    model = random_model(block_size=30, n_head=2)
    assert torch.equal(text(model), text(model, use_cache=False)) and captures == [8, 16, 24, 30]


@pytest.mark.parametrize("settings", [SETTINGS["greedy"], SETTINGS["sampled"]], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("others", [0, 9])
def test_rows_end_at_eos_one_by_one(settings, rows, others, captures):
    model = random_model(vocab_size=40)
    free = text(model, new=30, **settings)
    eos = [int(free[row, 8 + 3 * row]) for row in range(rows)] + list(range(100, 100 + others))
    ours = text(model, new=30, eos=eos, **settings)
    assert captures and torch.equal(ours, text(model, new=30, eos=eos, use_cache=False, **settings))
    ended = torch.isin(free, torch.tensor(eos)).cumsum(dim=1)
    after = torch.cat((torch.zeros(3, 1), ended[:, :-1]), dim=1) > 0
    assert torch.equal(ours, free.where(~after, eos[0])[:, :ours.size(1)])
    assert ours.size(1) == min(30, int((ended == 0).sum(dim=1).max()) + 1)


def test_a_warm_up_leaves_nothing_behind(monkeypatch, captures):
    model, settings = random_model(vocab_size=40), SETTINGS["everything"]
    eos = text(model, new=30, **settings)[0, [20, 12]].tolist()
    expected, step = text(model, eos=eos, use_cache=False, **settings), TokenGraph.step

    def warmed_up(work: TokenGraph) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(TokenGraph, "step", step)
            work.warm_up()
        step(work)

    monkeypatch.setattr(TokenGraph, "step", warmed_up)
    assert torch.equal(text(model, eos=eos, **settings), expected) and captures


def test_int8_models_too_but_for_an_int8_cache(captures):
    model = int8.quantize(random_model(), "reference")
    ours = text(model, new=20, temperature=0)
    assert captures == [8, 16, 24]
    assert torch.equal(ours, text(model, new=20, temperature=0, use_cache=False))
    model.int8_cache = True
    text(model, new=20)
    assert captures == [8, 16, 24]


def test_without_capturing_nothing_changes(monkeypatch):
    monkeypatch.setattr(generation, "capturer", None)
    text(random_model())


def test_the_next_generation_takes_the_graphs_of_the_last(captures):
    model, generator = random_model(), torch.Generator().manual_seed(5)
    idx = torch.randint(0, 256, (3, 5), generator=torch.Generator().manual_seed(7))

    def texts(**more: object) -> list[torch.Tensor]:
        generator.manual_seed(5)
        return [torch.stack(list(generate(model, idx, 20, generator=generator, **more))) for _ in range(3)]

    ours = texts()
    assert captures == [8, 16, 24]
    assert all(torch.equal(a, b) for a, b in zip(ours, texts(use_cache=False), strict=True))
    assert not torch.equal(ours[0], ours[1])  # the caller's generator moves on
    texts(temperature=0.5)
    assert captures == [8, 16, 24] * 2  # other settings are other work
    model.load_state_dict({name: tensor + 1 for name, tensor in model.state_dict().items()}, assign=True)
    texts(temperature=0.5)
    assert captures == [8, 16, 24] * 3


def test_two_generations_at_once_do_not_share_a_graph(captures):
    model = random_model()
    idx = torch.randint(0, 256, (2, 2, 5), generator=torch.Generator().manual_seed(7))
    text(model, new=20)
    generators = [torch.Generator(), torch.Generator()]
    both = zip(*(generate(model, prompt, 20, temperature=0, generator=generator)
                 for prompt, generator in zip(idx, generators, strict=True)), strict=True)
    both = [torch.stack(tokens) for tokens in zip(*both, strict=True)]
    for prompt, ours in zip(idx, both, strict=True):
        assert torch.equal(ours, torch.stack(list(generate(model, prompt, 20, temperature=0, use_cache=False))))
