"""The same seed writes the same text: by owlet's kernels, the reference, the emulated GPU's decoder and the page."""

import pytest
import torch
from test_cuda_kernels import Decoder, library  # noqa: F401  (a fixture)
from test_html import WRITE, needs_compiler, needs_node, node
from test_quantize import trained  # noqa: F401  (a fixture)

import generate as generation
import int8
from generate import generate
from lib.checkpoint import copy_companions, load_model
from lib.page import write_html

kernels = pytest.importorskip("owlet_kernels", reason="the kernels are not built: python setup.py build_ext")

SEEDS, NEW = range(20), 100
SETTINGS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.1}
PROMPT = "Owl sees"


def texts(model, seeds=SEEDS, rows=1, new=NEW, **settings) -> torch.Tensor:
    """(len(seeds) * rows, new)."""
    idx = torch.tensor([list(PROMPT.encode())] * rows)
    return torch.cat([torch.stack(list(generate(model, idx, new, seed=seed, **settings)), dim=1) for seed in seeds])


def assert_same_until_logits_swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """Last bits may turn an activation by a step of int8, and that a close draw, in one text of twenty."""
    assert (a == b).all(dim=1).sum() >= len(SEEDS) - 1


@pytest.fixture(scope="module")
def fp32(trained):  # noqa: F811
    return load_model(trained)


@pytest.mark.parametrize("settings", [{}, SETTINGS], ids=["plain", "all settings"])
def test_owlet_and_the_reference(fp32, settings):
    owlet, reference = (int8.quantize(fp32, backend) for backend in ("owlet", "reference"))
    ours = texts(owlet, **settings)
    assert torch.equal(ours, texts(owlet, most_guesses=0, **settings))
    assert_same_until_logits_swap(ours, texts(reference, **settings))


@pytest.mark.parametrize("new", [10, pytest.param(NEW, marks=pytest.mark.long)])
def test_the_gpus_decoder(fp32, library, monkeypatch, new):  # noqa: F811
    """Twenty rows of one seed, since an emulated token takes half a second."""
    state = int8.quantize_state(fp32)
    owlet, gpu = (int8.build(fp32.config, state, backend, fp32.device) for backend in ("owlet", "reference"))
    ours = texts(owlet, [3], 20, new, **SETTINGS)
    monkeypatch.setattr(generation, "capture", lambda work: work.step)
    monkeypatch.setattr(generation, "can_capture", lambda model: True)
    gpu.decoder = Decoder(library, fp32, state)
    assert_same_until_logits_swap(ours, texts(gpu, [3], 20, new, **SETTINGS))


@needs_compiler
@needs_node
def test_the_page(fp32, trained, tmp_path):  # noqa: F811
    """To the last token. The page has no top-k and no penalty."""
    int8.save_quantized(fp32, tmp_path / "int8")
    copy_companions(trained, tmp_path / "int8")
    write_html(tmp_path / "int8", tmp_path / "page.html")
    asked = [(PROMPT, 0.8, 0.95, seed, len(PROMPT) + NEW) for seed in SEEDS]
    pages = [ids[len(PROMPT):][:NEW] for ids, _ in node(tmp_path, tmp_path / "page.html", WRITE, asked)]
    assert texts(int8.load_quantized(tmp_path / "int8"), temperature=0.8, top_p=0.95).tolist() == pages
