"""Training: the same losses resumed, interrupted, accumulated and spread over ranks."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_same, end_well, fork_train, make_text, random_model, refused, save_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dataloader import TokenData, evaluate
from lib import corpus, recipe
from lib.checkpoint import STATE, load_model, read_safetensors, read_state, weights_of
from lib.cli import UserError
from lib.distributed import Ranks
from lib.machine import can_compile, pick_dtype
from lib.muon import make_optimizers
from lib.recipe import TrainConfig, lr_scale
from lib.runlog import RunLog
from model import GPT, SIZES

SMALL = ["--n-layer", "2", "--n-embd", "32", "--block-size", "32", "--batch-size", "8", "--eval-every", "10",
         "--eval-tokens", "2000", "--dtype", "float32", "--device", "cpu", "--threads", "1", "--compile", "off"]
SAME = 1e-4  # a sum in another order differs in its last bits


def losses(out: Path, name: str = "train_loss") -> dict[int, float]:
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {record["step"]: record[name] for record in records if name in record}


def weights(out: Path) -> dict[str, torch.Tensor]:
    return weights_of(read_state(out)["tensors"])


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    assert losses(a, "val_loss") == losses(b, "val_loss")
    assert_same_checkpoint(a, b)


def assert_same_checkpoint(a: Path, b: Path) -> None:
    """The same model and training state, to the last bit."""
    assert_same(read_safetensors(a / "model.safetensors"), read_safetensors(b / "model.safetensors"))
    first, second = read_state(a), read_state(b)
    assert_same(dict(first.pop("tensors")), dict(second.pop("tensors")))
    assert first | {"seconds": 0, "sha256": ""} == second | {"seconds": 0, "sha256": ""}  # the clock differs


def plan(out: Path) -> dict:
    """What the run decided."""
    return json.loads((out / "run.json").read_text())["plan"]


def flags_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["flags"]


@pytest.fixture
def run(script, data):
    def run(out: Path, *flags: object) -> Path:
        shape = SMALL[:4] if "--init-from" not in flags else []
        code, _, err = script(train.main, "--data", data, "--out", out, *shape, *SMALL[4:], *flags)
        assert code == 0, err
        return out

    return run


def test_training_learns_and_leaves_what_it_promises(run, tmp_path):
    out = run(tmp_path / "run", "--max-steps", 60)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "run.json", "train_state.safetensors", ".lock",
                     "log.jsonl", "loss.png", "runs"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "runs").iterdir())
    assert losses(out)[10] > 3 and losses(out)[60] < 2.7
    assert set(losses(out, "val_loss")) == {10, 20, 30, 40, 50, 60}
    assert load_model(out).config.n_embd == 32


def test_log_agrees_with_the_saved_model(run, data, tmp_path):
    out = run(tmp_path / "run", "--max-steps", 20)
    loss = evaluate(load_model(out), TokenData(data, 32), 2000)
    assert losses(out, "val_loss")[20] == pytest.approx(loss, rel=1e-6)


COMPILED = pytest.param(["--compile", "on", "--dtype", "bfloat16"], id="compiled", marks=[
    pytest.mark.long, pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")])


@pytest.mark.parametrize("flags", [pytest.param([], id="plain"), COMPILED,
                                   pytest.param(["--dropout", "0.1", "--no-qk-norm"], id="dropout")])
def test_resumed_equals_uninterrupted(run, script, tmp_path, flags):
    whole = run(tmp_path / "whole", "--max-steps", 40, *flags)
    code, _, err = script(stop_at(15), "--data", data_of(whole), "--out", tmp_path / "parts", *SMALL,
                          "--max-steps", 40, *flags)
    assert code == 128 + signal.SIGTERM, err
    assert read_state(tmp_path / "parts")["step"] == 15
    code, out, err = script(stop_at(10), "--resume", "--out", tmp_path / "parts", "--threads", "1")
    assert code == 128 + signal.SIGTERM and "steps 15 to 40" in out, err
    with (tmp_path / "parts" / "log.jsonl").open("a") as log:
        log.write('{"step": 3')  # as a killed process leaves it
    code, out, err = script(train.main, *SMALL, "--resume", "--out", tmp_path / "parts", "--max-steps", 40, *flags)
    assert code == 0 and "steps 25 to 40" in out, err
    assert set(losses(tmp_path / "parts")) - set(losses(whole)) == {15, 25}  # the interruptions' own lines
    assert losses(whole, "val_loss") == losses(tmp_path / "parts", "val_loss")
    first, second = weights(whole), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def data_of(out: Path) -> str:
    return plan(out)["data"]


def stop_at(step: int):
    """train.main, which gets a SIGTERM while it works on this step."""

    def main() -> None:
        update, seen = train.update, []

        def spy(*args: object) -> None:
            update(*args)
            seen.append(1)
            if len(seen) == step:
                signal.raise_signal(signal.SIGTERM)

        train.update = spy
        try:
            train.main()
        finally:
            train.update = update

    return main


def test_killed_run_resumes_from_its_last_checkpoint(run, data, tmp_path):
    whole = run(tmp_path / "whole", "--max-steps", 40)
    out = tmp_path / "killed"
    process, = fork_train(tmp_path / "log", "--data", data, "--out", out, *SMALL, "--max-steps", 40)
    until = time.monotonic() + 60
    while not (out / STATE).exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.kill()
    process.join()
    end_well(fork_train(tmp_path / "log", "--resume", "--out", out), tmp_path / "log")
    assert_same_run(whole, out)


def test_tensorboard_shows_the_steps_before_a_resume_once(tmp_path, monkeypatch):
    now = time.time()
    for first, value in ((0, 3.0), (2, 2.0)):
        monkeypatch.setattr(time, "time", lambda: now + first)  # noqa: B023 (files of one second have no sure order)
        log = RunLog(tmp_path, first, 1.0, 1.0, "")
        for step in range(first + 1, first + 4):
            log.add(step=step, train_loss=value)
        log.close()
    events = EventAccumulator(str(tmp_path / "runs")).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in events] == [*losses(tmp_path).items()]
    assert losses(tmp_path) == {1: 3, 2: 3, 3: 2, 4: 2, 5: 2}


def test_accumulated_parts_make_the_same_step(run, tmp_path):
    whole = run(tmp_path / "whole", "--max-steps", 20)
    parts = run(tmp_path / "parts", "--max-steps", 20, "--grad-accum", 4)
    assert losses(parts) == pytest.approx(losses(whole), abs=SAME)


# not gate and up, not DDP's buckets
SOME_IN_SHARED_MEMORY = "from lib import distributed; distributed.SharedMemory.VALUES = 5000"


@pytest.mark.parametrize(("flags", "changes"), [
    ([], ""), (["--grad-accum", "2"], ""), (["--grad-accum", "2"], "import os; del os.environ['GROUP_WORLD_SIZE']"),
    ([], SOME_IN_SHARED_MEMORY), (["--parallel", "fsdp", "--grad-accum", "2"], "")],
    ids=["ddp", "accumulated", "sockets", "both", "fsdp"])
def test_two_ranks_give_the_losses_of_one(run, data, tmp_path, flags, changes):
    one = run(tmp_path / "one", "--max-steps", 20)
    two = tmp_path / "two"
    log = tmp_path / "log"
    end_well(fork_train(log, "--data", data, "--out", two, *SMALL, "--max-steps", 20, *flags, ranks=2,
                        changes=changes), log)
    assert losses(two) == pytest.approx(losses(one), abs=SAME)
    assert losses(two, "val_loss") == pytest.approx(losses(one, "val_loss"), abs=SAME)
    first, second = weights(one), weights(two)
    assert all(torch.allclose(first[name], second[name], atol=SAME) for name in first)


def test_where_one_rank_cannot_compile_all_go_on_without(data, tmp_path):
    flags, log = [*SMALL[:-1], "on", "--max-steps", 20, "--data", data, "--out", tmp_path / "two"], tmp_path / "log"
    changes = "from lib import machine; found = machine.cxx; machine.cxx = lambda: '/bin/false' if rank else found()"
    said = end_well(fork_train(log, *flags, ranks=2, changes=changes), log)
    assert said.count("torch.compile failed") == 1 and "step 20/20" in said


def test_fsdp_in_bfloat16_learns_like_ddp(data, tmp_path):
    flags, log = ["--data", data, *SMALL, "--max-steps", 20, "--dtype", "bfloat16"], tmp_path / "log"
    for parallel in ("ddp", "fsdp"):
        end_well(fork_train(log, "--out", tmp_path / parallel, "--parallel", parallel, *flags, ranks=2), log)
    ddp, fsdp = (losses(tmp_path / parallel) for parallel in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, abs=0.02)


def test_one_process_goes_on_where_fsdp_stopped_and_fsdp_where_one_did(run, tmp_path):
    whole, out = run(tmp_path / "whole", "--max-steps", 30, "--warmdown", 0), tmp_path / "parts"
    run(out, "--max-steps", 10, "--warmdown", 0)
    log = tmp_path / "log"
    end_well(fork_train(log, "--resume", "--out", out, "--parallel", "fsdp", "--max-steps", 20, ranks=2), log)
    run(out, "--resume", "--max-steps", 30, "--parallel", "ddp", "--warmdown", 0)
    assert losses(out) == pytest.approx(losses(whole), abs=SAME)
    first, second = weights(whole), weights(out)
    assert all(torch.allclose(first[name], second[name], atol=SAME) for name in first)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_ranks_end_a_run_of_minutes_together(data, tmp_path, parallel):
    out, log = tmp_path / "two", tmp_path / "log"
    end_well(fork_train(log, "--data", data, "--out", out, *SMALL, "--max-minutes", 0.05, "--parallel", parallel,
                        ranks=2), log)
    assert max(losses(out, "val_loss")) == read_state(out)["step"] < plan(out)["max_steps"]
    assert (parallel == "fsdp") == (not losses(out, "sample"))


def test_a_stop_under_torchrun_saves_and_resumes(run, data, tmp_path):
    whole, out = run(tmp_path / "whole", "--max-steps", 60), tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    flags = [*SMALL, "--max-steps", "1000000", "--eval-every", "1000000"]
    process = subprocess.Popen([*torchrun, "--data", data, "--out", out, *flags],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not ((out / "log.jsonl").exists() and losses(out)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not (out / STATE).exists()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=25)  # torchrun kills after 30 seconds
    step = read_state(out)["step"]
    assert step % 10 == 0 and 10 <= step < 1_000_000
    last = str(step + 10)
    log = tmp_path / "log"
    end_well(fork_train(log, "--resume", "--out", out, "--max-steps", last, ranks=2), log)
    assert read_state(out)["step"] == int(last)
    assert losses(out)[10] == pytest.approx(losses(whole)[10], abs=SAME)


def test_a_busy_core_changes_no_weight(data, tmp_path):
    """Two threads, which a third process delays; no flag names what a run decides."""
    flags, log = [*SMALL[:-8], "--threads", 2, "--max-steps", 20, "--data", data], tmp_path / "log"
    assert "--dtype" not in flags
    end_well(fork_train(log, *flags, "--out", tmp_path / "quiet"), log)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        end_well(fork_train(log, *flags, "--out", tmp_path / "busy"), log)
    finally:
        busy.kill()
        busy.wait()
    assert_same_run(tmp_path / "quiet", tmp_path / "busy")
    assert plan(tmp_path / "quiet") | {"out": ""} == plan(tmp_path / "busy") | {"out": ""}


def test_every_world_sees_the_same_batches(data):
    def seen(world: int) -> list[list[int]]:
        share = 12 // world
        steps = [[d.batch(step * 12 + rank * share, share, 1)[0][0] for rank in range(world)] for step in range(50)]
        return [torch.cat(step).tolist() for step in steps]

    d = TokenData(data, 32, seed=3)
    assert seen(1) == seen(2) == seen(4)


def test_an_epoch_covers_the_text_once_and_epochs_differ(data):
    d = TokenData(data, 32, seed=3)
    per_epoch = (d.tokens["train"] - 32) // 32
    epochs = [[int(d.training_start(e * per_epoch + i)) for i in range(per_epoch)] for e in range(3)]
    for starts in epochs:
        assert len({start // 32 for start in starts}) == per_epoch
        assert set(np.diff(sorted(starts))) == {32}
        assert min(starts) >= 0 and max(starts) + 33 <= d.tokens["train"]
    assert epochs[0] != epochs[1] != epochs[2]
    assert [int(d.training_start(i)) for i in range(per_epoch)] == epochs[0]  # going back is no different


def test_targets_are_the_next_tokens(data):
    x, y = TokenData(data, 32).batch(0, 4, 1)[0]
    assert x.shape == y.shape == (4, 32)
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_validation_covers_the_text_or_spreads(data):
    d = TokenData(data, 32)
    every, some = d.validation_starts(), d.validation_starts(320)
    assert every.tolist() == list(range(0, d.tokens["val"] - 32, 32))
    assert len(some) == 10 and some[0] == 0 and some[-1] == every[-1] and set(some) <= set(every)


def test_tokens_are_those_that_meta_json_describes(data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "data", copy_function=shutil.copyfile))  # other times, same bytes
    assert torch.equal(TokenData(copy, 32).batch(0, 4, 1)[0][0], TokenData(data, 32).batch(0, 4, 1)[0][0])
    tokens = bytearray((copy / "val.bin").read_bytes())
    tokens[100] ^= 1
    (copy / "val.bin").write_bytes(tokens)
    with pytest.raises(UserError, match=r"val\.bin: expected the tokens that meta\.json describes, got others"):
        TokenData(copy, 32)


def test_a_file_cut_off_under_a_run_is_named(data, tmp_path):
    """Whatever memory held would be tokens else."""
    copy = Path(shutil.copytree(data, tmp_path / "data"))
    texts = TokenData(copy, 32)
    os.truncate(copy / "train.bin", texts.tokens["train"])  # half of its bytes
    with pytest.raises(UserError, match=r"train\.bin: ends before token"):
        for index in range(texts.tokens["train"] // 32):
            texts.batch(index, 1, 1)


def test_schedule_is_a_trapezoid():
    config = TrainConfig(max_steps=100, warmup_steps=10, warmdown=0.4)
    scales = [lr_scale(step / 100, step, config) for step in range(100)]
    assert scales[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert scales[10:60] == [1.0] * 50
    assert scales[60:] == pytest.approx([1 - i / 40 for i in range(40)])


def test_optimizers_share_out_every_parameter_once(tiny):
    muon, adam = make_optimizers(tiny, 0.02, torch.float32)
    ours = [id(p) for optimizer in (muon, adam) for p in optimizer.params]
    assert sorted(ours) == sorted(id(p) for p in tiny.parameters())
    assert id(tiny.lm_head.weight) in {id(p) for p in adam.params}
    assert all(p.dim() == 2 for p in muon.params)


@pytest.mark.parametrize(("name", "has", "chosen"), [
    ("auto", {"avx512_bf16": True, "amx_bf16": False}, "bfloat16"), ("auto", {"amx_bf16": True}, "bfloat16"),
    ("auto", {"avx512_bf16": False}, "float32"), ("bfloat16", {}, "bfloat16"),
    ("float32", {"amx_bf16": True}, "float32")])
def test_the_dtype_follows_from_the_kind_of_cpu(monkeypatch, name, has, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert pick_dtype(name, torch.device("cpu")) == getattr(torch, chosen)


def test_a_resume_keeps_the_dtype_of_its_run(script, data, tmp_path, monkeypatch):
    """The other machine may have other hardware."""
    flags = ["--data", data, "--out", tmp_path / "run", *SMALL, "--dtype", "auto", "--max-steps", 10]
    for has, more in ((True, flags), (False, ["--resume", "--out", tmp_path / "run", "--max-steps", 20])):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        code, out, err = script(train.main, *more)
        assert code == 0 and ", bfloat16, " in out and plan(tmp_path / "run")["dtype"] == "bfloat16", err


def test_fine_tuning_starts_from_the_given_weights(run, script, data, tmp_path):
    base = run(tmp_path / "base", "--max-steps", 40)
    tuned = run(tmp_path / "tuned", "--max-steps", 10, "--init-from", base, "--muon-lr", "1e-4", "--adam-lr", "1e-4")
    assert losses(tuned)[10] < losses(base)[10] - 1
    assert load_model(tuned).config == load_model(base).config


def test_a_fine_tuned_model_has_the_name_of_its_source(script, tiny, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tiny, tmp_path / "published")
    code, out, err = script(train.main, "--data", data, "--init-from", "published", *SMALL[4:], "--max-steps", 1)
    assert code == 0, err
    assert "out/wood-published: fine-tuning published, " in out and "tiny" not in out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["wood-published"]


def test_fine_tuning_goes_twice_through_a_text_of_its_own(script, tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tiny, tmp_path / "out" / "owl")
    corpus.train_tokenizer([], 256).save(str(tmp_path / "out" / "owl" / "tokenizer.json"))
    tune = [train.main, "--init-from", "out/owl", "--data", text_file, "--eval-tokens", 2000, "--threads", 1]
    code, _, err = script(*tune)
    assert code == 0, err
    assert "--block-size 512: going on with 32" in err
    run = tmp_path / "out" / "wood-owl"
    steps = plan(run)["max_steps"]
    tokens = json.loads((tmp_path / "data" / "wood-owl" / "meta.json").read_text())["train"]["tokens"]
    assert steps == math.ceil(2 * tokens / (4 * 32)) and flags_of(run)["muon_lr"] == 0
    assert flags_of(run)["grad_accum"] is None  # another number of ranks may go on
    assert list(losses(run, "val_loss")) == [0, 250, 500, steps]
    assert losses(run)[steps] < losses(run, "val_loss")[0] - 1
    prepared = (tmp_path / "data" / "wood-owl" / "meta.json").stat().st_mtime_ns
    assert script(*tune, "--max-steps", 1, "--block-size", 16)[0] == 0  # the text is prepared already
    assert (tmp_path / "data" / "wood-owl" / "meta.json").stat().st_mtime_ns == prepared
    again = [train.main, "--resume", "--out", run, "--max-steps", steps + 1]
    code, _, err = script(*again, "--init-from", "out/owl", "--block-size", 512, "--data", text_file)  # as torchrun
    assert code == 0, err
    code, _, err = script(*again, "--muon-lr", 0.01)
    assert code == 2 and "muon_lr is 0" in err
    os.utime(tmp_path / "data" / "wood-owl" / "meta.json", (0, 0))
    code, _, err = script(*tune)
    assert code == 2 and "data/wood-owl holds tokens of another text, an older one" in err


def test_fine_tuning_on_a_short_text(script, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(tiny, tmp_path / "owl")
    corpus.train_tokenizer([], 256).save(str(tmp_path / "owl" / "tokenizer.json"))
    (tmp_path / "note.txt").write_text("Owl sees Fox at ten. " * 10)
    code, out, err = script(train.main, "--init-from", "owl", "--data", "note.txt", "--threads", 1)
    assert code == 0 and "going on with 20" in err and "steps 0 to 5 (2.1 passes) of 80 tokens" in out, (out, err)


def test_fine_tuning_takes_data_of_its_own_tokenizer(script, data, text_file, tmp_path, monkeypatch):
    """Another tokenizer's tokens mean nothing to the model, even where it knows as many."""
    monkeypatch.chdir(tmp_path)
    save_model(random_model(vocab_size=300), tmp_path / "owl")
    corpus.train_tokenizer([make_text(2000)], 300).save(str(tmp_path / "owl" / "tokenizer.json"))
    tune = [train.main, "--init-from", "owl", "--max-steps", 1, "--eval-tokens", 500, "--threads", 1]
    advice = "`python data/prepare.py --input FILE --tokenizer owl`"
    refused(script(*tune), "data/", advice)  # none at all
    shutil.copytree(data, tmp_path / "data" / "bytes")
    refused(script(*tune), "data/bytes", "owl's tokenizer", advice)
    refused(script(*tune, "--data", "data/bytes"), "data/bytes", "owl's tokenizer", advice)
    assert not (tmp_path / "out").exists()
    ours = corpus.prepare(corpus.PrepareConfig(input=(text_file,), out=Path("data/ours"), tokenizer=Path("owl")))
    tokenizer = ours / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text())))  # the same, otherwise written
    os.utime(ours / "meta.json", (0, 0))  # older than the bytes
    for more in ([], ["--data", ours]):
        code, out, err = script(*tune, *more)
        assert code == 0 and "fine-tuning owl" in out and "ours (" in out, err
    assert [plan(tmp_path / "out" / name)["data"] for name in ("ours-owl", "ours-owl-2")] == [str(ours.resolve())] * 2


def test_a_text_instead_of_a_folder(script, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [*SMALL, "--max-steps", 1]
    assert script(train.main, "--data", text_file, *quick)[0] == 0
    assert (tmp_path / "out" / "wood-tiny" / "model.safetensors").exists()
    other = tmp_path / "other" / "wood.txt"
    other.parent.mkdir()
    other.write_text(make_text(100))
    code, _, err = script(train.main, "--data", other, *quick)
    assert code == 2 and "data/wood holds tokens of another text" in err
    (tmp_path / "zeros.txt").write_bytes(b"\0" * 100)
    refused(script(train.main, "--data", tmp_path / "zeros.txt", *quick), "zeros.txt", "a zero byte at 0")
    assert not (tmp_path / "data" / "zeros").exists()
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["wood-tiny"]


def test_the_first_estimate_does_not_count_compilation(script, data, tmp_path, monkeypatch):
    update, steps = train.update, []

    def compiling(*args: object) -> None:
        update(*args)
        steps.append(1)
        time.sleep(5 * (len(steps) == 1))

    monkeypatch.setattr(train, "update", compiling)
    code, out, _ = script(train.main, "--data", data, "--out", tmp_path / "run", *SMALL, "--max-steps", 50)
    first = next(line for line in out.splitlines() if line.startswith("step 10/50"))
    assert code == 0 and float(re.search(r", ([\d.]+)s left$", first)[1]) < 10, out  # 25 s more, had it been counted


@pytest.fixture
def clock(monkeypatch):
    """A clock that training steps alone move: clock[0] seconds, clock[1] more with each step."""
    now, step = [0.0, 1.0], train.Run.train_step

    def timed_step(self) -> None:
        now[0] += now[1]
        step(self)

    monkeypatch.setattr(train.Run, "train_step", timed_step)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def seconds(text: str) -> int:
    """Of "1m05"."""
    minutes, _, rest = text.rpartition("m")
    return 60 * int(minutes or 0) + int(rest)


def test_a_run_of_minutes_ends_with_them(script, data, tmp_path, clock, monkeypatch):
    out = tmp_path / "run"
    code, said, err = script(train.main, "--data", data, "--out", out, *SMALL, "--max-minutes", 2)
    assert code == 0 and "2 minutes, at most steps 0 to 1056 (8.0 passes) of 256 tokens" in said, err
    assert 110 <= clock[0] <= 121 and read_state(out)["step"] in losses(out, "val_loss")
    scales = losses(out, "lr_scale")
    assert scales[30] == 1 and scales[100] < 0.4 and min(scales.values()) < 0.1
    left = {int(step): seconds(of) for step, of in
            re.findall(r"step (\d+) \(.*%\).* ([\dm]+)s left", said)}
    assert max(abs(step + rest - 120) for step, rest in left.items()) < 5 and len(left) > 10, left
    code, said, err = script(train.main, "--resume", "--out", out, "--max-minutes", 3, "--threads", 1)
    assert code == 0 and 170 <= clock[0] <= 181, said + err
    done = read_state(out)["step"]
    code, _, err = script(train.main, "--resume", "--out", out, "--max-steps", done + 20, "--threads", 1)
    assert code == 0 and flags_of(out)["max_minutes"] is None, err
    assert read_state(out)["step"] == done + 20


def test_a_run_of_minutes_reads_a_short_text_no_more_often_than_another(script, data, tmp_path, clock):
    out, length = tmp_path / "run", ["--max-minutes", 60, "--batch-size", 64]
    code, out_, err = script(train.main, "--data", data, "--out", out, *SMALL, *length)
    steps = math.ceil(8 * TokenData(data, 32).tokens["train"] / (64 * 32))
    assert code == 0 and clock[0] < 1000 and f"60 minutes, at most steps 0 to {steps} (8.0 passes)" in out_, err
    assert read_state(out)["step"] == steps == max(losses(out, "val_loss"))
    assert min(losses(out, "lr_scale").values()) < 0.1


def test_a_run_whose_minutes_are_over_is_done(script, data, tmp_path, clock, monkeypatch):
    """Also where its last evaluation was quicker than the one before."""
    seconds = iter([20, 20, 1, 1])

    def quicker(*args: object) -> float:
        clock[0] += next(seconds)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", quicker)
    flags = ["--data", data, "--out", tmp_path / "run", *SMALL, "--eval-every", 40, "--max-minutes", 2]
    code, _, err = script(train.main, *flags)
    assert code == 0 and clock[0] < 122, err
    code, said, err = script(train.main, "--resume", "--out", tmp_path / "run")
    assert code == 0 and "steps already; raise --max-minutes" in said, said + err


def test_a_fine_tuning_of_less_time_than_its_first_evaluation_leaves_a_model(run, script, data, tmp_path, clock):
    base = run(tmp_path / "base", "--max-steps", 10)
    clock[1] = 60.0
    tuned = run(tmp_path / "tuned", "--init-from", base, "--max-minutes", 0.01)
    assert load_model(tuned) and read_state(tuned)["step"] == 1 and min(losses(tuned, "lr_scale").values()) >= 0


def test_what_a_resume_is_given_counts(run, script, data, tmp_path):
    base = run(tmp_path / "base", "--max-steps", 10)
    tuned = run(tmp_path / "tuned", "--init-from", base, "--block-size", 16, "--muon-lr", 0, "--max-minutes", 0.01)
    resume = [train.main, "--resume", "--out", tuned, "--max-steps", 40]
    refused(script(*resume, "--block-size", 32), "block_size is 16")
    refused(script(*resume, "--weight-decay", 0.5), "weight-decay", "no effect")
    run_file = json.loads((tuned / "run.json").read_text())
    run_file["plan"]["data"] = str(tmp_path / "gone")
    (tuned / "run.json").write_text(json.dumps(run_file))
    code, _, err = script(train.main, "--resume", "--out", tuned, "--data", data, "--max-minutes", 0.02)
    assert code == 0, err
    code, out, _ = script(train.main, "--resume", "--out", "nowhere", "--help")
    assert code == 0 and "--max-minutes" in out


def test_a_slower_machine_ends_a_run_of_minutes_in_time(script, data, tmp_path, clock, monkeypatch):
    def slower(*args: object) -> float:
        clock[1] = 2.0  # from the first evaluation on
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slower)
    code, _, err = script(train.main, "--data", data, "--out", tmp_path / "run", *SMALL, "--max-minutes", 3)
    assert code == 0 and 165 <= clock[0] <= 185, (clock, err)


def test_time_left_counts_evaluations(script, data, tmp_path, clock, monkeypatch):
    def slow(*args: object) -> float:
        clock[0] += 7
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", slow)
    code, said, err = script(train.main, "--data", data, "--out", tmp_path / "run", *SMALL, "--max-steps", 45)
    assert code == 0, err
    left = {int(step): seconds(of) for step, of in
            re.findall(r"step (\d+)/45.* ([\dm]+)s left", said)}
    assert left == {10: 35 + 28, 20: 25 + 21, 30: 15 + 14, 40: 5 + 7, 45: 0}


def test_over_fitting_is_said_and_the_best_model_kept(script, data, tmp_path, monkeypatch):
    found = iter([3.0, 2.0, 2.5, 2.7])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(found))
    code, said, err = script(train.main, "--data", data, "--out", tmp_path / "run", *SMALL, "--max-steps", 40)
    assert code == 0 and "the validation loss rises while the training loss falls" in err and "(no better)" in said
    assert err.count("the validation loss rises") == 1 and "best validation 2.0000 nats" in said


def test_each_evaluation_shows_what_the_model_writes(run, tmp_path):
    out = run(tmp_path / "run", "--max-steps", 120, "--eval-every", 40)
    samples = losses(out, "sample")
    assert set(samples) == {40, 80, 120} and len(set(samples.values())) > 1
    assert {"Owl", "Fox", "Wren", "Mole", "Hare", "sees", "likes", "hears", "follows", "at"} & set(samples[120].split())


def test_best_model_is_kept_when_later_ones_are_worse(run, tmp_path):
    out = run(tmp_path / "run", "--max-steps", 30, "--weight-decay", 0, "--warmdown", 0)
    best = min(losses(out, "val_loss"), key=losses(out, "val_loss").get)
    good = read_safetensors(out / "model.safetensors")
    run(out, "--resume", "--max-steps", 40, "--muon-lr", 1, "--adam-lr", 1)
    assert losses(out, "val_loss")[40] > losses(out, "val_loss")[best]
    assert_same(read_safetensors(out / "model.safetensors"), good)


@pytest.mark.parametrize("every", [1, 30])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(run, script, tmp_path, every):
    out = run(tmp_path / "run", "--max-steps", 20)
    code, _, err = script(train.main, "--resume", "--out", out, "--max-steps", 60, "--grad-clip", 0,
                          "--adam-lr", 1e30, "--eval-every", every)
    refused((code, "", err), "loss is nan")
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    assert all(tensor.isfinite().all() for tensor in load_model(out).state_dict().values())


def test_a_short_text_is_not_read_too_often(script, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = ["--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--block-size", 16, "--batch-size", 512]
    code, said, err = script(train.main, "small", "--data", text_file, *shape, "--eval-tokens", 99, "--threads", 1)
    tokens = json.loads(Path("data/wood/meta.json").read_text())["train"]["tokens"]
    steps = math.ceil(8 * tokens / (512 * 16))
    assert code == 0 and f"steps 0 to {steps} (8.0 passes)" in said, (said, err)
    assert len(losses(Path("out/wood-small"), "val_loss")) == math.ceil(steps / math.ceil(steps / 8))


@pytest.mark.parametrize(("tokens", "passes", "dropout"), [
    (10**6, 8, 0.0), (10**5, 8, 0.1), (10**4, 8, 0.2), (10**4, 1.9, 0.0)])
def test_dropout_follows_from_the_length_of_the_text_and_of_the_run(tokens, passes, dropout):
    assert recipe.pick_dropout(900_000, tokens, passes) == dropout


@pytest.mark.parametrize(("length", "dropout"), [
    (["--max-steps", 4], 0.0), (["--max-steps", 5], 0.1), (["--max-minutes", 0.02], 0.1),
    (["--max-steps", 5, "--dropout", 0], 0.0)])
def test_a_run_has_the_dropout_of_its_length(run, tmp_path, length, dropout):
    """The model has 5 parameters for each token of the text, of which a step reads 0.4 to 0.5."""
    out = run(tmp_path / "run", "--n-layer", 4, "--n-embd", 64, "--batch-size", 128, "--block-size", 128, *length)
    config = read_state(out)["model_config"]
    tokens = TokenData(Path(plan(out)["data"]), 128).tokens["train"]
    assert 2 * tokens < load_model(out).num_params() < 20 * tokens and 4 * 128 * 128 < 2 * tokens < 5 * 128 * 128
    assert plan(out)["dropout"] == config.dropout == dropout


def test_new_runs_get_new_folders(script, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        code, _, err = script(train.main, "--data", data, *SMALL, "--max-steps", 1)
        assert code == 0, err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["wood-tiny", "wood-tiny-2"]


def test_sizes_are_those_promised():
    counts = {}
    for name in SIZES:
        with torch.device("meta"):
            counts[name] = GPT(recipe.shape(recipe.defaults(name), {"vocab_size": 256})).num_params() / 1e6
    assert counts == pytest.approx({"tiny": 0.9, "small": 10.8, "base": 26.0, "medium": 85.3}, abs=0.1)


def test_ranks_use_no_cuda_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: pytest.fail("cuda was touched"))
    ranks = Ranks("cpu", threads=1)
    assert ranks.device == torch.device("cpu") and ranks.world == 1 and ranks.sum(2.0, 3.0) == [2.0, 3.0]


def test_a_gpu_alone_is_the_first(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", chosen.append, raising=False)
    for name in ("auto", "cuda", "cuda:1"):
        Ranks(name, threads=torch.get_num_threads())
    assert chosen == [0, 0, 1]
