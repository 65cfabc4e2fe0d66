"""Checkpoints: a Hugging Face model folder <-> model.GPT, and the training state that a resume needs.

A checkpoint is a Hugging Face folder, so that everything that reads those reads ours. Weights and state carry a
checksum of all they hold: neither safetensors nor torch.load notices a flipped bit.
"""

import contextlib
import hashlib
import json
import shutil
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from cli import UserError
from files import atomic_path, newest, one_line, read_json, write_json
from model import GPT, GPTConfig

# torch.load warns of foreign pickles, which read_state's own error names. Filtered here, once: catch_warnings around
# the call would change the filters of all threads, and states are read back in a thread that saves.
warnings.filterwarnings("ignore", "Detected pickle protocol")


# ---------------------------------------------------------------- config.json

FIELDS = {  # the name in config.json: the name in GPTConfig
    "vocab_size": "vocab_size", "max_position_embeddings": "block_size", "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head", "num_key_value_heads": "n_kv_head", "head_dim": "head_dim",
    "hidden_size": "n_embd", "intermediate_size": "n_hidden", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings", "bos_token_id": "bos", "eos_token_id": "eos",
}


def config_to_hf(config: GPTConfig) -> dict:
    """config.json, readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{theirs: getattr(config, ours) for theirs, ours in FIELDS.items()},
        "hidden_act": "silu", "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False, "attention_dropout": config.dropout, "dtype": "float32", "torch_dtype": "float32",
    }


def config_from_hf(hf: dict) -> GPTConfig:
    """From config.json's fields, without dropout. Raises UserError that names what this decoder does not compute."""
    hf = {name: value for name, value in hf.items() if value is not None}

    def refuse(feature: str, value: object) -> None:
        raise UserError(f"config.json: {feature} = {value!r} is not supported")

    if hf.get("model_type") not in ("qwen3", "llama"):
        refuse("model_type", hf.get("model_type"))
    for name in ("rope_parameters", "rope_scaling"):
        rope = hf.get(name, {})
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            refuse("rope scaling", rope)
    qwen = hf["model_type"] == "qwen3"
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
            "use_sliding_window": False, "partial_rotary_factor": 1.0}
    for feature, expected in only.items():
        if hf.get(feature, expected) != expected:
            refuse(feature, hf[feature])
    if set(hf.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        refuse("layer_types", hf["layer_types"])
    defaults = {"num_key_value_heads": None, "head_dim": 128 if qwen else None, "rms_norm_eps": 1e-6,
                "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}  # as in transformers
    rope_theta = hf.get("rope_parameters", {}).get("rope_theta", hf.get("rope_theta", 10_000.0))
    try:
        return GPTConfig(**{ours: (defaults | hf)[theirs] for theirs, ours in FIELDS.items()},
                         qk_norm=qwen, rope_theta=rope_theta)
    except KeyError as error:
        raise UserError(f"config.json: {error} is missing") from None
    except ValueError as error:
        raise UserError(f"config.json: {error}") from None


def read_config(folder: Path) -> dict:
    """config.json, with the end-of-text tokens of generation_config.json where there is one."""
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    if not path.exists():
        raise UserError(f"{folder}: expected a checkpoint folder, found no config.json in it")
    config = read_json(path)
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if eos is None else config | {"eos_token_id": eos}


def is_quantized(folder: Path) -> bool:
    return "quantization_config" in read_config(folder)


# ---------------------------------------------------------------- a model's folder

def load_model(folder: Path | str, dropout: float = 0.0) -> GPT:
    """Load a folder written by owlet or transformers (Qwen3, Llama), as fp32, in eval mode."""
    folder = Path(folder)
    hf = read_config(folder)
    if "quantization_config" in hf:
        raise UserError(f"{folder}: a quantized folder; expected an fp32 one")
    config = replace(config_from_hf(hf), dropout=dropout)
    state = {name: tensor.float() for name, tensor in read_tensors(folder).items()
             if not name.endswith("rotary_emb.inv_freq")}  # older Llamas store what is computed anyway
    if config.tie_embeddings:
        state["lm_head.weight"] = state.get("model.embed_tokens.weight", torch.empty(0))
    model = empty_model(config)
    check_tensors(folder, model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def empty_model(config: GPTConfig, kind: type[GPT] = GPT) -> GPT:
    """A model whose parameters are on the meta device: shapes without memory, to be replaced by loaded ones."""
    with torch.device("meta"):
        return kind(config)


def save_weights(state: dict[str, Tensor], config: GPTConfig, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (fp32) from a GPT's state_dict."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    if config.tie_embeddings:
        del state["lm_head.weight"]
    write_model(folder, state, config_to_hf(config))


def write_model(folder: Path, state: dict[str, Tensor], hf: dict) -> None:
    """The weights first and config.json last: a folder with a config.json has its weights."""
    write_tensors(folder / "model.safetensors", state)
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 50,  # docs/log.md, "Sampling defaults"
                  "bos_token_id": hf["bos_token_id"], "eos_token_id": hf["eos_token_id"]}
    write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", hf)


def holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists()  # which is written last


def newest_model(root: Path, quantized: bool = True) -> Path:
    """The newest folder with a model under root; quantized=False: that is not an int8 one."""
    for folder in newest(root, "model.safetensors", "python train.py"):
        if quantized or not is_quantized(folder):
            return folder
    raise UserError(f"{root}/: only int8 folders there; make an fp32 one with `python train.py`")


def check_tensors(folder: Path, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Raises UserError unless all expected tensors are there, in their shape and dtype, finite, and no others."""
    for name, like in expected.items():
        if name not in got:
            raise UserError(f"{folder}: tensor {name} is missing from model.safetensors")
        if (got[name].shape, got[name].dtype) != (like.shape, like.dtype):
            raise UserError(f"{folder}: tensor {name}: expected {like.dtype} {tuple(like.shape)}, "
                            f"got {got[name].dtype} {tuple(got[name].shape)}")
        if got[name].is_floating_point() and not got[name].sum().isfinite():  # 30 times as fast as asking each value
            raise UserError(f"{folder}: tensor {name}: expected numbers, got some that are NaN or infinite")
    for name in got:
        if name not in expected:
            raise UserError(f"{folder}: tensor {name} in model.safetensors has no place in this model")


# ---------------------------------------------------------------- the tokenizer

def read_tokenizer(folder: Path) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: expected a Hugging Face tokenizer, found no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a Hugging Face tokenizer: {one_line(error)}") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(source) / name).exists():
            with atomic_path(Path(folder) / name) as temporary:
                shutil.copyfile(Path(source) / name, temporary)


# ---------------------------------------------------------------- tensors

def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards its index names."""
    index = Path(folder) / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.exists() else ["model.safetensors"]
    return [Path(folder) / name for name in sorted(names)]


def weights_size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in weight_files(folder))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        if not path.exists():
            raise UserError(f"{path}: expected the model's weights, found no such file")
        tensors |= read_safetensors(path)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, checked where the file has owlet's checksum."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            expected = (file.metadata() or {}).get("owlet_sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {one_line(error)}") from error
    if expected is not None and expected != checksum(tensors):
        raise UserError(f"{path}: damaged: its checksum is not that of what it holds")
    return tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "owlet_sha256": checksum(tensors)})
        read_safetensors(temporary)  # raises if it is not whole


def checksum(value: dict) -> str:
    """sha256 of plain values and tensors: names, values, dtypes, shapes, and the bytes of the tensors in memory."""
    tensors: list[Tensor] = []

    def describe(tensor: Tensor) -> list:
        tensors.append(tensor)
        return [str(tensor.dtype), *tensor.shape]

    total = hashlib.sha256(json.dumps(value, sort_keys=True, default=describe).encode())
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        for part in pool.map(lambda x: hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy()).digest(), tensors):
            total.update(part)
    return total.hexdigest()


# ---------------------------------------------------------------- the training state

def write_state(path: Path, state: dict) -> None:
    """Tensors and plain types. The state that was there before becomes X.previous.pt."""
    kept = path.with_name(f".{path.name}.kept")
    with atomic_path(path) as temporary:
        try:
            torch.save(state | {"sha256": checksum(state)}, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"is the disk full? {one_line(error)}") from error
        read_state(temporary, mmap=True)  # raises if it is not whole
        kept.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the first state, or a file system without links: none is kept
            kept.hardlink_to(path)
    if kept.exists():  # only now that the new state has its name: at every moment one of the two is whole
        kept.replace(previous_state(path))


def previous_state(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_state(path: Path, mmap: bool = False) -> dict:
    """What write_state wrote, with its checksum as "sha256"; no code is unpickled. mmap: leave tensors in the file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        expected = state.get("sha256")
        found = checksum({name: value for name, value in state.items() if name != "sha256"})
    except FileNotFoundError:
        raise UserError(f"{path}: no training state to resume from") from None
    except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
        raise UserError(f"{path}: not a training state (damaged, or a pickle, which owlet never runs)") from error
    if expected != found:
        raise UserError(f"{path}: not a training state (damaged, or not owlet's): its checksum is not that of "
                        "what it holds")
    return state


def read_last_state(folder: Path) -> tuple[dict, str | None]:
    """What a run saved last. If that is damaged: what it saved before, and a line that says so."""
    path = Path(folder) / "train_state.pt"
    try:
        return read_state(path), None
    except UserError as error:
        before, damage = previous_state(path), error
    if not before.exists():
        raise damage
    try:
        state = read_state(before)
    except UserError as error:
        raise UserError(f"{damage}; and {error}") from None
    return state, f"{damage}; going on from step {state['step']}, {before}"


# ---------------------------------------------------------------- a run's settings

def read_run(folder: Path, state: dict | None = None) -> tuple[dict, str]:
    """run.json: train.py's flags as the run used them, in today's names, and the hash of its training tokens.

    Older runs have them in their state, which is read if it is not given.
    """
    if (folder / "run.json").exists():
        run = read_json(folder / "run.json")
        missing = {"settings", "data_sha256"} - run.keys()
        if missing:
            raise UserError(f"{folder}/run.json: {', '.join(sorted(missing))} is missing")
        return run["settings"], run["data_sha256"]
    state = state or read_last_state(folder)[0]
    settings = {"warmdown" if name == "decay_share" else name: value for name, value in state["config"].items()}
    return settings | ({"size": "base"} if settings["size"] == "seed" else {}), state["data_sha256"]
