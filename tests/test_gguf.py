"""GGUF: what the file holds, read back by gguf's own reader; what llama.cpp makes of it, where it is installed."""

import json

from cli import UserError

import gguf
import numpy as np
import prepare
import pytest
import torch
from conftest import assert_same_choice, make_text, random_model, save_model
from tokenizers import processors

import quantize
from to_gguf import interleave_pairs, write_gguf

TEXT = "Owl sees Fox at ten.\n\n  ä, naïve — 日本 12345, don't!\r\n\t \x0b🦉 Wren."


def save(folder, vocab_size=256, **fields):
    """A folder as train.py leaves it; its vocabulary is three larger than the tokenizer's."""
    tokenizer = prepare.train_tokenizer([make_text(2000)], vocab_size)
    model = random_model(vocab_size=tokenizer.get_vocab_size() + 3, block_size=128, **{"n_embd": 64} | fields)
    save_model(model, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return model, tokenizer


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def test_metadata(tmp_path):
    model, _ = save(tmp_path, n_kv_head=2, head_dim=24, n_hidden=96, bos=7, eos=[9, 10], rope_theta=5000.0)
    write_gguf(model, tmp_path, tmp_path / "my.book.gguf")
    fields, _ = read(tmp_path / "my.book.gguf")
    expected = {
        "general.architecture": "qwen3", "general.name": "my.book", "general.quantization_version": 2,
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0, "qwen3.vocab_size": 259, "qwen3.context_length": 128,
        "qwen3.block_count": 2, "qwen3.embedding_length": 64, "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4, "qwen3.attention.head_count_kv": 2, "qwen3.attention.key_length": 24,
        "qwen3.attention.value_length": 24, "qwen3.rope.freq_base": 5000.0,
        "qwen3.attention.layer_norm_rms_epsilon": pytest.approx(1e-6), "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.bos_token_id": 7,
        "tokenizer.ggml.eos_token_id": 9}
    assert {name: fields[name] for name in expected} == expected


@pytest.mark.parametrize("vocab_size", [256, 400])
def test_tokenizer(tmp_path, vocab_size):
    model, tokenizer = save(tmp_path, vocab_size)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_gguf(model, tmp_path, tmp_path / "m.gguf")
    fields, _ = read(tmp_path / "m.gguf")
    known = tokenizer.get_vocab_size()
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:known] == [tokenizer.id_to_token(i) for i in range(known)]
    assert kinds == [gguf.TokenType.NORMAL] * (known - 1) + [gguf.TokenType.CONTROL] + [gguf.TokenType.UNUSED] * 2
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    assert not merges or fields["tokenizer.ggml.merges"] == [f"{a} {b}" for a, b in merges]
    assert "tokenizer.ggml.bos_token_id" not in fields
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "Ā"  # NUL, which no text holds


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": False}, {"qk_norm": False, "n_kv_head": 2},
                                    {"n_embd": 36, "head_dim": 8}], ids=str)
def test_tensors(tmp_path, fields, capsys):
    model, _ = save(tmp_path, **fields)
    write_gguf(model, tmp_path, tmp_path / "m.gguf")
    _, tensors = read(tmp_path / "m.gguf")
    odd = model.config.n_embd % 32 != 0
    assert capsys.readouterr().out.count("note:") == odd
    assert ("output.weight" in tensors) == (not model.config.tie_embeddings)
    assert len(tensors) == len(list(model.parameters()))
    state = model.state_dict()
    for name, ours in {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
                       "blk.1.attn_q": "model.layers.1.self_attn.q_proj",
                       "blk.1.attn_k": "model.layers.1.self_attn.k_proj",
                       "blk.1.attn_v": "model.layers.1.self_attn.v_proj",
                       "blk.1.attn_output": "model.layers.1.self_attn.o_proj",
                       "blk.1.attn_q_norm": "model.layers.1.self_attn.q_norm",
                       "blk.1.attn_norm": "model.layers.1.input_layernorm",
                       "blk.1.ffn_norm": "model.layers.1.post_attention_layernorm",
                       "blk.1.ffn_gate": "model.layers.1.mlp.gate_proj", "blk.1.ffn_up": "model.layers.1.mlp.up_proj",
                       "blk.0.ffn_down": "model.layers.0.mlp.down_proj"}.items():
        if f"{name}.weight" not in tensors:
            assert name in ("output", "blk.1.attn_q_norm")
            continue
        tensor, exact = tensors[f"{name}.weight"], state[f"{ours}.weight"]
        if name in ("blk.1.attn_q", "blk.1.attn_k") and not model.config.qk_norm:
            exact = interleave_pairs(exact, model.config.head_dim)
        kind = "F32" if exact.dim() == 1 else "F16" if exact.size(1) % 32 else "Q8_0"
        assert tensor.tensor_type.name == kind
        written = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        assert written.shape == exact.shape
        if kind == "F32":
            assert torch.equal(written, exact)
        else:  # half a step of the block, and fp16's rounding of its scale, or of the weight
            block = 32 if kind == "Q8_0" else 1
            largest = exact.unflatten(1, (-1, block)).abs().amax(-1, keepdim=True)
            step = largest / 127 * 0.5 if kind == "Q8_0" else 0
            assert ((written - exact).unflatten(1, (-1, block)).abs() <= step + largest * 2**-10 + 2**-24).all()


def test_llama_rows_stand_in_pairs():
    heads, head_dim = 2, 6
    rows = torch.arange(heads * head_dim)[:, None]
    assert interleave_pairs(rows, head_dim).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_what_cannot_be_written_is_refused(tmp_path):
    model, tokenizer = save(tmp_path)
    tokenizer.add_tokens([f"<{i}>" for i in range(4)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="tokens up to 259, the model knows 259"):
        write_gguf(model, tmp_path, tmp_path / "m.gguf")
    tokenizer.post_processor = processors.TemplateProcessing("<0> $0", special_tokens=[("<0>", 256)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="another post_processor"):
        write_gguf(model, tmp_path, tmp_path / "m.gguf")
    save(tmp_path)
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight: expected numbers"):
        write_gguf(model, tmp_path, tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_flag(tmp_path, script):
    save(tmp_path / "wood")
    code, out, err = script(quantize.main, "--checkpoint", tmp_path / "wood", "--gguf", "--no-compare")
    assert code == 0, err
    assert f"{tmp_path}/wood.gguf" in out
    assert read(tmp_path / "wood.gguf")[0]["general.name"] == "wood"


@pytest.mark.parametrize("vocab_size", [256, 400])
@pytest.mark.parametrize("fields", [{}, {"qk_norm": False}, {"n_kv_head": 2, "tie_embeddings": False},
                                    {"qk_norm": False, "n_kv_head": 2, "n_embd": 36, "head_dim": 10}], ids=str)
def test_llama_cpp_agrees(tmp_path, fields, vocab_size):
    llama_cpp = pytest.importorskip("llama_cpp")
    model, tokenizer = save(tmp_path, vocab_size, **fields)
    write_gguf(model, tmp_path, tmp_path / "m.gguf")
    llama = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    ids = tokenizer.encode(TEXT).ids
    assert llama.tokenize(TEXT.encode(), add_bos=True) == ids
    assert llama.detokenize(ids) == TEXT.encode()
    llama.eval(ids)
    exact, near = model(torch.tensor([ids]))[0][0], torch.from_numpy(llama.scores[:len(ids)].copy())
    assert (near - exact).norm() < 0.04 * exact.norm()  # weights and activations in int8
    assert_same_choice(near, exact)
