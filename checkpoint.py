"""Files that are whole or not there at all: atomic writes, and reads that name what is wrong.

Weights and training state carry a checksum of all they hold: of two readers of a file with a flipped bit,
safetensors and torch.load, neither would notice.

A checkpoint is a Hugging Face model folder, so that everything which reads those reads ours.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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


def checksum(value: dict) -> str:
    """sha256 of plain values and tensors: names, values, dtypes, shapes, and the tensors' bytes, in place."""
    tensors: list[Tensor] = []

    def describe(tensor: Tensor) -> list:
        tensors.append(tensor)
        return [str(tensor.dtype), *tensor.shape]

    total = hashlib.sha256(json.dumps(value, sort_keys=True, default=describe).encode())
    with ThreadPoolExecutor() as pool:  # hashing leaves Python to the other threads
        for part in pool.map(lambda x: hashlib.sha256(x.reshape(-1).view(torch.uint8).numpy()).digest(), tensors):
            total.update(part)
    return total.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", "owlet_sha256": checksum(tensors)})
        with temporary.open("r+b") as file:  # the library puts the two in any order; ours is always the same
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            file.seek(8)
            file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))
        temporary.chmod(0o644)  # the library makes its files for the owner's eyes only
        read_safetensors(temporary)  # raises if it is not whole


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, checked where it is owlet's own."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            expected = (file.metadata() or {}).get("owlet_sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file: {_one_line(error)}") from error
    if expected not in (None, checksum(tensors)):
        raise UserError(f"{path}: damaged: its checksum is not that of what it holds")
    return tensors


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint folder."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        if not path.exists():
            raise UserError(f"{path}: expected the model's weights, found no such file")
        tensors |= read_safetensors(path)
    return tensors


def write_state(path: Path, state: dict) -> None:
    """Tensors and plain types, the same bytes for the same values. What was there before becomes X.previous.pt."""
    state, kept = _canonical(state), path.with_name(f".{path.name}.kept.tmp")
    with atomic_path(path) as temporary:
        try:
            torch.save(state | {"sha256": checksum(state)}, temporary)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"is the disk full? {_one_line(error)}") from error
        read_state(temporary, mmap=True)  # raises if it is not whole
        kept.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the first state, or a file system without links: none is kept
            kept.hardlink_to(path)
    if kept.exists():  # only now, when the new one has its name: at every moment one of the two is whole
        kept.replace(previous_state(path))


def previous_state(path: Path) -> Path:
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def read_state(path: Path, mmap: bool = False) -> dict:
    """Read what `write_state` wrote, and its checksum as "sha256". Tensors and plain types only: nothing is
    unpickled into code.

    mmap: leave tensors in the file until they are looked at.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # on foreign pickles, which the error below names
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            expected = state.get("sha256")
            found = checksum({name: value for name, value in state.items() if name != "sha256"})
    except FileNotFoundError:
        raise UserError(f"{path}: no training state to resume from") from None
    except Exception as error:  # torch.load raises many kinds for a damaged or foreign file
        raise UserError(f"{path}: not a training state (damaged, or a pickle, which owlet never "
                        f"runs): {_one_line(error)}") from error
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


class Background:
    """A thread that does one job at a time. What a job raises, the next `start` or `wait` raises."""

    def __init__(self) -> None:
        self.thread, self.job = ThreadPoolExecutor(1), None

    def start(self, job: Callable[..., None], *args: Any) -> None:
        self.wait()
        self.job: Future | None = self.thread.submit(job, *args)

    def wait(self) -> None:
        job, self.job = self.job, None
        if job is not None:
            job.result()


@contextlib.contextmanager
def lock(folder: Path, owner: str) -> Iterator[None]:
    """Keep other processes out of a folder, until the end of this context or process, however it ends.

    folder/.lock is left holding `owner`. Raises UserError where another process is inside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another process trains here; wait for it, or name another --out") from None
            except OSError:  # a file system without locks
                pass
        file.truncate(0)
        file.write(owner)
        file.flush()
        yield


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


def _canonical(value: Any) -> Any:
    """Equal strings made one object: of a string that it has met, pickle writes only where that was."""
    if isinstance(value, dict):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_canonical, value))
    return sys.intern(value) if isinstance(value, str) else value


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
