"""Files that are whole or not there at all: atomic writes, and reads that name what is wrong.

A checkpoint is a Hugging Face model folder, so that everything which reads those reads ours.
"""

import contextlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from cli import UserError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` once it is written and on disk.

    Whatever goes wrong in between (full disk, kill -9), an earlier `path` stays as it was. What a
    killed process leaves under the temporary name, the next one overwrites.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)  # the rename itself must survive a power cut
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written: {_one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON file: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict:
    """config.json, with the end-of-text tokens of generation_config.json where there is one."""
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    if not path.exists():
        raise UserError(f"{folder}: expected a checkpoint folder, found no config.json in it")
    config = read_json(path)
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return config if eos is None else config | {"eos_token_id": eos}


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards its index names."""
    folder = Path(folder)
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)  # the library makes its files for the owner's eyes only
        with safe_open(temporary, "pt") as written:  # raises if it is not whole
            written.keys()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        if not path.exists():
            raise UserError(f"{path}: expected the model's weights, found no such file")
        try:
            tensors |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {_one_line(error)}") from error
    return tensors


def write_state(path: Path, state: dict) -> None:
    with atomic_path(path) as temporary:
        try:
            torch.save(state, temporary)
            torch.load(temporary, weights_only=True, mmap=True)  # raises if it is not whole
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"is the disk full? {_one_line(error)}") from error


def read_state(path: Path, mmap: bool = False) -> dict:
    """Read what `write_state` wrote. Tensors and plain types only: nothing is unpickled into code.

    mmap: leave tensors in the file until they are looked at.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # on foreign pickles, which the error below names
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise UserError(f"{path}: no training state to resume from") from None
    except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
        raise UserError(f"{path}: not a training state (damaged, or a pickle, which owlet never "
                        f"runs): {_one_line(error)}") from error
    if not isinstance(state, dict) or not {"step", "config", "model"} <= state.keys():
        raise UserError(f"{path}: not a training state: expected a dict with step, config and model")
    return state


def read_tokenizer(folder: Path) -> Tokenizer:
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: expected a Hugging Face tokenizer, found no such file")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a Hugging Face tokenizer: {_one_line(error)}") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (Path(source) / name).exists():
            with atomic_path(Path(folder) / name) as temporary:
                shutil.copyfile(Path(source) / name, temporary)


def by_age(root: Path, marker: str, make: str) -> list[Path]:
    """The folders under `root` with a file `marker`, newest first; `make` says how to get one."""
    found = sorted(Path(root).glob(f"*/{marker}"), key=lambda path: -path.stat().st_mtime)
    if not found:
        raise UserError(f"{root}/: no folder with {marker} yet; make one with `{make}`")
    return [path.parent for path in found]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
