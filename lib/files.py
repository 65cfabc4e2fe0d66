"""Files that are whole or absent, and what they hold checked: atomic writes, JSON, locks, the newest folder.

A write goes to a temporary name beside its target and is renamed once it is on disk, so that neither a full disk nor
kill -9 nor a power cut leaves half a file.
"""

import contextlib
import fcntl
import glob
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
from safetensors import SafetensorError

from lib.cli import UserError, checked, one_line

# ---------------------------------------------------------------- writing

@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` once it is written and on disk.

    Two processes may write the same path: each has a name of its own. The file gets the permissions that the umask
    says. Raises UserError if writing fails; an earlier `path` stays then.
    """
    with _temporary(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some libraries make their files readable for the owner alone
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)  # the rename itself must survive a power cut


@contextlib.contextmanager
def atomic_folder(path: Path, marker: str) -> Iterator[Path]:
    """Yield a temporary folder, whose files are then moved into `path`, `marker` last.

    A folder without its marker is one that nobody reads. Files of an earlier `path` that the new one lacks stay.
    """
    with _temporary(path / marker) as new:
        new.mkdir()
        yield new
        for file in new.iterdir():
            _fsync(file)
        with _opened(path) as folder:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(folder, fcntl.LOCK_EX)  # the files of two processes that end at once do not mix
            (path / marker).unlink(missing_ok=True)
            _fsync(path)
            for file in sorted(new.iterdir(), key=lambda file: file.name == marker):
                file.replace(path / file.name)
            _fsync(path)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` that this process alone uses, in a folder that is made where it is missing.

    Removes what is left under that name and what killed processes have left; and, if it is empty, the new folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    made = not os.access(path.parent, os.F_OK)  # exists() raises an error where a folder above may not be searched
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            if left.name.split(".")[-2] not in map(str, psutil.pids()):
                _remove(left)
        yield temporary
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written: {one_line(error)}") from error
    finally:
        _remove(temporary)
        if made:
            with contextlib.suppress(OSError):  # the folder has been filled
                path.parent.rmdir()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # it has been moved, or belongs to another user
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:  # a name of a file in the text may hold other bytes than UTF-8
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: Any) -> None:
    """Paths in the value become absolute."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=lambda path: str(path.resolve())) + "\n")


# ---------------------------------------------------------------- reading

def regular_file(path: Path, expected: str, limit: float = float("inf")) -> Path:
    """The path, if a file of at most `limit` bytes is there. Raises UserError for all else: a pipe would wait for ever.

    `expected` is what the file should be, for the message.
    """
    if not path.is_file():
        found = "a folder" if path.is_dir() else "a device or a pipe" if path.exists() else "no such file"
        raise UserError(f"{path}: expected {expected}, found {found}")
    if (size := path.stat().st_size) > limit:
        raise UserError(f"{path}: expected {expected} of at most {limit / 1e6:,.0f} MB, got {size / 1e6:,.0f} MB")
    return path


def read_json(path: Path, kind: Any = dict, limit: float = 64e6) -> Any:
    """What a JSON file holds, checked to be of the type `kind`."""
    try:
        value = msgspec.json.decode(regular_file(path, "a JSON file", limit).read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError, as msgspec's errors are
        raise UserError(f"{path}: expected a JSON file: {one_line(error)}") from error
    return checked(value, kind, path)


# ---------------------------------------------------------------- locks and folders

@contextlib.contextmanager
def lock(folder: Path, owner: str) -> Iterator[None]:
    """Keep other processes out of a folder, until the end of this context or process, however it ends.

    folder/.lock is left holding `owner`. Raises UserError where another process is inside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process trains here; wait for it, or name another --out") from None
        except OSError:  # a file system without locks
            pass
        (folder / ".lock").write_text(owner)
        yield


def newest(root: Path, marker: str, make: str) -> list[Path]:
    """The folders under `root` with a file `marker`, newest first; `make` is the command that makes one."""
    found = sorted(root.glob(f"*/{marker}"), key=lambda path: -path.stat().st_mtime)
    if not found:
        raise UserError(f"{root}/: no folder with {marker} yet; make one with `{make}`")
    return [path.parent for path in found]


def numbered(path: Path) -> Iterator[Path]:
    """PATH, PATH-2, PATH-3, ..."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))


def beside(folder: Path, ending: str) -> Path:
    """FOLDER with `ending` added to its name."""
    folder = folder.resolve() if folder.name in ("", "..") else folder  # ".", which has no name to add to
    return folder.with_name(f"{folder.name}{ending}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _fsync(path: Path) -> None:
    with _opened(path) as handle:  # on macOS, fsync stops at the drive's own cache
        fcntl.fcntl(handle, fcntl.F_FULLFSYNC) if hasattr(fcntl, "F_FULLFSYNC") else os.fsync(handle)
