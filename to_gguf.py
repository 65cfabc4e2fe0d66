"""A model as one GGUF file, which llama.cpp and Ollama run:  python quantize.py --gguf

Matrices in Q8_0 (int8, one fp16 scale for every 32 weights of a row), norms in fp32, the tokenizer within.
"""

import json
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType, TokenType
from torch import Tensor

from checkpoint import read_tokenizer
from cli import UserError
from files import atomic_path
from model import GPT

Q8_0_BLOCK = gguf.GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0][0]
LARGEST = 65504  # of fp16, which scales and some matrices are stored in
NUL = "Ā"  # GPT-2's spelling of byte 0
NO_MERGES = ["∅ ∅"]  # llama.cpp wants a list, gguf writes no empty one: this joins characters that spell no byte


def write_gguf(model: GPT, folder: Path, path: Path) -> None:
    """Write `model`, with the tokenizer of its folder, to `path`."""
    arch = gguf.MODEL_ARCH.QWEN3 if model.config.qk_norm else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_shape(writer, model)
    add_tokenizer(writer, model, folder)
    add_tensors(writer, model, gguf.get_tensor_name_map(arch, model.config.n_layer))
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_shape(writer: gguf.GGUFWriter, model: GPT) -> None:
    config = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_block_count(config.n_layer)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)


def add_tokenizer(writer: gguf.GGUFWriter, model: GPT, folder: Path) -> None:
    config, tokenizer = model.config, gpt2_tokenizer(folder)
    tokens = {token: (f"[PAD{token}]", TokenType.UNUSED) for token in range(config.vocab_size)}
    tokens |= {token: (text, TokenType.NORMAL) for text, token in tokenizer["model"]["vocab"].items()}
    tokens |= {added["id"]: (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
               for added in tokenizer["added_tokens"]}
    if len(tokens) > config.vocab_size:
        raise UserError(f"{folder}/tokenizer.json: has tokens up to {max(tokens)}, "
                        f"the model knows {config.vocab_size}")
    texts, kinds = zip(*tokens.values(), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]] or NO_MERGES)
    writer.add_add_bos_token(False)
    if config.bos is not None:
        writer.add_bos_token_id(config.bos)
    # One and no more; and one there must be, or llama.cpp takes token 11, whatever that is. A text holds no NUL.
    eos = [config.eos] if isinstance(config.eos, int) else config.eos or [texts.index(NUL) if NUL in texts else 0]
    writer.add_eos_token_id(eos[0])


def gpt2_tokenizer(folder: Path) -> dict:
    """The folder's tokenizer.json, if it is of the one kind that is written: what "gpt-2" says it is."""
    tokenizer = json.loads(read_tokenizer(folder).to_str())
    model, words, after = (tokenizer[part] or {} for part in ("model", "pre_tokenizer", "post_processor"))
    for part, as_expected in (
            ("model", model["type"] == "BPE" and not model["ignore_merges"]),
            ("normalizer", tokenizer["normalizer"] is None),
            ("pre_tokenizer", (words.get("type"), words.get("use_regex"), words.get("add_prefix_space"))
             == ("ByteLevel", True, False)),
            ("post_processor", after.get("type", "ByteLevel") == "ByteLevel")):  # which moves offsets alone
        if not as_expected:
            raise UserError(f"{folder}/tokenizer.json: --gguf expects GPT-2's byte-level BPE, got another {part}")
    return tokenizer


def add_tensors(writer: gguf.GGUFWriter, model: GPT, names: gguf.TensorNameMap) -> None:
    unquantized = set()
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        tensor = tensor.detach().float().cpu()
        if not tensor.abs().max() <= LARGEST:
            raise UserError(f"tensor {name}: expected numbers up to {LARGEST}, got larger ones, infinity or NaN")
        if not model.config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave_pairs(tensor, model.config.head_dim)
        if tensor.dim() == 1:
            kind = GGMLQuantizationType.F32
        elif tensor.size(1) % Q8_0_BLOCK:
            kind = GGMLQuantizationType.F16
            unquantized.add(tensor.size(1))
        else:
            kind = GGMLQuantizationType.Q8_0
        writer.add_tensor(names.get_name(name, [".weight"]), gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    if unquantized:
        print(f"note: Q8_0 takes rows of a multiple of {Q8_0_BLOCK} weights; "
              f"those of {', '.join(map(str, sorted(unquantized)))} stay fp16")


def interleave_pairs(weight: Tensor, head_dim: int) -> Tensor:
    """Rows i and i + head_dim / 2 of each head, which rotary positions turn together, to 2 i and 2 i + 1:
    the order in which llama.cpp has the rows of a Llama (not of a Qwen3). weight (heads * head_dim, K).
    """
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
