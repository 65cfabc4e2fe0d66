"""The same seed writes the same text: by owlet's kernels, the reference and the emulated GPU's decoder.

tests/test_html.py has the page, tests/test_writer.py guesses.
"""

import pytest
import torch
from test_cuda_kernels import Decoder
from test_quantize import train_model

import generate as generation
import int8
from generate import generate
from lib.checkpoint import load_model

kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

SEEDS = range(20)
SETTINGS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}


def texts(model, seeds=SEEDS, rows=1, new=100, **settings) -> torch.Tensor:
    """(len(seeds) * rows, new)."""
    idx = torch.tensor([list(b"Owl sees")] * rows)
    return torch.cat([torch.stack(list(generate(model, idx, new, seed=seed, **settings)), dim=1) for seed in seeds])


def assert_same_until_logits_swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """A last bit may change an activation by a step of int8, and so a close draw: in one text of twenty at most."""
    assert (a == b).all(dim=1).sum() >= len(SEEDS) - 1


@pytest.fixture(scope="module")
def fp32(data):
    return load_model(train_model(data))


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["plain", "all settings"])
def test_owlet_and_the_reference(fp32, settings):
    assert_same_until_logits_swap(*(texts(int8.quantize(fp32, backend), **settings)
                                    for backend in ("owlet", "reference")))


@pytest.mark.parametrize("new", [5, pytest.param(100, marks=pytest.mark.long)])
def test_the_gpus_decoder(fp32, monkeypatch, new):
    """Twenty rows of one seed, since an emulated token takes half a second."""
    state = int8.quantize_state(fp32)
    owlet, gpu = (int8.build(fp32.config, state, backend, fp32.device) for backend in ("owlet", "reference"))
    ours = texts(owlet, [3], 20, new, **SETTINGS)
    monkeypatch.setattr(generation, "capture", lambda work: work.step)
    monkeypatch.setattr(generation, "can_capture", lambda model: True)
    gpu.decoder = Decoder(fp32, state)
    assert_same_until_logits_swap(ours, texts(gpu, [3], 20, new, **SETTINGS))
