"""Files that lie and flags that make no sense, drawn at random: no traceback, no signal, no endless wait, nothing left.

    python -m pytest tests/test_fuzz.py --cases 2000             all of it, in some twenty minutes
    python -m pytest tests/test_fuzz.py --cases 2000 --cases-seed 7 -k folders
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import prepare
import pytest
import torch
from conftest import forks, make_text
from tokenizers import Tokenizer, decoders, models

import quantize
import sample
import train
from int8 import save_quantized
from lib import cli, corpus, recipe
from lib.checkpoint import copy_companions, load_model

SECONDS = 20  # after which a script is interrupted, as a user would
MAINS = {"prepare": prepare.main, "train": train.main, "sample": sample.main, "quantize": quantize.main}
CONFIGS = {"prepare": corpus.PrepareConfig, "train": recipe.TrainConfig, "sample": sample.SampleConfig,
           "quantize": quantize.QuantizeConfig}
QUICK = ["--max-steps", "3", "--batch-size", "2", "--eval-tokens", "100", "--eval-every", "2", "--threads", "1",
         "--device", "cpu", "--compile", "off"]
TINY = ["--n-layer", "1", "--n-embd", "16", "--n-head", "2", "--block-size", "16"]
# the scripts that use each folder, which FOLDER stands for
USES = {
    "data": [["train", *TINY, *QUICK, "--data", "FOLDER", "--out", "run"]],
    "model": [["sample", "--checkpoint", "FOLDER", "--max-new-tokens", "20", "--num-samples", "2", "--seed", "1"],
              ["quantize", "--checkpoint", "FOLDER", "--no-compare", "--gguf"],
              ["prepare", "--tokenizer", "FOLDER", "--input", "book.txt", "--out", "prepared"],
              ["train", *QUICK, "--init-from", "FOLDER", "--data", "../data", "--out", "run", "--block-size", "16"],
              ["train", *QUICK[2:], "--batch-size", "2", "--resume", "--out", "FOLDER", "--max-steps", "5"]],
    "model-int8": [["sample", "--checkpoint", "FOLDER", "--max-new-tokens", "20", "--temperature", "0"]],
    "tokenizers": [["prepare", "--tokenizer", "FOLDER", "--input", "book.txt", "--out", "prepared"]],
}
VALUES = [None, "", "x", "\u0000", "\u20ac", [], {}, [None], [[]], {"a": 1}, True, False, -1, 0, 1, 3, 255, 256, 1.5,
          64.0, 1e-40, 1e300, 2**31 - 1, 2**31, 2**40, 2**63, 2**70, -(2**63), "256", "../x", "/etc/passwd"]
WORDS = ["", " ", "-1", "0", "1", "3", "1.5", "1e-45", "1e38", "1e999", "-1e999", "nan", "9" * 30, "9" * 5000, "x",
         "None", "[", "~nobody/x", "~", "/dev/null", "/dev/zero", "/nowhere/x", ".", "..", "x" * 300, "\udce9", "$x__y",
         "a\nb", "--", "-", "model", "data", "auto", "cpu", "cuda:99", "mps"]


# ---------------------------------------------------------------- folders to damage

@pytest.fixture(scope="module")
def whole(data, checkpoint_folder, tmp_path_factory) -> Path:
    """data/, model/ (a run of two steps), model-int8/, tokenizers/KIND/, all in order."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(data, root / "data")
    shutil.copytree(checkpoint_folder, root / "model")
    save_quantized(load_model(root / "model"), root / "model-int8")
    copy_companions(root / "model", root / "model-int8")
    for name, tokenizer in TOKENIZERS.items():
        (root / "tokenizers" / name).mkdir(parents=True)
        tokenizer.save(str(root / "tokenizers" / name / "tokenizer.json"))
    return root


def tokenizers() -> Iterator[tuple[str, Tokenizer]]:
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz▁ABC")}
    yield "wordpiece", Tokenizer(models.WordPiece(letters | {"[UNK]": 40}, unk_token="[UNK]"))
    yield "wordlevel", Tokenizer(models.WordLevel(letters | {"[UNK]": 40}, unk_token="[UNK]"))
    yield "unigram", Tokenizer(models.Unigram([(letter, -1.0) for letter in letters], 0, False))
    llama = Tokenizer(models.BPE(letters | {f"<0x{i:02X}>": 30 + i for i in range(256)}, [], byte_fallback=True))
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    llama.add_special_tokens(["</s>"])
    yield "llama", llama


TOKENIZERS = dict(tokenizers())


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file of a folder; what was done."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file() and "runs" not in path.parts))
    name = file.relative_to(folder)
    if file.suffix == ".json" and rng.random() < 0.75:
        document = json.loads(file.read_text())
        (container, key), value = rng.choice(list(places(document))), rng.choice(VALUES)
        container[key] = value
        if rng.random() < 0.25:
            value = "dropped"
            del container[key]
        file.write_text(json.dumps(document))
        return f"{name}: {key!r} {value!r:.40}"
    content, kind = file.read_bytes(), rng.choice(
        ["cut", "empty", "foreign", "noise", "flip", "gone", "folder", "pipe", "zeros", "dangling", "lines"])
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind in ("zeros", "dangling"):
        file.symlink_to("/dev/zero" if kind == "zeros" else "/nowhere")
    elif kind != "gone":
        content = content or b"\0"
        at = rng.randrange(len(content))
        others = sorted(path for path in folder.rglob("*") if path.is_file())
        file.write_bytes({
            "cut": lambda: content[:at], "empty": lambda: b"", "noise": lambda: rng.randbytes(len(content)),
            "foreign": lambda: rng.choice(others).read_bytes() if others else b"{}",
            "flip": lambda: content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:],
            "lines": lambda: b"\n".join([*content.splitlines(), b'{"step": "x"}', b"null", b"[NaN]", b"\xff"])}[kind]())
    return f"{name}: {kind}"


def places(value: object) -> Iterator[tuple[dict | list, str | int]]:
    """All containers of a JSON document with each of their keys; of long ones the first three and the last."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inner in items if len(items) < 30 else [*items[:3], items[-1]]:
        yield value, key
        yield from places(inner)


# ---------------------------------------------------------------- one case

def start_script(words: list[str], place: Path, **environment: str) -> BaseProcess:
    """Start a script in a process of its own. Its standard streams are the files stdin, stdout, stderr in `place`."""
    process = forks().Process(target=_run, args=(words, place, environment))
    process.start()
    return process


def run_script(words: list[str], place: Path, **environment: str) -> tuple[int | None, str]:
    """Run a script. Returns its exit code, and what it printed on standard error."""
    process = start_script(words, place, **environment)
    process.join(SECONDS)
    if process.is_alive():  # endless by its flags, perhaps; then Ctrl-C ends it cleanly
        os.kill(process.pid, signal.SIGINT)
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
            return None, "hangs"
    return process.exitcode, (place / "stderr").read_text(errors="replace")


def _run(words: list[str], place: Path, environment: dict[str, str]) -> None:
    os.chdir(place)
    os.environ.update(environment)
    resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
    for number, name in enumerate(["stdin", "stdout", "stderr"]):
        Path(name).touch()
        os.dup2(os.open(name, os.O_RDWR | os.O_TRUNC * (number > 0)), number)
    sys.argv = [f"{words[0]}.py", *words[1:]]
    torch.set_num_threads(1)
    cli.run(MAINS[words[0]])


def assert_clean(words: list[str], place: Path) -> None:
    code, said = run_script(words, place)
    assert "Traceback" not in said and "Error:" not in said and "panicked" not in said, said[-3000:]
    assert code in (0, 2, 130), f"exit code {code}: {said[-2000:]}"
    lines = [line for line in re.split("[\r\n]+", said) if line.startswith(f"{words[0]}.py: ")]
    assert len(lines) == (code != 0), said[-2000:]
    left = [path for path in place.rglob(".*") if path.name.endswith((".tmp", ".kept"))]
    assert not left, left
    for folder in place.iterdir():  # made by this run: whole or not there
        if folder.is_dir() and folder.name.endswith("-int8") and "quantize" in words:
            made = {path.name for path in folder.iterdir()}
            assert {"config.json", "model.safetensors"} <= made
            assert "tokenizer.json" in made or not os.path.lexists(place / "folder/tokenizer.json")


@pytest.fixture
def check(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """check(draw): run many scripts, each in a fresh folder, and tell of all that were not clean.

    draw(rng, place) prepares the folder; it returns the script with its flags, and what to say of the case.
    """
    count, seed = request.config.getoption("--cases"), request.config.getoption("--cases-seed")

    def run(draw: Callable[[random.Random, Path], tuple[list[str], str]]) -> None:
        faults = []
        for number in range(count):
            place = tmp_path / "case"
            place.mkdir()
            (place / "book.txt").write_text(make_text(300))
            words, about = draw(random.Random(f"{seed} {number}"), place)
            try:
                assert_clean(words, place)
            except AssertionError as error:
                faults.append(f"{about}\n  {words!a}\n  {error}")
            shutil.rmtree(place)
        assert not faults, "\n\n".join([f"--cases-seed {seed}: {len(faults)} faults", *faults])

    return run


def test_damaged_folders(whole, check, tmp_path):
    shutil.copytree(whole / "data", tmp_path / "data")

    def draw(rng: random.Random, place: Path) -> tuple[list[str], str]:
        kind = rng.choices(list(USES), [4, 8, 3, 2])[0]
        source = whole / kind if kind != "tokenizers" else rng.choice(sorted((whole / kind).iterdir()))
        damaged = damage(Path(shutil.copytree(source, place / "folder")), rng)
        return [word.replace("FOLDER", "folder") for word in rng.choice(USES[kind])], f"{kind}: {damaged}"

    check(draw)


def test_flags_without_sense(whole, check):
    given = {"prepare": ["--input", "book.txt"], "train": [*TINY, *QUICK, "--data", "data"],
             "sample": ["--checkpoint", "model", "--max-new-tokens", "9"],
             "quantize": ["--checkpoint", "model", "--no-compare"]}

    def draw(rng: random.Random, place: Path) -> tuple[list[str], str]:
        for name in ("data", "model", "model-int8"):
            shutil.copytree(whole / name, place / name)
        script = rng.choice(list(CONFIGS))
        option = f"--{rng.choice(dataclasses.fields(CONFIGS[script])).name.replace('_', '-')}"
        words = [script, *given[script], *([option] if rng.random() < 0.1 else [f"{option}={rng.choice(WORDS)}"])]
        return words + ["--resume", "--out", "model"] * (script == "train" and rng.random() < 0.3), option

    check(draw)
