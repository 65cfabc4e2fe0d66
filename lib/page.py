"""Writes a model as one HTML file that opens in any browser, offline, and writes text:  python quantize.py --html

The file is page.html with the int8 weights, the tokenizer and csrc/ compiled to WebAssembly in it. The compiler is
clang: of the package ziglang (requirements-html.txt), or the system's where it has the libraries of WASI.
"""

import base64
import html
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from int8 import arrays, read_quantized
from lib.cli import UserError
from lib.files import atomic_path, write_text
from lib.gguf import recognise
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O3", "-msimd128", "-ffp-contract=off", "-fno-trapping-math", "-fno-exceptions",
         "-Wl,-z,stack-size=262144"]  # zig's default, 16 MB, would be most of a small model's memory
MOST = 400  # MB of weights: browsers take no text longer than their base64


def check_page(folder: Path, model: GPT) -> None:
    """Raises UserError, before any work, where no page can be made of this model, or nothing compiles it."""
    tokenizer(folder, model.config)
    if (millions := model.num_params() / 1e6) > MOST:
        raise UserError(f"--html: expected at most {MOST}M parameters, which browsers can read, got {millions:.0f}M")
    webassembly()


def write_html(folder: Path, path: Path) -> None:
    """Write the int8 model of a folder to `path`."""
    config, *state = read_quantized(folder)
    about, weights, code = tokenizer(folder, config), model_file(config, *state), webassembly().read_bytes()
    values = {"name": html.escape(path.stem), "size": f"{4 / 3 * (len(weights) + len(code)) / 1e6:.1f} MB",
              "about": json.dumps(about, ensure_ascii=False).replace("<", "\\u003c"),
              "wasm": base64.b64encode(code).decode(), "weights": base64.b64encode(weights).decode()}
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template))


def webassembly() -> Path:
    """csrc/ compiled to WebAssembly, which is kept in build/."""
    out = ROOT / "build" / "owlet.wasm"
    sources = [*(ROOT / "csrc").glob("[dlpw]*.*"), *(ROOT / "csrc/kernels").iterdir()]
    if not out.exists() or out.stat().st_mtime < max(path.stat().st_mtime for path in (*sources, Path(__file__))):
        print("compiling the decoder to WebAssembly ...", flush=True)
        with atomic_path(out) as temporary:
            compile_wasm([source for source in sources if source.suffix == ".cpp"], temporary, "-mexec-model=reactor")
    return out


def compile_wasm(sources: list[Path], out: Path, *flags: str) -> None:
    """Raises UserError, which says what to install, where there is no compiler or no library."""
    if importlib.util.find_spec("ziglang"):
        clang = [sys.executable, "-m", "ziglang", "c++", "-target", "wasm32-wasi"]
    elif shutil.which("clang++"):
        clang = ["clang++", "--target=wasm32-wasi", "-Wl,--stack-first"]  # an overflow ends it, as zig's own does
    else:
        raise UserError("--html: expected a clang for WebAssembly, found none; pip install -r requirements-html.txt")
    made = subprocess.run([*clang, *FLAGS, *flags, *sources, "-s", "-o", out], capture_output=True, text=True)
    if made.returncode:
        errors = [line for line in made.stderr.splitlines() if "error" in line] or [f"exit code {made.returncode}"]
        raise UserError(f"--html: {' '.join(map(str, clang))} could not compile for WebAssembly ({errors[0]}); "
                        "requirements-html.txt names a compiler that can")


def model_file(*model: object) -> bytes:
    """The arrays of a model, joined for csrc/page.cpp: whole panels of 64 rows and 4 columns, and whole lines of 64
    bytes.
    """
    parts = []
    for array in arrays(*model):
        if array.dtype == torch.int8:
            array = F.pad(array, (0, -array.size(1) % 4, 0, -len(array) % 64))
        parts.append(array.contiguous().numpy().tobytes())
        parts.append(bytes(-len(parts[-1]) % 64))
    joined = b"".join(parts)
    return joined + bytes(-len(joined) % 192)  # in base64, three bytes are four characters


# ---------------------------------------------------------------- the tokenizer

def tokenizer(folder: Path, config: GPTConfig) -> dict:
    """What the page's tokenizer is made of. Raises UserError where it would give other tokens."""
    file, cut, adds_bos = recognise(folder, config.bos)
    vocab, added = file["model"]["vocab"], {token["content"]: token["id"] for token in file["added_tokens"]}
    odd = [token["content"] for token in file["added_tokens"] if token["lstrip"] or token["rstrip"]
           or token["single_word"] or (token["normalized"] and file["normalizer"])]
    if odd:
        raise UserError(f"{folder}/tokenizer.json: --html takes added tokens without conditions, got {odd[0]!r}")
    if (most := max([*vocab.values(), *added.values()])) >= config.vocab_size:
        raise UserError(f"{folder}/tokenizer.json: has tokens up to {most}, the model knows {config.vocab_size}")
    return {"vocab": vocab, "merges": [" ".join(pair) for pair in file["model"]["merges"]], "added": added,
            "special": [token["id"] for token in file["added_tokens"] if token["special"]], "cut": cut,
            "nfc": file["normalizer"] is not None, "ignoreMerges": file["model"]["ignore_merges"],
            "before": [config.bos] if adds_bos else [], "ends": config.ends}
