"""GGUF, the files of llama.cpp and Ollama: a model -> a file (quantize.py --gguf), a file -> a checkpoint folder.

Written are matrices as Q8_0 (int8, one fp16 scale per 32 weights of a row), norms as fp32, and the tokenizer. Read are
Llama and Qwen3 models whose tokenizer is a byte-level BPE (tokenizer.ggml.model "gpt2"), whatever the types of their
tensors: the weights become fp32.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from lib.checkpoint import (
    check_tensors,
    config_from_hf,
    config_to_hf,
    empty_model,
    read_tokenizer,
    tokenizer_errors,
    write_model,
)
from lib.cli import UserError, note, one_line
from lib.files import atomic_folder, atomic_path, read_json, write_json
from model import GPT, GPTConfig

# ---------------------------------------------------------------- what both directions share

ARCHITECTURES = {"qwen3": gguf.MODEL_ARCH.QWEN3, "llama": gguf.MODEL_ARCH.LLAMA}  # by config.json's model_type
KEYS = {  # the key in a file, after the architecture: the name in config.json, the type
    "vocab_size": ("vocab_size", int), "context_length": ("max_position_embeddings", int),
    "block_count": ("num_hidden_layers", int), "embedding_length": ("hidden_size", int),
    "feed_forward_length": ("intermediate_size", int), "attention.head_count": ("num_attention_heads", int),
    "attention.head_count_kv": ("num_key_value_heads", int), "attention.key_length": ("head_dim", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float), "rope.freq_base": ("rope_theta", float),
}
# Keys that change what llama.cpp computes, and the values at which they change nothing
ONLY = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "expert_count": 0,
        "attention.sliding_window": 0, "attention.causal": True, "attention.scale": 0.0, "logit_scale": 0.0,
        "embedding_scale": 0.0, "residual_scale": 0.0, "attention.clamp_kqv": 0.0, "rope.scaling.attn_factor": 1.0}


@dataclass
class Cut:
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
CUTS = {"gpt-2": Cut(), "smollm": Cut(digits=True), "qwen2": Cut(_LETTERS + r"\p{N}" + _REST, nfc=True),
         "llama-bpe": Cut(_LETTERS + r"\p{N}{1,3}" + _REST, ignore_merges=True)}
ALIASES = {"phi-2": "gpt-2", "deepseek-r1-qwen": "qwen2", "llama3": "llama-bpe", "llama-v3": "llama-bpe"}  # llama.cpp's


def tensor_names(config: GPTConfig) -> Iterator[tuple[str, str, bool]]:
    """The name of each tensor in a state dict and in a file, and whether the file has its rows in pairs."""
    names = gguf.get_tensor_name_map(ARCHITECTURES[config_to_hf(config)["model_type"]], config.n_layer)
    for name in empty_model(config).state_dict():
        if name != "lm_head.weight" or not config.tie_embeddings:
            paired = not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight"))
            yield name, names.get_name(name, [".weight"]), paired


def interleave_pairs(weight: Tensor, head_dim: int, back: bool = False) -> Tensor:
    """Reorder the rows of weight (heads * head_dim, K) from Hugging Face's order to llama.cpp's for a Llama, or back.

    Rows i and i + head_dim / 2 of each head, which rope rotates together, become rows 2 i and 2 i + 1.
    """
    pair = (head_dim // 2, 2) if back else (2, head_dim // 2)
    return weight.unflatten(0, (-1, *pair)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------- writing

Q8_0_BLOCK = gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]
LARGEST = 65504  # the largest fp16 number; scales and some matrices are stored in fp16
NUL = "Ā"  # GPT-2's symbol of byte 0
NO_MERGES = ["∅ ∅"]  # llama.cpp needs a list and gguf writes no empty one; this merge's symbols stand for no byte


def write_gguf(model: GPT, folder: Path, path: Path) -> None:
    """Write `model`, with the tokenizer of its folder, to `path`. Raises UserError if GGUF cannot express them."""
    hf = config_to_hf(model.config)
    writer = gguf.GGUFWriter(None, hf["model_type"])
    writer.add_name(path.stem)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, (name, kind) in KEYS.items():
        (writer.add_float32 if kind is float else writer.add_uint32)(f"{writer.arch}.{key}", hf[name])
    writer.add_value_length(model.config.head_dim)
    add_tokenizer(writer, model.config, folder)
    add_tensors(writer, model)
    with atomic_path(path) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, config: GPTConfig, folder: Path) -> None:
    tokenizer, cut, adds_bos = recognise(folder, config.bos)
    tokens = {token: (f"[PAD{token}]", TokenType.UNUSED) for token in range(config.vocab_size)}
    tokens |= {token: (text, TokenType.NORMAL) for text, token in tokenizer["model"]["vocab"].items()}
    tokens |= {added["id"]: (added["content"], TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
               for added in tokenizer["added_tokens"]}
    if len(tokens) > config.vocab_size:
        raise UserError(f"{folder}/tokenizer.json: has tokens up to {max(tokens)}, the model knows {config.vocab_size}")
    texts, kinds = zip(*tokens.values(), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]] or NO_MERGES)
    writer.add_add_bos_token(adds_bos)
    if config.bos is not None:
        writer.add_bos_token_id(config.bos)
    # Without any, llama.cpp ends a text at token 11. A text contains no NUL.
    eos, *more = config.ends or [texts.index(NUL) if NUL in texts else 0]
    writer.add_eos_token_id(eos)
    if more:
        writer.add_eot_token_id(more[0])
    if more[1:]:
        note(f"{folder}: GGUF holds two tokens that end a text; {more[1:]} end none there")
    if template := chat_template(folder):
        writer.add_chat_template(template)


def chat_template(folder: Path) -> str | None:
    """Transformers keeps it in a file of its own or in tokenizer_config.json, which may hold a list of several."""
    own, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if own.exists():
        return own.read_text(encoding="utf-8")
    found = read_json(config).get("chat_template") if config.exists() else None
    return found if isinstance(found, str) else None


def recognise(folder: Path, bos: int | None) -> tuple[dict, str, bool]:
    """The folder's tokenizer.json, llama.cpp's name for how it cuts texts, and whether it puts bos before them.

    Raises UserError unless it tokenizes as one of CUTS does.
    """
    tokenizer = json.loads(read_tokenizer(folder).to_str())
    model, after = tokenizer["model"], tokenizer["post_processor"] or {}
    texts = [token["content"] for token in tokenizer["added_tokens"] if token["id"] == bos]
    parts = [(part.get("SpecialToken") or part["Sequence"])["id"] for part in after.get("single", [])]
    adds_bos = bool(texts) and parts == [*texts, "A"]
    bare = model["type"] == "BPE" and not any(model[name] for name in (
        "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"))
    found = [name for name, cut in CUTS.items() if bare and (
        model["ignore_merges"], steps(tokenizer["normalizer"]), steps(tokenizer["pre_tokenizer"])) == (
        cut.ignore_merges, steps(cut.normalizer()), steps(cut.pre_tokenizer()))]
    if not found:
        raise UserError(f"{folder}/tokenizer.json: expected a byte-level BPE that cuts texts as one of "
                        f"{', '.join(CUTS)}, got another tokenizer")
    # a template of the text alone adds nothing; ByteLevel changes offsets, not tokens
    if not (adds_bos or parts == ["A"] or after.get("type", "ByteLevel") == "ByteLevel"):
        raise UserError(f"{folder}/tokenizer.json: expected no post_processor, or one that puts bos before a "
                        "text, got another post_processor")
    return tokenizer, found[0], adds_bos


def steps(part: object) -> list[dict] | None:
    """The steps of a normalizer or pre-tokenizer, without what changes no tokens."""
    part = part if part is None or isinstance(part, dict) else json.loads(part.__getstate__())
    if part is not None and part["type"] == "Sequence":
        return [step for each in part.get("pretokenizers") or part["normalizers"] for step in steps(each)]
    return part and [{name: value for name, value in part.items() if name != "trim_offsets"}]


def add_tensors(writer: gguf.GGUFWriter, model: GPT) -> None:
    state = model.state_dict()
    odd_sizes = {tensor.size(1) for tensor in state.values() if tensor.dim() == 2 and tensor.size(1) % Q8_0_BLOCK}
    for name, theirs, paired in tensor_names(model.config):
        tensor = state[name].detach().float().cpu()
        if not tensor.abs().max() <= LARGEST:
            raise UserError(f"tensor {name}: expected numbers up to {LARGEST}, got larger ones, infinity or NaN")
        tensor = interleave_pairs(tensor, model.config.head_dim) if paired else tensor
        kind = Kind.F32 if tensor.dim() == 1 else Kind.F16 if tensor.size(1) in odd_sizes else Kind.Q8_0
        writer.add_tensor(theirs, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    if odd_sizes:
        print(f"note: Q8_0 takes rows of a multiple of {Q8_0_BLOCK} weights; "
              f"those of {', '.join(map(str, sorted(odd_sizes)))} stay fp16")


# ---------------------------------------------------------------- reading

def convert(path: Path, out: Path, sha256: str) -> None:
    """Make the folder `out` of a file; its config.json keeps sha256, by which the source is known again.

    Raises UserError, and writes nothing, for what owlet does not compute.
    """
    file = GGUFFile(path)
    config, tokenizer = stored_config(file), stored_tokenizer(file)
    names, like = list(tensor_names(config)), empty_model(config).state_dict()
    for name in file.tensors.keys() - {theirs for _, theirs, _ in names}:
        raise UserError(f"{path}: tensor {name} has no place in this model")
    state = {name: file.tensor(theirs) for name, theirs, _ in names}
    check_tensors(path, {name: like[name] for name in state}, state)
    state |= {name: interleave_pairs(state[name], config.head_dim, back=True) for name, _, paired in names if paired}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "bos_token": None if config.bos is None else tokenizer.id_to_token(config.bos),
                "eos_token": tokenizer.id_to_token(config.ends[0]) if config.ends else None,
                "chat_template": file.get("tokenizer.chat_template", str)}
    with atomic_folder(out, "config.json") as new:
        tokenizer.save(str(new / "tokenizer.json"))
        write_json(new / "tokenizer_config.json", {name: x for name, x in settings.items() if x is not None})
        write_model(new, state, config, source_sha256=sha256)


class GGUFFile:
    """The metadata and the tensors of a file. Raises UserError where they are not there or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package checks little: a damaged file raises errors of many kinds
            raise UserError(f"{path}: expected a whole GGUF file: {one_line(error)}") from error
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        if reader.endianess != gguf.GGUFEndian.LITTLE:
            raise UserError(f"{path}: expected a little-endian file; make one with gguf-convert-endian")
        if (parts := self.get("split.count", int, 1)) > 1:
            raise UserError(f"{path}: one of {parts} parts; join them with llama-gguf-split --merge")

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.fields.get(name, default)
        if not isinstance(value, kind) and value is not default:
            raise UserError(f"{self.path}: {name}: expected {kind.__name__}, got {value!r:.60}")
        return value

    def tensor(self, name: str) -> Tensor:
        """A tensor as fp32."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: tensor {name} is missing")
        found = self.tensors[name]
        try:
            return torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy()).float()
        except NotImplementedError:
            raise UserError(f"{self.path}: tensor {name}: {found.tensor_type.name} cannot be read") from None


def stored_config(file: GGUFFile) -> GPTConfig:
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        raise UserError(f"{file.path}: general.architecture: expected {' or '.join(ARCHITECTURES)}, got {arch}")
    hf = {name: file.get(f"{arch}.{key}", kind) for key, (name, kind) in KEYS.items()}
    hf["head_dim"] = hf["head_dim"] or file.get(f"{arch}.rope.dimension_count", int)
    same = dict.fromkeys(("rope.dimension_count", "attention.value_length"), hf["head_dim"])
    for key, only in (ONLY | same).items():
        if (got := file.get(f"{arch}.{key}", type(only), only)) != only:
            raise UserError(f"{file.path}: {arch}.{key} = {got!r} is not supported")
    ends = [file.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot")]
    return config_from_hf(hf | {
        "model_type": arch, "vocab_size": len(file.get("tokenizer.ggml.tokens", list, [])),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None}, file.path)


def stored_tokenizer(file: GGUFFile) -> Tokenizer:
    model, pre = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str)
    pre = ALIASES.get(pre, pre)
    if model != "gpt2" or pre not in CUTS:
        raise UserError(f"{file.path}: tokenizer: expected gpt2 with {', '.join(CUTS)}, got {model} with {pre}")
    with tokenizer_errors(f"{file.path}: tokenizer.ggml"):
        tokens, kinds, merges = (file.get(f"tokenizer.ggml.{name}", list, []) for name in (
            "tokens", "token_type", "merges"))
        kinds += [TokenType.NORMAL] * (len(tokens) - len(kinds))
        used = [i for i, kind in enumerate(kinds[:len(tokens)]) if kind != TokenType.UNUSED]  # the others are padding
        vocab = {tokens[i]: i for i in used}
        if not merges or len(vocab) < len(used):
            raise UserError(f"{file.path}: tokenizer.ggml: expected merges, and tokens of different texts")
        pairs = [tuple(merge.split(" ", 1)) for merge in merges if merges != NO_MERGES]
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=CUTS[pre].ignore_merges))
        tokenizer.normalizer, tokenizer.pre_tokenizer = CUTS[pre].normalizer(), CUTS[pre].pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_tokens([AddedToken(tokens[i], special=kinds[i] == TokenType.CONTROL, normalized=False)
                              for i in used if kinds[i] in (TokenType.CONTROL, TokenType.USER_DEFINED)])
        bos = file.get("tokenizer.ggml.bos_token_id", int)
        if file.get("tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe") and bos is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    return tokenizer
