"""Checkpoints: a Hugging Face model folder <-> model.GPT, and the training state that a resume needs.

A checkpoint is a Hugging Face folder, so that everything that reads those reads ours. Weights and state carry a
checksum of all they hold: safetensors does not notice a flipped bit.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from lib.cli import UserError, command, note, one_line
from lib.files import atomic_path, checked, newest, read_json, regular_file, write_json
from lib.machine import free_memory
from model import GPT, GPTConfig

# ---------------------------------------------------------------- config.json

FIELDS = {  # the name in GPTConfig: the name in config.json
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "n_embd": "hidden_size", "n_hidden": "intermediate_size", "norm_eps": "rms_norm_eps", "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings", "bos": "bos_token_id", "eos": "eos_token_id",
}


def config_to_hf(config: GPTConfig) -> dict:
    """config.json, readable by transformers 4 (rope_theta) and 5 (rope_parameters)."""
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        **{theirs: getattr(config, ours) for ours, theirs in FIELDS.items()},
        "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False, "attention_dropout": 0.0, "dtype": "float32", "torch_dtype": "float32",
    }


def config_from_hf(hf: dict, where: object = "config.json") -> GPTConfig:
    """The config of a config.json, without dropout. Raises UserError that names what this decoder does not compute."""

    def refuse(feature: str, value: object) -> None:
        raise UserError(f"{where}: {feature} = {value!r} is not supported")

    qwen = hf.get("model_type") == "qwen3"
    hf = {  # the defaults are those of transformers
        "num_key_value_heads": None, "head_dim": 128 if qwen else None, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    } | {name: value for name, value in hf.items() if value is not None}
    if hf.get("model_type") not in ("qwen3", "llama"):
        refuse("model_type", hf.get("model_type"))
    only = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
            "partial_rotary_factor": 1.0}
    for feature, expected in only.items():
        if hf.get(feature, expected) != expected:
            refuse(feature, hf[feature])
    if any(layer != "full_attention" for layer in checked(hf.get("layer_types", []), list, f"{where}: layer_types")):
        refuse("layer_types", hf["layer_types"])
    for name in ("rope_scaling", "rope_parameters"):
        rope = checked(hf.get(name, {}), dict, f"{where}: {name}")
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            refuse("rope scaling", rope)
        hf["rope_theta"] = rope.get("rope_theta", hf["rope_theta"])
    if missing := set(FIELDS.values()) - hf.keys():
        raise UserError(f"{where}: {', '.join(sorted(missing))}: missing")
    try:
        config = checked({ours: hf[theirs] for ours, theirs in FIELDS.items()} | {"qk_norm": qwen}, GPTConfig, where)
    except UserError as error:
        raise UserError(re.sub(r"\w+(?=[:[])", lambda name: FIELDS.get(name[0], name[0]), str(error))) from None
    for name in ("bos", "eos"):
        value = getattr(config, name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        known = [token for token in ids if 0 <= token < config.vocab_size]
        if known != ids:
            note(f"{where}: {name}_token_id = {value}: the model knows {config.vocab_size} tokens; "
                 f"going on with {known or 'none'}")
        if known != ids or not ids:
            setattr(config, name, known or None)
    return config


def read_config(folder: Path) -> dict:
    """config.json, with the end-of-text tokens of generation_config.json where there is one."""
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    if not path.exists():
        raise UserError(f"{folder}: expected a checkpoint folder, found no config.json in it")
    config = read_json(path)
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if eos is None else config | {"eos_token_id": eos}


def is_quantized(folder: Path) -> bool:
    return read_config(folder).get("quantization_config") is not None


# ---------------------------------------------------------------- a model's folder

def load_model(folder: Path | str) -> GPT:
    """Load a folder written by owlet or transformers (Qwen3, Llama), as fp32, in eval mode."""
    folder = Path(folder)
    hf = read_config(folder)
    if hf.get("quantization_config") is not None:
        raise UserError(f"{folder}: a quantized folder; expected an fp32 one")
    config = config_from_hf(hf, folder / "config.json")
    state = {name: tensor.float() for name, tensor in read_tensors(folder).items()
             if not name.endswith("rotary_emb.inv_freq")}  # older Llamas store it, but it is computed
    if config.tie_embeddings:
        embedding = state.get("model.embed_tokens.weight", torch.empty(0))
        if not torch.equal(state.setdefault("lm_head.weight", embedding), embedding):
            note(f"{folder}: tie_word_embeddings is true, but lm_head.weight differs from embed_tokens.weight; "
                 "going on with both")
            config.tie_embeddings = False
    model = empty_model(config)
    check_tensors(folder / "model.safetensors", model.state_dict(), state)
    model.load_state_dict(state, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def empty_model(config: GPTConfig) -> GPT:
    """A model whose parameters are on the meta device: shapes without memory, to be replaced by loaded ones."""
    with torch.device("meta"):
        return GPT(config)


def save_weights(state: dict[str, Tensor], config: GPTConfig, folder: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors (fp32) from a GPT's state_dict."""
    state = {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}
    if config.tie_embeddings:
        state.pop("lm_head.weight", None)
    write_model(folder, state, config)


def write_model(folder: Path, state: dict[str, Tensor], config: GPTConfig, **more: object) -> None:
    """The weights first and config.json last: a folder with a config.json has its weights."""
    hf = config_to_hf(config) | more
    write_tensors(folder / "model.safetensors", state)
    path = folder / "generation_config.json"
    # the settings that copy_companions has copied stay
    generation = {"do_sample": True, "temperature": 0.8, "top_k": 50}  # docs/log.md, "Sampling defaults"
    write_json(path, (read_json(path) if path.exists() else generation) | {
        name: hf[name] for name in ("bos_token_id", "eos_token_id")})
    write_json(folder / "config.json", hf)


def holds_model(folder: Path) -> bool:
    return (folder / "config.json").exists()  # config.json is written last


def holds_weights(folder: Path, weights: dict[str, Tensor]) -> bool:
    """Whether these are the weights of the folder's model, by their checksum."""
    return holds_model(folder) and read_safetensors(folder / "model.safetensors")[1]["sha256"] == checksum(weights)


def newest_model(root: Path, quantized: bool = True) -> Path:
    """The newest folder with a model under root; quantized=False skips int8 folders."""
    for folder in newest(root, "model.safetensors", "python train.py"):
        if quantized or not is_quantized(folder):
            return folder
    raise UserError(f"{root}/: only int8 folders there; make an fp32 one with `python train.py`")


def check_tensors(file: Path, expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    """Raises UserError unless all expected tensors are there, in their shape and dtype, in range, and no others."""
    for name, like in expected.items():
        if name not in got:
            raise UserError(f"{file}: tensor {name} is missing")
        x = got[name]
        if (x.shape, x.dtype) != (like.shape, like.dtype):
            raise UserError(f"{file}: tensor {name}: expected {like.dtype} {tuple(like.shape)}, "
                            f"got {x.dtype} {tuple(x.shape)}")
        if x.is_floating_point() and not x.sum().isfinite():  # 30 times as fast as asking each value
            raise UserError(f"{file}: tensor {name}: expected numbers, got some that are NaN or infinite")
        if x.dtype == torch.int8 and x.min() == -128:
            raise UserError(f"{file}: tensor {name}: expected -127 to 127, got -128")
    for name in got:
        if name not in expected:
            raise UserError(f"{file}: tensor {name} has no place in this model")


# ---------------------------------------------------------------- the tokenizer

Id = Annotated[int, msgspec.Meta(ge=0, lt=1 << 20)]  # at some larger ids the library ends the process


@contextlib.contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """The library raises bare Exceptions and Rust's panics: they become UserErrors."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {one_line(error)}") from error


def read_tokenizer(folder: Path) -> Tokenizer:
    """A folder's tokenizer, which takes text as it is: truncation, padding and a BPE's dropout are switched off."""
    path = Path(folder) / "tokenizer.json"
    file = read_json(path, limit=1e9) | {"truncation": None, "padding": None}
    vocab = checked(file.get("model"), dict, f"{path}: model").get("vocab")
    checked(vocab, dict[str, Id] | list, f"{path}: model.vocab")
    checked([added.get("id") for added in checked(file.get("added_tokens", []), list[dict], f"{path}: added_tokens")],
            list[Id], f"{path}: added_tokens: id")
    if "dropout" in file["model"]:
        file["model"]["dropout"] = None
    with tokenizer_errors(f"{path}: not a Hugging Face tokenizer"):
        tokenizer = Tokenizer.from_str(json.dumps(file))
    if not tokenizer.get_vocab_size():
        raise UserError(f"{path}: expected a tokenizer with tokens, got one without")
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: list[str], special: bool = False) -> list[list[int]]:
    """The ids of each text, on all cores. special: with the tokens that the tokenizer puts around a text."""
    with tokenizer_errors("tokenizer.json: cannot encode this text"):
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]


# the files beside weights and config: for the tokenizer, or for generating
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
              "generation_config.json")


def copy_companions(source: Path, folder: Path) -> None:
    for name in COMPANIONS:
        if os.path.lexists(Path(source) / name):  # a link to nothing is a mistake, not a folder without this file
            with atomic_path(Path(folder) / name) as temporary:
                shutil.copyfile(regular_file(Path(source) / name, "a file", 1e9), temporary)


# ---------------------------------------------------------------- tensors

def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or, where that is missing, the shards its index names."""
    whole, index = Path(folder) / "model.safetensors", Path(folder) / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    shards = checked(read_json(index).get("weight_map"), dict[str, str], f"{index}: weight_map")
    for name in shards.values():
        if Path(name).name != name:
            raise UserError(f"{index}: expected the names of files in this folder, got {name!r}")
    return [Path(folder) / name for name in sorted(set(shards.values()))]


def weights_size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(regular_file(path, "the model's weights").stat().st_size for path in weight_files(folder))


def stored_size(state: dict) -> int:
    """Bytes of the file that torch.save writes."""
    torch.save(state, buffer := io.BytesIO())
    return buffer.tell()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder. Raises UserError if they are larger than the free memory."""
    if (size := weights_size(folder)) > (free := free_memory()):
        raise UserError(f"{folder}: expected weights that fit into the free memory of {free / 1e9:.1f} GB, "
                        f"got {size / 1e9:.1f} GB")
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        tensors |= read_safetensors(path)[0]
    return tensors


def read_safetensors(path: Path, expected: str = "the model's weights") -> tuple[dict[str, Tensor], dict]:
    """The tensors of one file, and the facts that write_tensors put beside them. A checksum, if it has one, is checked.

    The tensors are views of the mapped file: its pages stay in memory while one of them exists.
    """
    try:
        with safe_open(regular_file(path, expected), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            metadata = file.metadata() or {}
        sha256, facts = metadata.get("owlet_sha256"), checked(json.loads(metadata.get("owlet", "{}")), dict, path)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {one_line(error)}") from error
    if sha256 is not None and sha256 != checksum(tensors | facts):
        raise UserError(f"{path}: damaged: its checksum is not that of what it holds")
    return tensors, facts | {"sha256": sha256}


def write_tensors(path: Path, tensors: dict[str, Tensor], **facts: object) -> None:
    """A safetensors file, with plain values beside the tensors in its metadata."""
    metadata = {"format": "pt", "owlet_sha256": checksum(tensors | facts)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata | ({"owlet": json.dumps(facts)} if facts else {}))


def checksum(value: dict) -> str:
    """sha256 of plain values and tensors: names, values, dtypes, shapes, and the bytes of the tensors in memory."""
    tensors = {name: x for name, x in sorted(value.items()) if isinstance(x, Tensor)}
    described = value | {name: [str(x.dtype), *x.shape] for name, x in tensors.items()}
    total = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        for part in pool.map(lambda x: hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy()).digest(),
                             tensors.values()):
            total.update(part)
    return total.hexdigest()


# ---------------------------------------------------------------- the training state

STATE = "train_state.safetensors"  # in the folder of a run, beside run.json


class TrainState(TypedDict):
    """All that a resume needs, beside run.json."""

    step: Annotated[int, msgspec.Meta(ge=0)]
    seconds: Annotated[float, msgspec.Meta(ge=0)]  # the run's time so far
    best: float | None  # validation loss in nats a token
    better: bool  # whether the loss of this step is the best
    model_config: GPTConfig
    sha256: str
    tensors: NotRequired[dict[str, Tensor]]  # those of training_tensors()


def training_tensors(model: GPT, optimizers: Iterable) -> dict[str, Tensor]:
    """All that training changes, by name. They are the tensors in use, no copies."""
    weights = {f"weights.{name}": x for name, x in model.state_dict().items()
               if not (name == "lm_head.weight" and model.config.tie_embeddings)}
    return weights | {f"{type(optimizer).__name__}.{i}.{name}": x for optimizer in optimizers
                      for i, state in enumerate(optimizer.state) for name, x in state.items()}


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model's part of training_tensors(), as in its state_dict."""
    return {name.removeprefix("weights."): tensors[name] for name in tensors if name.startswith("weights.")}


def read_state(folder: Path) -> TrainState:
    """The state that a run saved last."""
    path = folder / STATE
    if not path.exists() and (folder / "train_state.pt").exists():
        raise UserError(f"{folder}: expected a run of this version, found an older one's; its model can be fine-tuned "
                        f"with {command('--init-from', folder)}")
    tensors, facts = read_safetensors(path, "a training state to resume from")
    return checked(facts, TrainState, path) | {"tensors": tensors}


@torch.no_grad()
def load_tensors(live: dict[str, Tensor], folder: Path, saved: dict[str, Tensor]) -> None:
    """Copy a state's tensors into those of this process, which training_tensors() named."""
    from lib.distributed import shard_like  # imports torch.distributed, which sample.py has no use for

    check_tensors(folder / STATE, live, saved)
    for name, x in live.items():
        x.copy_(shard_like(saved[name], x))


def trained_on(folder: Path) -> tuple[Path, str] | None:
    """The prepared folder that a model was trained on, and its hash; of runs of earlier versions too."""
    if not (folder / "run.json").exists():
        return None
    run, where = read_json(folder / "run.json"), f"{folder}/run.json: data"
    plan = checked(run.get("plan") or run.get("settings"), dict, where)
    sha256 = plan.get("data_sha256", run.get("data_sha256"))
    return checked(plan.get("data"), Path, where), checked(sha256, str, f"{where}_sha256")
