"""Files are whole or absent, whoever else writes them, and as private as the user wants them."""

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from lib import checkpoint
from lib.checkpoint import read_safetensors, write_tensors
from lib.cli import StopSignals, UserError
from lib.files import atomic_folder, atomic_path, write_text


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)], ids=oct)
def test_permissions_are_those_of_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "x")
        write_tensors(tmp_path / "tensors", {"x": torch.ones(2)})  # a library that has its own idea of them
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}


def test_two_processes_that_write_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with atomic_path(path) as ours:
        ours.write_text("ours, half")
        other = f"import pathlib; from lib import files; files.write_text(pathlib.Path({str(path)!r}), 'theirs')"
        subprocess.run([sys.executable, "-c", other], cwd=ROOT, check=True)
        assert path.read_text() == "theirs" and ours.read_text() == "ours, half"
        ours.write_text("ours")
    assert path.read_text() == "ours" and list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    ended, alive = tmp_path / f".file.{dead.pid}.tmp", tmp_path / f".file.{os.getppid()}.tmp"
    ended.touch()
    alive.touch()
    write_text(tmp_path / "file", "x")
    assert set(tmp_path.iterdir()) == {tmp_path / "file", alive}


def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file"
    write_text(path, "before")
    with pytest.raises(UserError, match="file: could not be written: no"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError("no")
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_only_what_has_a_checksum_is_hashed(tmp_path, monkeypatch):
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors")
    write_tensors(tmp_path / "ours.safetensors", {"x": torch.ones(2)})
    monkeypatch.setattr(checkpoint, "checksum", lambda tensors: "another")
    assert read_safetensors(tmp_path / "foreign.safetensors")[0]["x"].tolist() == [1, 1]
    with pytest.raises(UserError, match="damaged"):
        read_safetensors(tmp_path / "ours.safetensors")


def test_a_signal_during_a_print_is_only_noted(capfd, monkeypatch):
    """A handler that printed would interrupt a write to the same stream, which Python refuses."""
    signals, write, said = StopSignals(), sys.stdout.write, []

    def interrupted(text: str) -> int:
        signal.raise_signal(signal.SIGTERM)
        return write(text)

    with signals.heard():
        with monkeypatch.context() as patch:
            patch.setattr(sys.stdout, "write", interrupted)
            print("x", end="")
        assert signals.asked == signal.SIGTERM
        assert capfd.readouterr() == ("x", "")
        signals.say_once(said.append)
        signals.say_once(said.append)
    assert len(said) == 1 and said[0].startswith("SIGTERM: saving and stopping")


def test_the_files_of_two_folders_do_not_mix(tmp_path):
    """While one process moves its files into a folder, another waits with its own."""
    def write(word: str) -> None:
        with atomic_folder(tmp_path / "made", "b") as new:
            for name in "abc":
                (new / name).write_text(word)

    def held() -> set[str]:
        return {(tmp_path / "made" / name).read_text() for name in "abc"}

    write("one")
    other, handle = threading.Thread(target=write, args=("two",)), os.open(tmp_path / "made", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as if another process were moving its files
    other.start()
    other.join(0.5)
    assert other.is_alive() and held() == {"one"}
    os.close(handle)
    other.join(60)
    assert held() == {"two"}
