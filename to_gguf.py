"""Writes a model as one GGUF file, which llama.cpp and Ollama run:  python quantize.py --gguf

Matrices are stored as Q8_0 (int8, one fp16 scale per 32 weights of a row), norms as fp32. The tokenizer is included.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor

from checkpoint import read_tokenizer
from cli import UserError
from files import atomic_path
from model import GPT

Q8_0_BLOCK = gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]
LARGEST = 65504  # the largest fp16 number; scales and some matrices are stored in fp16
ARCHITECTURES = {True: "qwen3", False: "llama"}  # by qk_norm
NUL = "Ā"  # GPT-2's symbol of byte 0
NO_MERGES = ["∅ ∅"]  # llama.cpp needs a list and gguf writes no empty one; this merge's symbols stand for no byte


@dataclass
class Words:
    """How a byte-level BPE cuts a text before it merges, as llama.cpp names it in tokenizer.ggml.pre."""

    regex: str | None = None  # None: GPT-2's
    digits: bool = False  # each digit by itself, first
    nfc: bool = False  # Unicode's composed form, first
    ignore_merges: bool = False  # a whole word that is a token stays one

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps = [pre_tokenizers.Digits(individual_digits=True)] if self.digits else []
        steps += [pre_tokenizers.Split(Regex(self.regex), "isolated")] if self.regex else []
        return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(False, use_regex=self.regex is None)])


_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {"gpt-2": Words(), "smollm": Words(digits=True), "qwen2": Words(_LETTERS + r"\p{N}" + _REST, nfc=True),
         "llama-bpe": Words(_LETTERS + r"\p{N}{1,3}" + _REST, ignore_merges=True)}


def write_gguf(model: GPT, folder: Path, path: Path) -> None:
    """Write `model`, with the tokenizer of its folder, to `path`. Raises UserError if GGUF cannot express them."""
    config = model.config
    arch = gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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
    add_tokenizer(writer, model, folder)
    add_tensors(writer, model, gguf.get_tensor_name_map(arch, config.n_layer))
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, model: GPT, folder: Path) -> None:
    config = model.config
    tokenizer, words, adds_bos = recognise(folder, config.bos)
    tokens = {token: (f"[PAD{token}]", TokenType.UNUSED) for token in range(config.vocab_size)}
    tokens |= {token: (text, TokenType.NORMAL) for text, token in tokenizer["model"]["vocab"].items()}
    tokens |= {added["id"]: (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
               for added in tokenizer["added_tokens"]}
    if len(tokens) > config.vocab_size:
        raise UserError(f"{folder}/tokenizer.json: has tokens up to {max(tokens)}, the model knows {config.vocab_size}")
    texts, kinds = zip(*tokens.values(), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]] or NO_MERGES)
    writer.add_add_bos_token(adds_bos)
    if config.bos is not None:
        writer.add_bos_token_id(config.bos)
    # GGUF holds one. Without any, llama.cpp ends a text at token 11. A text contains no NUL.
    eos = [config.eos] if isinstance(config.eos, int) else config.eos or [texts.index(NUL) if NUL in texts else 0]
    writer.add_eos_token_id(eos[0])


def recognise(folder: Path, bos: int | None) -> tuple[dict, str, bool]:
    """The folder's tokenizer.json, llama.cpp's name for how it cuts texts, and whether it puts bos before them.

    Raises UserError unless it tokenizes as one of WORDS does.
    """
    tokenizer = json.loads(read_tokenizer(folder).to_str())
    model, after = tokenizer["model"], tokenizer["post_processor"] or {}
    texts = [token["content"] for token in tokenizer["added_tokens"] if token["id"] == bos]
    adds_bos = bool(texts) and after.get("type") == "TemplateProcessing" and [
        (part.get("SpecialToken") or part["Sequence"])["id"] for part in after["single"]] == [*texts, "A"]
    found = [name for name, words in WORDS.items() if model["type"] == "BPE" and (
        model["ignore_merges"], plain(tokenizer["normalizer"]), plain(tokenizer["pre_tokenizer"])) == (
        words.ignore_merges, plain(words.normalizer()), plain(words.pre_tokenizer()))]
    if not found:
        raise UserError(f"{folder}/tokenizer.json: expected a byte-level BPE that cuts texts as one of "
                        f"{', '.join(WORDS)}, got another tokenizer")
    if not (adds_bos or after.get("type", "ByteLevel") == "ByteLevel"):  # ByteLevel changes offsets, not tokens
        raise UserError(f"{folder}/tokenizer.json: expected no post_processor, or one that puts bos before a "
                        "text, got another post_processor")
    return tokenizer, found[0], adds_bos


def plain(part: object) -> list[dict] | None:
    """The steps of a normalizer or pre-tokenizer, without what changes no tokens."""
    part = part if part is None or isinstance(part, dict) else json.loads(part.__getstate__())
    if part is not None and part["type"] == "Sequence":
        return [step for each in part.get("pretokenizers") or part["normalizers"] for step in plain(each)]
    return part and [{name: value for name, value in part.items() if name != "trim_offsets"}]


def add_tensors(writer: gguf.GGUFWriter, model: GPT, names: gguf.TensorNameMap) -> None:
    state = model.state_dict()
    odd_sizes = {tensor.size(1) for tensor in state.values() if tensor.dim() == 2 and tensor.size(1) % Q8_0_BLOCK}
    for name, tensor in state.items():
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        tensor = tensor.detach().float().cpu()
        if not tensor.abs().max() <= LARGEST:
            raise UserError(f"tensor {name}: expected numbers up to {LARGEST}, got larger ones, infinity or NaN")
        if not model.config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave_pairs(tensor, model.config.head_dim)
        kind = Kind.F32 if tensor.dim() == 1 else Kind.F16 if tensor.size(1) in odd_sizes else Kind.Q8_0
        writer.add_tensor(names.get_name(name, [".weight"]), gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    if odd_sizes:
        print(f"note: Q8_0 takes rows of a multiple of {Q8_0_BLOCK} weights; "
              f"those of {', '.join(map(str, sorted(odd_sizes)))} stay fp16")


def interleave_pairs(weight: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """Reorder the rows of weight (heads * head_dim, K) from Hugging Face's order to llama.cpp's for a Llama, or back.

    Rows i and i + head_dim / 2 of each head, which rope rotates together, become rows 2 i and 2 i + 1.
    """
    pair = (head_dim // 2, 2) if back else (2, head_dim // 2)
    return weight.unflatten(0, (-1, *pair)).transpose(1, 2).flatten(0, 2)
