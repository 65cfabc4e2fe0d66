"""Folders made by others: what is right in them is used, what is not is named in one line."""

import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
from conftest import damage, random_model, refused, save_model
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from test_fuzz import TOKENIZERS
from test_quantize import quick  # noqa: F401  (a fixture)
from tokenizers import Tokenizer, models

import quantize
import sample
import train
from generate import generate
from lib import corpus
from lib.checkpoint import (
    COMPANIONS,
    STATE,
    config_from_hf,
    config_to_hf,
    load_model,
    read_config,
    read_safetensors,
    read_tokenizer,
    write_tensors,
)

QUICK = ["--max-steps", 3, "--batch-size", 2, "--block-size", 16, "--eval-tokens", 200, "--threads", 1,
         "--device", "cpu"]
SHORT = ["--max-new-tokens", 8, "--seed", 1]


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A folder with a small model and a tokenizer of bytes, free to be damaged."""
    monkeypatch.chdir(tmp_path)
    save_model(random_model(vocab_size=256, block_size=16, n_layer=1), Path("model"))
    corpus.train_tokenizer([], 256).save("model/tokenizer.json")
    return Path("model")


# ---------------------------------------------------------------- the tokenizer

def test_a_tokenizer_takes_text_as_it_is(script, data, text_file, tmp_path):
    tokenizer = corpus.train_tokenizer([text_file.read_text()[:5000]], 300)
    tokenizer.enable_truncation(512)
    tokenizer.enable_padding(length=600)
    tokenizer.model.dropout = 0.5
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert script(prepare.main, "--input", text_file, "--tokenizer", tmp_path, "--out", tmp_path / "data")[0] == 0
    ids = np.concatenate([np.fromfile(tmp_path / "data" / f"{part}.bin", "<u2") for part in ("train", "val")])
    assert read_tokenizer(tmp_path).decode(ids.tolist()) == text_file.read_text()
    assert len(read_tokenizer(tmp_path).encode("Owl").ids) <= 3
    assert len({tuple(read_tokenizer(tmp_path).encode("Owl sees Fox at ten.").ids) for _ in range(20)}) == 1


def test_a_tokenizer_that_hardly_knows_the_text_is_noted(script, text_file, tmp_path):
    Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    code, _, err = script(prepare.main, "--input", text_file, "--tokenizer", tmp_path, "--out", tmp_path / "data")
    assert code == 0 and "bytes a token" in err


@pytest.mark.parametrize(("tokenizer", "word"), [
    (Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")), "cannot encode"),
    (Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")), "cannot encode"),
    (Tokenizer(models.Unigram([("a", -1.0)])), "cannot encode"),
    (Tokenizer(models.BPE()), "without"),
], ids=["wordlevel", "wordpiece", "unigram", "empty"])
def test_tokenizers_that_cannot_encode_the_text_are_refused(script, text_file, tmp_path, tokenizer, word):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    refused(script(prepare.main, "--input", text_file, "--tokenizer", tmp_path, "--out", tmp_path / "data"),
            "tokenizer.json", word)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("changes", [
    {"padding": {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                 "pad_type_id": 0, "pad_token": "x"}},
    {"added_tokens": [{"id": 1 << 31, "content": "x", "single_word": False, "lstrip": False, "rstrip": False,
                       "normalized": False, "special": True}]},
    {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 1 << 31}}},
    {"model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": -1}}}, {"model": None}, {"added_tokens": 5},
], ids=["padding", "added", "vocab", "negative", "null", "type"])
def test_sizes_that_would_end_the_process_do_not_reach_the_library(model, script, changes):
    damage(model / "tokenizer.json", **changes)
    code, _, err = result = script(sample.main, "--checkpoint", model, *SHORT)
    if "padding" in changes:
        assert code == 0, err
    else:
        refused(result, "tokenizer.json")


@pytest.mark.parametrize("backend", ["fp32", "owlet", "torch.ao", "reference"])
def test_a_prompt_with_tokens_that_the_model_lacks_is_refused(model, script, backend):
    tokenizer = read_tokenizer(model)
    tokenizer.add_special_tokens(["[PAD]"])
    if backend != "fp32":
        assert script(quantize.main, "--checkpoint", model, "--no-compare")[0] == 0
        model = model.with_name("model-int8")
    tokenizer.save(str(model / "tokenizer.json"))
    flags = ["--backend", backend] if backend != "fp32" else []
    refused(script(sample.main, "--checkpoint", model, "--prompt", "a[PAD]", *flags), "'[PAD]'", "256")


@pytest.mark.parametrize("name", ["bytes", "bpe", *TOKENIZERS])
def test_any_tokens_become_the_text_that_decode_makes_of_all(name, text_file):
    """Llama's decoder takes a run of single bytes as text or none of it, so that a later byte changes earlier ones."""
    tokenizer = {"bytes": corpus.train_tokenizer([], 256, end=True),
                 "bpe": corpus.train_tokenizer([text_file.read_text()[:3000]], 290)}.get(name) or TOKENIZERS[name]
    rng, ids = random.Random(0), [*tokenizer.get_vocab().values(), 299]  # one more than there are
    prompt = tokenizer.encode("a b").ids if name != "unigram" else []
    for length in [1, 2, 3, 5, 9] * 60 + [1000] * 9:
        tokens = rng.choices(ids if rng.random() < 0.7 else ids[:40], k=length)
        detokenize = sample.Detokenizer(tokenizer, prompt)
        text = "".join(map(detokenize, tokens)) + detokenize.rest()
        before, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + tokens)
        assert before + text == whole or not whole.startswith(before)


def test_a_letter_is_written_as_soon_as_it_is_sure():
    llama, words = TOKENIZERS["llama"], []
    detokenize = sample.Detokenizer(llama, [])
    for token in ["a", "<0x41>", "<0xFF>", "▁", "b"]:
        words.append(detokenize(llama.token_to_id(token)))
    assert words == ["a", "", "", "", "\ufffd\ufffd b"]


# ---------------------------------------------------------------- what lies beside the model

def test_what_lies_beside_a_model_travels_along(model, script, text_file):
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (model / "special_tokens_map.json").write_text('{"pad_token": "x"}')
    (model / "tokenizer_config.json").write_text('{"chat_template": "y", "eos_token": "z"}')
    damage(model / "generation_config.json", temperature=0.125, pad_token_id=3, eos_token_id=[7, 9])
    for main, *flags in [(prepare.main, "--input", text_file, "--tokenizer", model, "--out", "data"),
                         (train.main, "--init-from", model, "--data", "data", "--out", "tuned", *QUICK),
                         (quantize.main, "--checkpoint", "tuned", "--no-compare")]:
        code, _, err = script(main, *flags)
        assert code == 0, err
    for name in set(COMPANIONS) - {"tokenizer.json"}:
        read = json.loads if name.endswith("json") else str
        for made in ("tuned", "tuned-int8"):
            assert read(Path(made, name).read_text()) == read((model / name).read_text())
    assert load_model("tuned").config.eos == [7, 9] and read_config("tuned-int8")["eos_token_id"] == [7, 9]


def test_an_end_token_that_the_model_lacks_is_none(model, script, capsys):
    for eos, known in [(50256, None), ([300, 4], [4]), ([], None), (-1, None), ([-1, 256], None), (255, 255)]:
        damage(model / "config.json", eos_token_id=eos)
        (model / "generation_config.json").unlink(missing_ok=True)
        capsys.readouterr()
        assert load_model(model).config.eos == known
        if eos in ([], known):
            assert not capsys.readouterr().err
    damage(model / "config.json", eos_token_id=50256)
    code, out, err = script(quantize.main, "--checkpoint", model, "--no-compare", "--gguf")
    assert code == 0 and "-> model.gguf" in out, err
    assert GGUFReader("model.gguf").fields["tokenizer.ggml.eos_token_id"].contents() == 0  # none: a text has no NUL
    for made in ("model", "model-int8"):
        assert script(sample.main, "--checkpoint", made, "--num-samples", 2, *SHORT)[0] == 0


# ---------------------------------------------------------------- config.json

@pytest.mark.parametrize(("field", "value", "words"), [
    ("vocab_size", "256", ["vocab_size", "int", "str"]),
    ("hidden_size", 64.0, ["hidden_size", "int", "float"]),
    ("num_hidden_layers", 2**31, ["num_hidden_layers", "1024"]),
    *[(field, 2**31, [field]) for field in ("max_position_embeddings", "num_attention_heads", "vocab_size")],
    ("max_position_embeddings", True, ["max_position_embeddings", "bool"]),
    ("head_dim", -2, ["head_dim", "1 or more"]),
    ("rms_norm_eps", "small", ["rms_norm_eps"]),
    ("rms_norm_eps", -1, ["rms_norm_eps"]),
    ("rope_theta", 0, None),  # rope_parameters has it too, and counts
    ("rope_parameters", "default", ["rope_parameters", "object"]),
    ("rope_parameters", [], ["rope_parameters", "object"]),
    ("rope_parameters", {"rope_theta": "x"}, ["rope_theta"]),
    ("layer_types", 5, ["layer_types"]),
    ("layer_types", ["sliding_attention"], ["layer_types", "not supported"]),
    ("tie_word_embeddings", 1, ["tie_word_embeddings", "bool"]),
    ("eos_token_id", "x", ["eos_token_id"]),
    ("eos_token_id", [1.5], ["eos_token_id"]),
    ("bos_token_id", {}, ["bos_token_id"]),
    ("model_type", ["llama"], ["model_type"]),
    *[(field, value, None) for field, value in {
        "quantization_config": None, "eos_token_id": [], "layer_types": [], "rope_scaling": None}.items()],
])
def test_every_field_of_a_config_has_a_type_and_a_range(model, script, field, value, words):
    damage(model / "config.json", **{field: value})
    (model / "generation_config.json").unlink()
    result = script(sample.main, "--checkpoint", model, *SHORT)
    if words is None:
        assert result[0] == 0, result[2]
    else:
        refused(result, "config.json", *words)


def test_a_byte_order_mark_is_no_error(model, script):
    (model / "config.json").write_bytes(b"\xef\xbb\xbf" + (model / "config.json").read_bytes())
    assert script(sample.main, "--checkpoint", model, *SHORT)[0] == 0


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'{"a": NaN}', b"[" * 100_000, b'{"a":"\xff"}', b"{}"])
def test_what_is_no_config_is_one_line(model, script, content):
    (model / "config.json").write_bytes(content)
    refused(script(sample.main, "--checkpoint", model), "config.json")


def test_configs_go_round():
    config = random_model(eos=[3, 5], bos=7).config
    assert config_from_hf(config_to_hf(config)) == config


# ---------------------------------------------------------------- weights

def test_a_head_of_its_own_is_used_though_the_config_ties_it(model, script, capsys):
    weights = load_file(model / "model.safetensors")
    head = torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights | {"lm_head.weight": head}, model / "model.safetensors")
    loaded = load_model(model)
    assert torch.equal(loaded.lm_head.weight, head) and not loaded.config.tie_embeddings
    assert "lm_head.weight differs" in capsys.readouterr().err
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    assert load_model(model).config.tie_embeddings


@pytest.mark.parametrize(("index", "words"), [
    ({"weight_map": {"x": "model-00001-of-00002.safetensors"}}, None),
    ({"weight_map": {"x": "gone.safetensors"}}, ["gone.safetensors", "no such file"]),
    *[({"weight_map": value}, ["weight_map"]) for value in (None, [], 5, {"x": 5})], ({}, ["weight_map"]),
    ([], ["index.json"]), ({"weight_map": {"x": ""}}, ["a folder"]),
    *[({"weight_map": {"x": path}}, [repr(path)]) for path in ("../secret.safetensors", "/etc/passwd")]], ids=str)
def test_the_whole_file_comes_before_shards_and_shards_lie_in_the_folder(model, script, index, words):
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(model / "model.safetensors", "secret.safetensors")
    if words is None:  # the whole file is there
        assert script(sample.main, "--checkpoint", model, *SHORT)[0] == 0
    else:
        (model / "model.safetensors").unlink()
        refused(script(sample.main, "--checkpoint", model, *SHORT), *words)
        refused(script(quantize.main, "--checkpoint", model), *words)


def test_an_int8_weight_of_minus_128_is_refused(model, script):
    assert script(quantize.main, "--checkpoint", model, "--no-compare")[0] == 0
    path = Path("model-int8/model.safetensors")
    for name, tensor in load_file(path).items():
        if tensor.dtype == torch.int8:
            changed = load_file(path)
            changed[name][-1, -1] = -128
            save_file(changed, path.with_name("changed"))
            path.with_name("changed").replace(path)
            refused(script(sample.main, "--checkpoint", "model-int8", *SHORT), name, "-128")
            changed[name][-1, -1] = -127
            save_file(changed, path)
    for field in ("quantization_config", "vocab_size", "num_hidden_layers"):
        before = Path("model-int8/config.json").read_text()
        damage(Path("model-int8/config.json"), **{field: "x"})
        refused(script(sample.main, "--checkpoint", "model-int8", *SHORT), "config.json", field)
        Path("model-int8/config.json").write_text(before)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                                  STATE, "run.json", "log.jsonl"])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "folder"])
def test_what_is_no_plain_file_is_one_line(script, folder, name, kind):
    (folder / name).unlink()
    make = {"pipe": os.mkfifo, "zeros": lambda path: path.symlink_to("/dev/zero"), "folder": Path.mkdir}[kind]
    make(folder / name)
    if name in (STATE, "run.json", "log.jsonl"):
        code, _, err = result = script(train.main, "--resume", "--out", folder, "--max-steps", 3, "--threads", 1)
        if name == "log.jsonl":  # a run does not end for its diary's sake
            assert code == 0 and "log.jsonl" in err and "Traceback" not in err
            return
    else:
        result = script(sample.main, "--checkpoint", folder, *SHORT)
        refused(script(quantize.main, "--checkpoint", folder, "--no-compare"), name)
        assert not folder.with_name("wood-int8").exists()
    refused(result, name)


def test_large_files_in_place_of_json_are_not_read(model, script):
    with (model / "config.json").open("ab") as file:
        file.truncate(65_000_000)
    refused(script(sample.main, "--checkpoint", model), "config.json", "at most 64 MB")


# ---------------------------------------------------------------- prepared data

@pytest.mark.parametrize(("change", "word"), [
    *[({"dtype": dtype}, "dtype") for dtype in ("O", "f4", "i1", "bool", "c16", "u1", "<u8", None, 5)],
    *[({"vocab_size": size}, "vocab_size") for size in (0, "256", 2**40)],
    ({"vocab_size": 50}, "tokens below 50"), ({"train": None}, "train"), ({"val": []}, "val"),
    *[({"val": {"tokens": 3753, "sha256": "x", "bytes": value}}, "val.bytes") for value in (-1, 0, 1.5, None, "x")],
    ({"val": {"tokens": -1, "sha256": "x", "bytes": 1}}, "val.tokens"),
    ({"val": {"tokens": 3753, "bytes": 1}}, "sha256"),
    ({"val": {"tokens": 3753, "sha256": "x", "bytes": 1, "mtime_ns": []}}, "val.mtime_ns"), ({"eos": -1}, "eos"),
    *[({field: ...}, f"meta.json: object missing required field `{field}`")  # ...: the field is left out
      for field in ("dtype", "vocab_size", "train", "val")],
    ({"train.bin": b"\x07\0"}, "train.bin: expected the tokens that meta.json describes, got others"),
    ({"val.bin": b""}, "prepare.py")], ids=str)
def test_prepared_data_that_does_not_fit_together_is_refused(script, data, tmp_path, change, word):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    [(field, value)] = change.items()
    if isinstance(value, bytes):  # another first token, or none
        tokens = (folder / field).read_bytes()
        (folder / field).write_bytes(value + tokens[2:])
    else:
        meta = json.loads((folder / "meta.json").read_text()) | change
        (folder / "meta.json").write_text(json.dumps({key: meta[key] for key in meta if meta[key] is not ...}))
    refused(script(train.main, "--data", folder, "--out", tmp_path / "out", *QUICK), folder, word)
    assert not (tmp_path / "out" / "config.json").exists()
    assert not (tmp_path / "out").exists() or word == "tokens below 50"  # which is seen once the run has begun


# ---------------------------------------------------------------- a run

@pytest.mark.parametrize("line", [b"{}", b"null", b'{"step": "x"}', b'{"step": NaN}', b"\xff\xfe", b"[" * 9999, b"5",
                                  b'{"train_loss": 1}', b'{"step": 1, "val_loss": [2]}', b'{"step": 1'])
def test_a_log_with_an_odd_line_does_not_end_a_run(script, folder, line):
    before = (folder / "log.jsonl").read_bytes()
    (folder / "log.jsonl").write_bytes(line + b"\n" + before)
    code, _, err = script(train.main, "--resume", "--out", folder, "--max-steps", 3, "--threads", 1)
    assert code == 0 and err.startswith("note: 3 steps instead of 2") and "line 1 is no record" in err, err
    assert (folder / "log.jsonl").read_bytes().startswith(before)


@pytest.mark.parametrize(("field", "value", "word"), [
    ("step", "x", "step"), ("step", -1, "step"), ("step", None, "step"), ("best", "x", "best"),
    ("seconds", -1, "seconds"), ("better", 5, "better"), ("model_config", {}, "embed_tokens"),
    ("model_config", {"n_layer": 0}, "n_layer"), ("model_config", {"n_layer": "x"}, "n_layer"),
    ("model_config", 5, "model_config")], ids=str)
def test_a_state_of_another_version_is_refused_by_the_field(script, folder, field, value, word):
    tensors, facts = read_safetensors(folder / STATE)
    del facts["sha256"]
    resume = [train.main, "--resume", "--out", folder, "--max-steps", 3, "--threads", 1]
    write_tensors(folder / STATE, tensors, **facts | {field: value})
    refused(script(*resume), STATE, word)
    del facts[field]
    write_tensors(folder / STATE, tensors, **facts)
    refused(script(*resume), STATE, field)


@pytest.mark.parametrize(("name", "change"), [
    ("weights.model.norm.weight", None), ("AdamW.0.exp_avg", None), ("Muon.0.momentum_buffer", None),
    ("AdamW.0.exp_avg", torch.tensor(0.0)), ("AdamW.0.exp_avg_sq", torch.ones(3)), ("AdamW.0.step", torch.ones(3)),
    ("AdamW.0.step", torch.tensor(1)), ("Muon.0.momentum_buffer", torch.ones(3)), ("colour", torch.ones(3)),
    ("AdamW.0.exp_avg", torch.tensor(float("nan"))), ("Muon.99.momentum_buffer", torch.ones(3))], ids=str)
def test_every_tensor_of_a_state_is_checked(script, folder, name, change):
    tensors, facts = read_safetensors(folder / STATE)
    del facts["sha256"]
    tensors = {name: x for name, x in (tensors | {name: change}).items() if x is not None}
    write_tensors(folder / STATE, tensors, **facts)
    refused(script(train.main, "--resume", "--out", folder, "--max-steps", 3, "--threads", 1), STATE, name)


@pytest.mark.parametrize(("part", "change", "word"), [
    ("flags", None, "flags"), ("plan", {}, "plan"), ("flags", {"muon_lr": "fast"}, "muon_lr"),
    ("flags", {"batch_size": -1}, "batch_size"), ("flags", {"size": "huge"}, "size"),
    ("flags", {"muon_lr": []}, "muon_lr"), ("plan", {"max_steps": -1}, "max_steps"),
    ("plan", {"block_size": 17}, "block_size"), ("plan", {"dropout": 1}, "dropout"),
    ("plan", {"dtype": "int4"}, "dtype"),
    ("flags", {"data": ""}, "data"), ("flags", {"qk_norm": 1}, "qk_norm"), ("flags", {"dropout": 1}, "dropout"),
    ("plan", {"data_sha256": 5}, "data_sha256"), ("plan", {"data": "a\0b"}, "data")], ids=str)
def test_what_run_json_says_is_checked_as_flags_are(script, folder, part, change, word):
    run = json.loads((folder / "run.json").read_text())
    damage(folder / "run.json", **{part: run[part] | change if change else change})
    refused(script(train.main, "--resume", "--out", folder, "--max-steps", 3, "--threads", 1), "run.json", word)


def test_an_older_run_is_named_and_its_model_goes_on(script, folder, quick):  # noqa: F811
    """An earlier version kept the state in train_state.pt and the settings in run.json."""
    (folder / STATE).rename(folder / "train_state.pt")
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({"settings": {"data": run["plan"]["data"], "size": "tiny"},
                                                 "data_sha256": run["plan"]["data_sha256"]}))
    refused(script(train.main, "--resume", "--out", folder), folder, "an older one's", "--init-from")
    code, _, err = script(quantize.main, "--checkpoint", folder, "--eval-tokens", 500)
    assert code == 0 and "no losses" not in err, err
    assert script(sample.main, "--checkpoint", folder, *SHORT)[0] == 0


def test_a_run_without_settings_is_one_line(script, folder, quick):  # noqa: F811
    (folder / "run.json").unlink()
    refused(script(train.main, "--resume", "--out", folder, "--max-steps", 3), "run.json", "no such file")
    code, _, err = script(quantize.main, "--checkpoint", folder)
    assert code == 0 and "the table has no losses" in err, err


# ---------------------------------------------------------------- rows and bytes

def test_the_text_of_a_row_ends_at_its_first_end_token(model, script, monkeypatch):
    rows = [[72, 105], [33, 257], [257, 33], [72, 72]]  # a row a token; the first ends third, the second second
    monkeypatch.setattr(sample, "generate", lambda *_, **__: map(torch.tensor, rows))
    damage(model / "config.json", eos_token_id=257, vocab_size=256)
    monkeypatch.setattr(sample, "load", lambda *_: random_model(vocab_size=258, eos=257))
    code, out, err = script(sample.main, "--checkpoint", model, "--num-samples", 2, "--prompt", ">")
    assert code == 0 and out == ">H!\n\n--- 2 of 2\n>i\n", (out, err)


@pytest.mark.parametrize("settings", [
    {"temperature": 1e-39}, {"temperature": 5e-324}, {"temperature": 1e300}, {"top_p": 5e-324}, {"top_p": 1e-300},
    {"repetition_penalty": 5e-324}, {"repetition_penalty": 1e300}, {"top_k": 10**30},
    {"temperature": 1e-39, "repetition_penalty": 1e300, "top_p": 1e-300}], ids=str)
def test_every_finite_setting_of_sampling_gives_text(settings):
    model, prompt = random_model(std=0.3), torch.arange(4).repeat(2, 1)
    with torch.no_grad():
        greedy = model(prompt)[0][:, -1].argmax(-1)
    [token] = generate(model, prompt, 1, **{"temperature": 1.0} | settings)
    assert ((token >= 0) & (token < 256)).all()
    if settings.keys() in ({"temperature"}, {"top_p"}) and min(settings.values()) < 1e-9:
        assert torch.equal(token, greedy)
