"""Files that are whole or absent: atomic writes, locks, and the newest folder.

A write goes to a temporary name beside its target and is renamed once it is on disk, so that neither a full disk nor
kill -9 nor a power cut leaves half a file.
"""

import contextlib
import fcntl
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from cli import UserError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; rename it to `path` once it is written and on disk.

    The name is this process's own, so two processes that write the same path do not write into each other's file. The
    file gets the permissions that the umask says. Raises UserError if writing fails; an earlier `path` stays then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(path)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some libraries make their files readable for the owner alone
        _fsync(temporary)
        temporary.replace(path)
        _fsync(path.parent)  # the rename itself must survive a power cut
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: could not be written: {one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _remove_stale(path: Path) -> None:
    """Remove what killed processes left of their attempts to write `path`."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(PermissionError):  # the process lives, and is somebody else's
            try:
                os.kill(int(left.name.split(".")[-2]), 0)  # sends nothing: asks whether the process is there
            except (ProcessLookupError, ValueError):
                left.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a JSON file: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextlib.contextmanager
def lock(folder: Path, owner: str) -> Iterator[None]:
    """Keep other processes out of a folder, until the end of this context or process, however it ends.

    folder/.lock is left holding `owner`. Raises UserError where another process is inside.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
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


def newest(root: Path, marker: str, make: str) -> list[Path]:
    """The folders under `root` with a file `marker`, newest first; `make` is the command that makes one."""
    found = sorted(Path(root).glob(f"*/{marker}"), key=lambda path: -path.stat().st_mtime)
    if not found:
        raise UserError(f"{root}/: no folder with {marker} yet; make one with `{make}`")
    return [path.parent for path in found]


def beside(folder: Path, ending: str) -> Path:
    """FOLDER with `ending` added to its name."""
    folder = folder if folder.name else folder.resolve()  # "." has no name to add to
    return folder.with_name(f"{folder.name}{ending}")


def one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
