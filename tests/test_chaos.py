"""Training killed at any moment, and inside any save, ends as a run that nobody disturbed, to the last bit.

    pytest tests/test_chaos.py -m long -k again --kills 200 -s       prints its progress and a summary
"""

import itertools
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
from conftest import (
    ROOT,
    SMALL,
    accepted,
    assert_same_checkpoint,
    assert_same_run,
    die,
    end_well,
    exit_codes,
    fork_train,
    free_port,
    hooked,
    random_model,
    refused,
    wait_until,
)

import sample
import train
from lib.checkpoint import STATE, load_model, read_safetensors, read_state, training_tensors, write_tensors
from lib.cli import UserError
from lib.runlog import read_records

LENGTH = ["--max-steps", 60]


@pytest.fixture
def trained(finished, tmp_path) -> Path:
    """A copy of the folder of an undisturbed run, free to be damaged."""
    return Path(shutil.copytree(finished(*LENGTH), tmp_path / "run"))


# ---------------------------------------------------------------- kill -9

@pytest.mark.long
def test_a_run_killed_again_and_again_ends_as_if_it_were_not(finished, data, tmp_path, request):
    kills, seed = request.config.getoption("kills"), request.config.getoption("kills_seed")
    rng, lost, in_saves, whole_runs, undisturbed = random.Random(seed), [], 0, 0, finished(*LENGTH)
    seconds = read_state(undisturbed)["seconds"] + 1  # with its start
    print(f"\nseed {seed}; the undisturbed run took {seconds:.1f} s")
    while len(lost) < kills:
        out, log, kept = tmp_path / f"run{whole_runs}", tmp_path / "log", None
        while True:
            log.write_text("")
            resume = [] if kept is None else ["--resume"]
            process, = fork_train(log, *SMALL, *LENGTH, "--data", data, "--out", out, *resume)
            if len(lost) == kills or not kill(process, out, seconds, rng):
                break
            in_saves += saving(out)
            kept = kept_step(out)
            logged = [record["step"] for record in read_records(out / "log.jsonl")]
            lost.append(max(logged, default=0) - (kept or 0))
            print(f"kill {len(lost)}: step {kept or 0} is kept, {lost[-1]} more were logged")
        said = end_well([process], log)
        assert kept == 60 or f"steps {kept or 0} to 60" in said
        assert "note:" not in said
        assert_same_run(out, undisturbed)
        shutil.rmtree(out)
        whole_runs += 1
    print(f"{kills} kills, {in_saves} of them inside a save; no damaged file; {whole_runs} runs finished, all the "
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
            die()

    return hook


AFTER_THE_WEIGHTS = """
from lib import checkpoint
write_json = checkpoint.write_json
checkpoint.write_json = lambda path, value: write_json(path, value) if path.name == "run.json" else die()
"""


@pytest.mark.parametrize(("changes", "kept", "whole"), [
    ("train.write_tensors = die", None, False), ("train.save_weights = die", 10, False),
    (AFTER_THE_WEIGHTS, 10, False),
    ("train.update = hooked(train.update, lambda n: n == 16 and die())", 10, True)],
    ids=["in the state", "in the weights", "after the weights", "between two saves"])
def test_a_kill_loses_nothing_that_was_saved(script, finished, data, tmp_path, changes, kept, whole):
    out = tmp_path / "run"
    command = ["--data", data, "--out", out, *SMALL, *LENGTH]
    assert exit_codes(fork_train(tmp_path / "log", *command, changes=changes)) == [-signal.SIGKILL]
    assert kept_step(out) == kept and (out / "config.json").exists() == whole
    if kept:  # a resume that has no step to do saves the model from the state
        said, _ = accepted(script(train.main, "--resume", "--out", out, "--max-steps", kept))
        assert "trained for 10 steps already" in said and load_model(out)
        (out / "config.json").unlink()
    accepted(script(train.main, *command, *(["--resume"] if kept else [])))
    assert_same_run(out, finished(*LENGTH))


# ---------------------------------------------------------------- under torchrun

# rank 1 dies before the first checkpoint; of the ranks that follow, rank 0 dies after the second
MORTAL = """
train.update = hooked(train.update, lambda n: attempt < 2 and (rank, n) == [(1, 6), (0, 26)][attempt] and die())
"""

# rank 1 begins its 11th step and dies while rank 0 is still saving
SLOW_TO_SAVE = """
train.write_tensors = hooked(train.write_tensors, lambda _: time.sleep(3))
train.forward_loss = hooked(train.forward_loss, lambda n: attempt == 0 and (rank, n) == (1, 11) and die())
"""


def torchrun(place: Path, *words: object, changes: str = "") -> str:
    """What torchrun prints, with two ranks of train.py in the folder `place`. `words` are its flags and the script's.

    `changes` is code that runs before train.main, with rank and attempt (0, or 1 after a restart, ...) at hand.
    """
    (place / "train.py").write_text(f"""
import os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from conftest import cli, die, hooked, train
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
{changes}
cli.run(train.main)
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", *map(str, words)],
                          capture_output=True, text=True, cwd=place, timeout=240)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_torchrun_restarts_killed_ranks_in_their_own_folder(data, tmp_path):
    command, log, out = [*SMALL, "--max-steps", 30, "--data", data], tmp_path / "log", tmp_path / "out"
    end_well(fork_train(log, *command, "--out", out / "wood-tiny", ranks=2), log)
    said = torchrun(tmp_path, "--max-restarts=2", "train.py", *command, changes=MORTAL)
    assert "wood-tiny-2: tiny" in said, said
    assert re.search("steps [12]0 to 30", said), said  # 10: the second checkpoint was being written
    assert_same_run(out / "wood-tiny-2", out / "wood-tiny")
    assert not (out / "wood-tiny-3").exists()


@pytest.mark.long
def test_a_save_goes_on_when_another_rank_dies(data, tmp_path):
    """And the restart finds its folder where torchrun was started without a name of its own for the launch."""
    said = torchrun(tmp_path, f"--master-port={free_port()}", "--max-restarts=1", "train.py", *SMALL,
                    "--max-steps", 20, "--data", data, changes=SLOW_TO_SAVE)
    assert "steps 10 to 20" in said, said
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["wood-tiny"]


@pytest.mark.long
def test_another_launch_of_the_same_name_is_another_run(data, tmp_path):
    for _ in range(2):
        torchrun(tmp_path, "--rdzv-id=book", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "train.py", *SMALL,
                 "--max-steps", 10, "--data", data)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"wood-tiny", "wood-tiny-2"}


def test_ranks_that_found_different_states_do_not_begin(trained, tmp_path):
    changes, log = """
from lib import recipe
read_state = recipe.read_state
recipe.read_state = lambda out: (state := read_state(out)) | {"step": state["step"] - 10 * rank, "sha256": str(rank)}
""", tmp_path / "log"
    flags = ["--resume", "--out", trained, "--max-steps", 70]
    assert exit_codes(fork_train(log, *flags, ranks=2, changes=changes)) == [2, 2]
    said = log.read_text()
    assert f"different states to go on from, rank by rank: step 60 of {trained}, step 50 of {trained}" in said, said


# ---------------------------------------------------------------- damage

def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flip_in_tensor(path: Path) -> None:
    norm = next(x for name, x in read_safetensors(path)[0].items() if name.endswith("model.norm.weight"))
    flip(path, 8 * (path.read_bytes().index(norm.numpy().tobytes()) + norm.nbytes // 2))


def flip_in_header(path: Path) -> None:
    flip(path, 8 * path.read_bytes().index(b"model_config"))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(("name", "damage"), [
    (STATE, flip_in_tensor), (STATE, flip_in_header), (STATE, truncate), ("model.safetensors", flip_in_tensor)])
def test_a_damaged_file_is_named(script, trained, name, damage):
    damage(trained / name)
    words = [train.main, "--resume", "--out"] if name == STATE else [sample.main, "--checkpoint"]
    refused(script(*words, trained), name, "safetensors" if damage is truncate else "damaged")


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
    resume, log = ["--resume", "--out", trained, "--max-steps"], tmp_path / "log"
    process, = fork_train(log, *resume, 1_000_000, "--eval-every", 1_000_000, "--threads", 1)
    wait_until(lambda: log.exists() and str(trained) in log.read_text())  # it has begun
    refused(script(train.main, *resume, 70), "another process")
    process.kill()
    process.join()
    assert "steps 60 to 70" in accepted(script(train.main, *resume, 70))[0]


@pytest.mark.parametrize("function", ["evaluate", "training_tensors", "write_tensors"])
def test_a_signal_in_the_midst_of_it_is_obeyed_after(script, finished, data, tmp_path, monkeypatch, function):
    monkeypatch.setattr(train, function, hooked(
        getattr(train, function), lambda n: n == 2 and os.kill(os.getpid(), signal.SIGTERM)))
    out = tmp_path / "run"
    code, _, err = script(train.main, "--data", data, "--out", out, *SMALL, *LENGTH)
    assert code == 128 + signal.SIGTERM, err
    assert 20 <= kept_step(out) < 60
    accepted(script(train.main, "--resume", "--out", out))
    assert_same_checkpoint(out, finished(*LENGTH))
