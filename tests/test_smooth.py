"""Smoothing: the same fp32 model, and int8 that outliers do not break."""

import copy
import re

import pytest
import torch
from conftest import random_model, save_model

import int8
import quantize
from int8 import load_quantized, read_quantized, save_quantized
from lib.smooth import sites, smooth

KINDS = {"grouped, tied": {"n_kv_head": 2}, "llama, untied": {"qk_norm": False, "tie_embeddings": False},
         "grouped, wide heads": {"qk_norm": False, "n_kv_head": 1, "head_dim": 24}}
TOKENS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(5))


def with_outliers(**fields):
    """A model some of whose channels are a hundred times as large and meet weights a hundred times as small."""
    model = random_model(std=0.3, **fields)
    with torch.no_grad():
        for site in sites(model):
            if site.source is not None:
                planted = torch.ones(int(site.rows.max()) + 1)
                planted[[1, 7]] = 100.0
                site.source.weight.mul_(planted if site.source.weight.dim() == 1 else planted[:, None])
                for matrix in site.matrices:
                    matrix.weight.div_(planted[site.rows])
    return model


def off(model, exact):
    return ((model(TOKENS)[0] - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_outliers_are_smoothed_away(fields, tmp_path):
    model = with_outliers(**fields)
    smoothed = copy.deepcopy(model)
    smooth(smoothed)
    exact = model(TOKENS)[0]
    torch.testing.assert_close(smoothed(TOKENS)[0], exact, atol=2e-4 * exact.abs().max().item(), rtol=0)
    plain, better = (int8.quantize(each, "reference") for each in (model, smoothed))
    save_quantized(smoothed, tmp_path / "fine", fine_head=True)
    best = load_quantized(tmp_path / "fine", "reference")
    assert off(better, exact) < 0.25 * off(plain, exact), (off(plain, exact), off(better, exact))
    assert off(best, exact) < off(better, exact)


@torch.no_grad()
def test_where_nothing_stands_out_int8_is_no_worse():
    model = random_model(std=0.3)
    exact = model(TOKENS)[0]
    plain = off(int8.quantize(model, "reference"), exact)
    smooth(model)
    assert off(int8.quantize(model, "reference"), exact) < 1.05 * plain


@pytest.mark.parametrize("backend", ["owlet", "reference"])
def test_a_fine_head_is_exact_to_15_bits(backend):
    """The fine head removes the error that int8 adds at the head."""
    model = with_outliers(n_layer=1, tie_embeddings=False)
    for layer in model.model.layers:  # all of the error is the head's
        layer.self_attn.o_proj.weight.data.zero_(), layer.mlp.down_proj.weight.data.zero_()
    model = int8.dequantized(model.config, int8.quantize_state(model))  # int8 holds its weights exactly
    exact, state = model(TOKENS)[0], int8.quantize_state(model)
    plain, fine = (int8.build(model.config, state, backend, model.device, fine_head=fine_head)(TOKENS)[0]
                   for fine_head in (False, True))
    assert (plain - exact).norm() > 50 * (fine - exact).norm()


@pytest.mark.skipif(int8.owlet_kernels is None, reason="the kernels are not built")
@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_the_decoder_has_the_fine_head(tmp_path, batch):
    model = with_outliers(n_kv_head=2)
    save_quantized(model, tmp_path / "fine", fine_head=True)
    fine, reference = (load_quantized(tmp_path / "fine", backend) for backend in ("owlet", "reference"))
    assert read_quantized(tmp_path / "fine")[3] and reference.fine_head
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        cache = fine.new_cache(batch, 32)
        results.append(torch.cat([fine(part, cache=cache)[0] for part in TOKENS[:batch, :10].split([9, 1], dim=1)], 1))
    torch.set_num_threads(1)
    assert all(torch.equal(result, results[0]) for result in results)
    expected = reference(TOKENS[:batch, :10])[0][:, [8, 9]]
    torch.testing.assert_close(results[0], expected, atol=2e-2 * expected.abs().max().item(), rtol=0)


def test_the_folder_says_which_head_it_needs(tmp_path, script, folder):
    save_model(with_outliers(vocab_size=256), folder)
    code, out, err = script(quantize.main, "--checkpoint", folder, "--no-compare")
    assert code == 0, err
    before, after = map(float, re.search(r"products are ([\d.]+)% off, after smoothing ([\d.]+)%", out).groups())
    assert before > 2 * after
    config = folder.with_name(f"{folder.name}-int8") / "config.json"
    assert read_quantized(config.parent)[3] == ('"fine"' in config.read_text())
    config.write_text(config.read_text().replace('"bits"', '"fine": ["o_proj"], "bits"').replace(
        '"fine": [\n      "lm_head"\n    ]', '"fine": ["o_proj"]'))
    with pytest.raises(Exception, match="fine"):
        load_quantized(config.parent)
