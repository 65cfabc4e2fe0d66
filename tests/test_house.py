"""Rules of the house: imports go one way, no file imports a script, and names that are written down exist."""

import ast
import dataclasses
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import profile_run
from lib import recipe

SCRIPTS = {"train", "sample", "quantize", "profile_run", "data.prepare", "prepare", "setup"}
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for path in [*ROOT.glob("*.py"), *ROOT.glob("lib/*.py"), ROOT / "data" / "prepare.py"]}
BENCHMARKS = sorted((ROOT / "tests" / "bench").glob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in the file: ours, and the packages of others."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name if name in FILES else name.split(".")[0] for name in found}


OURS = {name: imports(path) & FILES.keys() for name, path in FILES.items()}


def test_the_top_holds_what_people_type_and_come_to_read():
    assert {path.stem for path in ROOT.glob("*.py")} == SCRIPTS - {"data.prepare", "prepare"} | {
        "model", "dataloader", "generate", "int8"}


def test_imports_make_no_circle():
    @functools.cache
    def depth(name: str) -> int:  # a circle recurses for ever
        return 1 + max(map(depth, OURS[name]), default=0)

    assert max(map(depth, OURS)) < len(OURS)


@pytest.mark.parametrize("path", [*FILES.values(), *BENCHMARKS], ids=lambda path: path.name)
def test_no_script_is_imported(path):
    assert not imports(path) & SCRIPTS - ({"train"} if path in BENCHMARKS else set())


def test_the_model_needs_torch_alone():
    assert imports(FILES["model"]) - sys.stdlib_module_names == {"torch"}


@pytest.mark.parametrize("function", profile_run.PHASE_OF)
def test_every_function_of_a_phase_exists(function):
    """A renamed function would turn its phase into "everything else"."""
    file, name = function.split(":")
    ours = [module for module, path in FILES.items() if path.name == file]
    found = importlib.import_module(ours[0] if ours else file.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
    code = getattr(found, "__wrapped__", found)
    assert getattr(code, "__qualname__", name) == name  # as a profile has it


def test_pointers_into_the_log_of_decisions_resolve():
    """Each is one line's `docs/log.md, "heading"`."""
    headings = set(re.findall("^#+ (.+)$", (ROOT / "docs/log.md").read_text(), re.M))
    texts = {path: path.read_text() for path in [*FILES.values(), *(ROOT / "csrc").glob("**/*.*")]}
    pointers = [(path.name, heading) for path, text in texts.items()
                for heading in re.findall(r'docs/log\.md, "(.+?)"', text)]
    assert len(pointers) == sum(text.count("docs/log.md") for text in texts.values()) > 0
    assert not [pointer for pointer in pointers if pointer[1] not in headings]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(recipe.TrainConfig)])
def test_every_default_of_training_is_explained(name):
    text = "".join((ROOT / "docs" / file).read_text() for file in ("log.md", "training.md"))
    assert re.search(rf"`{name}\b|--{name.replace('_', '-')}\b", text)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_clean_removes_build_products_only():
    """Never a model, never a book."""
    command = ["make", "--no-print-directory", "--dry-run", "clean"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.split() == ["rm", "-rf", ".venv", "build", "*.so"]


@pytest.mark.long
@pytest.mark.parametrize("name", ["cuda", "guesses", "ladder", "loss", "peers", "scaling", "sizes", "train"])
def test_every_benchmark_explains_itself(name):
    command = [sys.executable, ROOT / f"tests/bench/bench_{name}.py", "--help"]
    assert "usage:" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_run_for_gpus_can_be_tried_without_one(tmp_path):
    command = [sys.executable, ROOT / "tests/bench/gpu.py", "--out", tmp_path / "gpu"]
    dry = subprocess.run([*command, "--dry", "--only", "build", "smoke", "train"], capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert re.findall(r"^(\w+): ok", dry.stdout, re.M) == ["build", "smoke", "train"]
    assert (tmp_path / "gpu" / "stages.md").read_text().count("| ok |") == 3
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    refused = subprocess.run(command, capture_output=True, text=True, env=env)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "needs a CUDA GPU" in refused.stderr
