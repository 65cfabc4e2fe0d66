"""Training killed at any moment, and inside any save, ends as a run that nobody disturbed, to the last bit.

    pytest tests/test_chaos.py -m long -k again --kills 200 -s       prints its progress and a summary
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, end_well, fork_train, free_port, random_model, refused
from test_train import SMALL, assert_same_checkpoint, assert_same_run

import sample
import train
from lib.checkpoint import STATE, load_model, read_safetensors, read_state, training_tensors, write_tensors
from lib.cli import UserError

TRAIN = [*SMALL, "--max-steps", "60"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]


def start(command: list, **options: object) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What it printed, once it has ended well."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out, err


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory) -> tuple[Path, float]:
    """A run's folder, and the seconds it took."""
    out, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    end_well(fork_train(out.with_name("log"), *TRAIN, "--data", data, "--out", out), out.with_name("log"))
    return out, time.monotonic() - began


@pytest.fixture
def trained(undisturbed, tmp_path) -> Path:
    """A copy of that folder, free to be damaged."""
    return Path(shutil.copytree(undisturbed[0], tmp_path / "run"))


# ---------------------------------------------------------------- kill -9

@pytest.mark.long
def test_a_run_killed_again_and_again_ends_as_if_it_were_not(undisturbed, data, tmp_path, request):
    kills, seed = request.config.getoption("kills"), request.config.getoption("kills_seed")
    rng, lost, in_saves, finished = random.Random(seed), [], 0, 0
    print(f"\nseed {seed}; the undisturbed run took {undisturbed[1]:.1f} s")
    while len(lost) < kills:
        out, log, kept = tmp_path / f"run{finished}", tmp_path / "log", None
        while True:
            log.write_text("")
            process, = fork_train(log, *TRAIN, "--data", data, "--out", out, *([] if kept is None else ["--resume"]))
            if len(lost) == kills or not kill(process, out, undisturbed[1], rng):
                break
            in_saves += saving(out)
            kept = kept_step(out)
            lost.append(last_logged_step(out) - (kept or 0))
            print(f"kill {len(lost)}: step {kept or 0} is kept, {lost[-1]} more were logged")
        said = end_well([process], log)
        assert kept == 60 or f"steps {kept or 0} to 60" in said
        assert "note:" not in said
        assert_same_run(out, undisturbed[0])
        shutil.rmtree(out)
        finished += 1
    print(f"{kills} kills, {in_saves} of them inside a save; no damaged file; {finished} runs finished, all the "
          f"same to the last bit; steps to repeat: {sum(lost) / kills:.1f} on average, {max(lost)} at most")


def kill(process: BaseProcess, out: Path, seconds: float, rng: random.Random) -> bool:
    """Kill it within its first `seconds`, rather late than early; or, every other time, in a save that follows.
    False: it had ended before.
    """
    aimed, delay = rng.random() < 0.5, rng.uniform(0, 0.03)
    until = time.monotonic() + seconds * rng.random() ** (1 if aimed else 0.5)
    while process.exitcode is None and (time.monotonic() < until or (aimed and not saving(out))):
        time.sleep(0.001)
    if aimed:
        time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode != 0


def saving(out: Path) -> bool:
    return any(path.suffix == ".tmp" for path in out.glob(".[mt]*"))


def kept_step(out: Path) -> int | None:
    """The step to resume from, if any, of a folder in which all is whole."""
    model = out / "model.safetensors"
    if not (out / STATE).exists():
        assert not model.exists()
        return None
    assert not model.exists() or read_safetensors(model)
    return read_state(out)["step"]


def last_logged_step(out: Path) -> int:
    lines = (out / "log.jsonl").read_text().splitlines(keepends=True) if (out / "log.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_before_any_step_of_a_save_leaves_a_whole_state(tmp_path):
    def save(out: Path, step: int) -> None:
        write_tensors(out / STATE, training_tensors(model, []), step=step, seconds=1.0, best=1.0, better=True,
                      model_config=vars(model.config))
        write_tensors(out / "model.safetensors", {"step": torch.tensor(step)})

    model = random_model()
    for n in itertools.count():
        out = tmp_path / str(n)
        save(out, 10)
        save(out, 20)
        child = os.fork()
        if child == 0:
            sys.addaudithook(killer(n))
            save(out, 30)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        kept = read_state(out)["step"]
        assert kept in (20, 30) and 20 <= read_safetensors(out / "model.safetensors")[0]["step"] <= kept
        save(out, 40)
        assert read_state(out)["step"] == 40
        assert not list(out.glob(".*"))
        if status == 0:  # it has not come to so many
            break
    assert n > 10


def killer(n: int) -> Callable:
    """An audit hook: kill -9 of this process before it opens, renames, links or removes a file, the n-th time."""
    count = itertools.count()

    def hook(event: str, args: tuple) -> None:
        if event in ("open", "os.rename", "os.link", "os.remove", "os.chmod", "os.mkdir") and next(count) == n:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def train_script(path: Path, changes: str) -> Path:
    """A script that is train.py, with changes to it."""
    path.write_text(f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import train
from lib import cli

rank, attempt = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

def after(function, action):
    def both(*args):
        result = function(*args)
        both.calls += 1
        action(both.calls)
        return result
    both.calls = 0
    return both

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

{changes}
sys.argv[0] = "train.py"
cli.run(train.main)
""")
    return path


AFTER_THE_WEIGHTS = """
from lib import checkpoint
write_json = checkpoint.write_json
checkpoint.write_json = lambda path, value: write_json(path, value) if path.name == "run.json" else die()
"""


@pytest.mark.parametrize("part, kept", [
    ("train.write_tensors = die", None), ("train.save_weights = die", 10), (AFTER_THE_WEIGHTS, 10)])
def test_a_kill_inside_the_first_save_loses_nothing_that_was_saved(script, undisturbed, data, tmp_path, part, kept):
    out = tmp_path / "run"
    mortal, = fork_train(tmp_path / "log", "--data", data, "--out", out, *TRAIN, changes=part)
    mortal.join()
    assert mortal.exitcode == -signal.SIGKILL
    assert kept_step(out) == kept and not (out / "config.json").exists()
    if kept:  # even where it was the last one
        code, said, err = script(train.main, "--resume", "--out", out, "--max-steps", kept)
        assert code == 0 and "trained for 10 steps already" in said and load_model(out), err
        (out / "config.json").unlink()
    code, _, err = script(train.main, "--data", data, "--out", out, *TRAIN, *(["--resume"] if kept else []))
    assert code == 0, err
    assert_same_run(out, undisturbed[0])


# ---------------------------------------------------------------- under torchrun

# rank 1 dies before the first checkpoint; of the ranks that follow, rank 0 dies after the second
MORTAL = """
train.update = after(train.update, lambda n: attempt < 2 and (rank, n) == [(1, 5), (0, 25)][attempt] and die())
"""

# rank 1 dies while rank 0 is still saving
SLOW_TO_SAVE = """
write_tensors = train.write_tensors
train.write_tensors = lambda *args, **facts: (time.sleep(3), write_tensors(*args, **facts))
train.update = after(train.update, lambda n: attempt == 0 and (rank, n) == (1, 15) and die())
"""


def test_torchrun_restarts_killed_ranks_in_their_own_folder(data, tmp_path):
    command, log = [*SMALL, "--max-steps", "60", "--data", data], tmp_path / "log"
    end_well(fork_train(log, *command, "--out", tmp_path / "out" / "wood-tiny", ranks=2), log)
    mortal = train_script(tmp_path / "mortal.py", MORTAL)
    out, err = finish(start([*TORCHRUN, "--max-restarts=2", mortal, *command], cwd=tmp_path))
    assert "wood-tiny-2: tiny" in out and re.search("steps [12]0 to 60", out), out  # 10: the second was being written
    assert "Traceback" not in err, err
    assert_same_run(tmp_path / "out" / "wood-tiny-2", tmp_path / "out" / "wood-tiny")
    assert not (tmp_path / "out" / "wood-tiny-3").exists()


@pytest.mark.long
def test_a_save_goes_on_when_another_rank_dies(data, tmp_path):
    """And the restart finds its folder where torchrun was started without a name of its own for the launch."""
    command = [train_script(tmp_path / "mortal.py", SLOW_TO_SAVE), *SMALL, "--max-steps", "20", "--data", data]
    out, _ = finish(start([*TORCHRUN, f"--master-port={free_port()}", "--max-restarts=1", *command], cwd=tmp_path))
    assert "steps 10 to 20" in out, out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["wood-tiny"]


@pytest.mark.long
def test_another_launch_of_the_same_name_is_another_run(data, tmp_path):
    named = [*TORCHRUN, "--rdzv-id=book", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", ROOT / "train.py"]
    for _ in range(2):
        finish(start([*named, *SMALL, "--max-steps", "10", "--data", data], cwd=tmp_path))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"wood-tiny", "wood-tiny-2"}


def test_ranks_that_found_different_states_do_not_begin(trained, tmp_path):
    changes, log = """
from lib import recipe
read_state = recipe.read_state
recipe.read_state = lambda out: (state := read_state(out)) | {"step": state["step"] - 10 * rank, "sha256": str(rank)}
""", tmp_path / "log"
    processes = fork_train(log, "--resume", "--out", trained, "--max-steps", 70, ranks=2, changes=changes)
    for process in processes:
        process.join(240)
        assert process.exitcode == 2
    said = log.read_text()
    assert f"different states to go on from, rank by rank: step 60 of {trained}, step 50 of {trained}" in said, said


# ---------------------------------------------------------------- damage

def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_in_tensor(path: Path) -> None:
    norm = read_safetensors(path)[0]["weights.model.norm.weight"]
    flip(path, 8 * (path.read_bytes().index(norm.numpy().tobytes()) + norm.nbytes // 2))


def flip_in_header(path: Path) -> None:
    flip(path, 8 * path.read_bytes().index(b"model_config"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [flip_in_tensor, flip_in_header, truncate])
def test_a_damaged_state_is_named(script, trained, damage):
    damage(trained / STATE)
    refused(script(train.main, "--resume", "--out", trained), STATE)


def test_a_flipped_bit_of_the_model_is_named(script, trained):
    flip(trained / "model.safetensors", 8 * 100_000)
    code, _, err = script(sample.main, "--checkpoint", trained)
    assert code == 2 and err.count("\n") == 1
    assert "model.safetensors" in err and "damaged" in err


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    tensors = {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor([True, False]), "c": torch.tensor(2.5)}
    model, state = tmp_path / "model.safetensors", tmp_path / STATE
    write_tensors(model, tensors)
    write_tensors(state, tensors, step=3, lr=0.1)
    for path, facts in ((model, {}), (state, {"step": 3, "lr": 0.1})):
        whole, refused = path.read_bytes(), 0
        for bit in range(0, 8 * len(whole), 41):
            flip(path, bit)
            try:
                found, beside = read_safetensors(path)  # where nothing depends on the bit, as in padding
                assert found.keys() == tensors.keys() and facts.items() <= beside.items()
                assert all(torch.equal(found[name], tensors[name]) for name in tensors), bit
            except UserError:
                refused += 1
            path.write_bytes(whole)
        assert refused > 50


def test_of_two_processes_one_trains_in_a_folder(script, trained, tmp_path):
    flags, log = [*TRAIN[:-1], "1000000", "--eval-every", "1000000", "--resume", "--out", trained], tmp_path / "log"
    process, = fork_train(log, *flags)
    while not (log.exists() and str(trained) in log.read_text()):  # until it has begun
        assert process.exitcode is None
        time.sleep(0.01)
    code, _, err = script(train.main, "--resume", "--out", trained, "--max-steps", 70)
    refused((code, "", err), "another process")
    process.kill()
    process.join()
    code, out, err = script(train.main, "--resume", "--out", trained, "--max-steps", 70)
    assert code == 0 and "steps 60 to 70" in out, err


@pytest.mark.parametrize("function", ["evaluate", "training_tensors", "write_tensors"])
def test_a_signal_in_the_midst_of_it_is_obeyed_after(script, undisturbed, data, tmp_path, monkeypatch, function):
    original, calls = getattr(train, function), []

    def signalled(*args: object, **facts: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **facts)

    monkeypatch.setattr(train, function, signalled)
    code, _, err = script(train.main, "--data", data, "--out", tmp_path / "run", *SMALL, "--max-steps", 60)
    assert code == 128 + signal.SIGTERM, err
    assert 20 <= kept_step(tmp_path / "run") < 60
    code, _, err = script(train.main, "--resume", "--out", tmp_path / "run")
    assert code == 0, err
    assert_same_checkpoint(tmp_path / "run", undisturbed[0])
