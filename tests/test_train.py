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
from conftest import (
    ROOT,
    SAME,
    SMALL,
    accepted,
    assert_near_run,
    assert_same,
    assert_same_run,
    end_well,
    fork_train,
    hooked,
    losses,
    make_text,
    random_model,
    refused,
    save_model,
    wait_until,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dataloader import TokenData, evaluate, read_meta
from lib import corpus, recipe
from lib.checkpoint import STATE, load_model, read_safetensors, read_state
from lib.cli import UserError
from lib.distributed import Ranks
from lib.machine import can_compile, pick_dtype
from lib.muon import make_optimizers
from lib.recipe import TrainConfig, lr_scale
from lib.runlog import RunLog
from model import GPT, SIZES


def plan(out: Path) -> dict:
    """What the run decided."""
    return json.loads((out / "run.json").read_text())["plan"]


def flags_of(out: Path) -> dict:
    return json.loads((out / "run.json").read_text())["flags"]


@pytest.fixture
def run(script, data):
    def run(out: Path, *flags: object) -> Path:
        shape = SMALL[:4] if "--init-from" not in flags else []
        accepted(script(train.main, "--data", data, "--out", out, *shape, *SMALL[4:], *flags))
        return out

    return run


def test_training_learns_and_leaves_what_it_promises(finished, data):
    out = finished("--max-steps", 60)
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "run.json", "train_state.safetensors", ".lock",
                     "log.jsonl", "loss.png", "runs"}
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "runs").iterdir())
    assert losses(out)[10] > 3 and losses(out)[60] < 2.7
    assert set(losses(out, "val_loss")) == {10, 20, 30, 40, 50, 60}
    assert load_model(out).config.n_embd == 32
    samples = losses(out, "sample")
    assert set(samples) == {10, 20, 30, 40, 50, 60} and len(set(samples.values())) > 1
    assert {"Owl", "Fox", "Wren", "Mole", "Hare", "sees", "likes", "hears", "follows", "at"} & set(samples[60].split())
    loss = evaluate(load_model(out), TokenData(data, 32), 2000)
    assert losses(out, "val_loss")[60] == pytest.approx(loss, rel=1e-6)


COMPILED = pytest.param(["--compile", "on", "--dtype", "bfloat16"], id="compiled", marks=[
    pytest.mark.long, pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")])


@pytest.mark.parametrize("flags", [pytest.param([], id="plain"), COMPILED,
                                   pytest.param(["--dropout", "0.1", "--no-qk-norm"], id="dropout")])
def test_resumed_equals_uninterrupted(finished, script, data, tmp_path, monkeypatch, flags):
    def stopped(step: int, *words: object) -> tuple[int, str, str]:
        """train.py, which gets a SIGTERM in its step-th step."""
        with monkeypatch.context() as patch:
            patch.setattr(train, "update",
                          hooked(train.update, lambda n: n == step and signal.raise_signal(signal.SIGTERM)))
            return script(train.main, "--out", out, *words)

    whole, out = finished("--max-steps", 40, *flags), tmp_path / "parts"
    code, _, err = stopped(15, "--data", data, *SMALL, "--max-steps", 40, *flags)
    assert code == 128 + signal.SIGTERM and read_state(out)["step"] == 15, err
    code, said, err = stopped(10, "--resume", "--threads", "1")
    assert code == 128 + signal.SIGTERM and "steps 15 to 40" in said, err
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 3')  # as a killed process leaves it
    said, _ = accepted(script(train.main, *SMALL, "--resume", "--out", out, "--max-steps", 40, *flags))
    assert "steps 25 to 40" in said
    assert set(losses(out)) - set(losses(whole)) == {15, 25}  # the interruptions' own lines
    assert losses(whole, "val_loss") == losses(out, "val_loss")
    assert_same(weights(whole), weights(out))
    assert read_state(out)["model_config"].dropout == plan(out)["dropout"] == (0.1 if "--dropout" in flags else 0)


def test_tensorboard_shows_the_steps_before_a_resume_once(tmp_path, monkeypatch):
    now = time.time()
    for first, value in ((0, 3.0), (2, 2.0)):
        monkeypatch.setattr(time, "time", lambda first=first: now + first)  # files of one second have no sure order
        log = RunLog(tmp_path, first, 1.0, 1.0, "")
        for step in range(first + 1, first + 4):
            log.add(step=step, train_loss=value)
        log.close()
    events = EventAccumulator(str(tmp_path / "runs")).Reload().Scalars("train_loss")
    assert [(event.step, event.value) for event in events] == [*losses(tmp_path).items()]
    assert losses(tmp_path) == {1: 3, 2: 3, 3: 2, 4: 2, 5: 2}


# not gate and up, not DDP's buckets
SOME_IN_SHARED_MEMORY = "from lib import distributed; distributed.SharedMemory.VALUES = 5000"


@pytest.mark.parametrize(("ranks", "flags", "changes"), [
    (1, ["--grad-accum", "4"], ""), (2, [], ""), (2, ["--grad-accum", "2"], ""),
    (2, ["--grad-accum", "2"], "import os; del os.environ['GROUP_WORLD_SIZE']"), (2, [], SOME_IN_SHARED_MEMORY),
    (2, ["--parallel", "fsdp", "--grad-accum", "2"], "")],
    ids=["one-accumulated", "ddp", "accumulated", "sockets", "both", "fsdp"])
def test_ranks_and_parts_make_the_steps_of_one_whole(finished, data, tmp_path, ranks, flags, changes):
    parts, log = tmp_path / "parts", tmp_path / "log"
    end_well(fork_train(log, "--data", data, "--out", parts, *SMALL, "--max-steps", 20, *flags, ranks=ranks,
                        changes=changes), log)
    assert_near_run(parts, finished("--max-steps", 20))


def test_where_one_rank_cannot_compile_all_go_on_without(data, tmp_path):
    flags, log = [*SMALL[:-1], "on", "--max-steps", 10, "--data", data, "--out", tmp_path / "two"], tmp_path / "log"
    changes = "from lib import machine; found = machine.cxx; machine.cxx = lambda: '/bin/false' if rank else found()"
    said = end_well(fork_train(log, *flags, ranks=2, changes=changes), log)
    assert said.count("torch.compile failed") == 1 and "step 10/10" in said


def test_fsdp_in_bfloat16_learns_like_ddp(data, tmp_path):
    flags, log = ["--data", data, *SMALL, "--max-steps", 20, "--dtype", "bfloat16"], tmp_path / "log"
    for parallel in ("ddp", "fsdp"):
        end_well(fork_train(log, "--out", tmp_path / parallel, "--parallel", parallel, *flags, ranks=2), log)
    ddp, fsdp = (losses(tmp_path / parallel) for parallel in ("ddp", "fsdp"))
    assert fsdp == pytest.approx(ddp, abs=0.02)


def test_one_process_goes_on_where_fsdp_stopped_and_fsdp_where_one_did(run, finished, tmp_path):
    out, log = run(tmp_path / "parts", "--max-steps", 10, "--warmdown", 0), tmp_path / "log"
    end_well(fork_train(log, "--resume", "--out", out, "--parallel", "fsdp", "--max-steps", 20, ranks=2), log)
    run(out, "--resume", "--max-steps", 30, "--parallel", "ddp", "--warmdown", 0)
    assert_near_run(out, finished("--max-steps", 30, "--warmdown", 0))


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_two_ranks_end_a_run_of_minutes_together(data, tmp_path, parallel):
    out, log = tmp_path / "two", tmp_path / "log"
    end_well(fork_train(log, "--data", data, "--out", out, *SMALL, "--max-minutes", 0.05, "--parallel", parallel,
                        ranks=2), log)
    assert max(losses(out, "val_loss")) == read_state(out)["step"] < plan(out)["max_steps"]
    assert (parallel == "fsdp") == (not losses(out, "sample"))


def test_a_stop_under_torchrun_saves_and_resumes(finished, data, tmp_path):
    out, log = tmp_path / "two", tmp_path / "log"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    flags = [*SMALL, "--max-steps", "1000000", "--eval-every", "1000000"]
    process = subprocess.Popen([*torchrun, "--data", data, "--out", out, *flags],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: (out / "log.jsonl").exists() and losses(out))
    assert not (out / STATE).exists()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=25)  # torchrun kills after 30 seconds
    step = read_state(out)["step"]
    assert step % 10 == 0 and 10 <= step < 1_000_000
    end_well(fork_train(log, "--resume", "--out", out, "--max-steps", step + 10, ranks=2), log)
    assert read_state(out)["step"] == step + 10
    assert losses(out)[10] == pytest.approx(losses(finished("--max-steps", 40))[10], abs=SAME)


def test_a_busy_core_changes_no_weight(data, tmp_path):
    """Two threads, which a third process delays; no flag names what a run decides."""
    flags, log = [*SMALL[:-8], "--threads", 2, "--max-steps", 10, "--data", data], tmp_path / "log"
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
    ("auto", {"avx512_bf16": False}, "float32"), ("auto", {"neon": True}, "float32"), ("bfloat16", {}, "bfloat16"),
    ("float32", {"amx_bf16": True}, "float32")])
def test_the_dtype_follows_from_the_kind_of_cpu(monkeypatch, name, has, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert pick_dtype(name, torch.device("cpu")) == getattr(torch, chosen)


def test_a_resume_keeps_the_dtype_of_its_run(script, data, tmp_path, monkeypatch):
    """The other machine may have other hardware."""
    flags = ["--data", data, "--out", tmp_path / "run", *SMALL, "--dtype", "auto", "--max-steps", 10]
    for has, more in ((True, flags), (False, ["--resume", "--out", tmp_path / "run", "--max-steps", 20])):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        said, _ = accepted(script(train.main, *more))
        assert ", bfloat16, " in said and plan(tmp_path / "run")["dtype"] == "bfloat16"


def test_fine_tuning_starts_from_the_given_weights_and_has_their_name(finished, script, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = Path(shutil.copytree(finished("--max-steps", 40), "published"))
    said, _ = accepted(script(train.main, "--data", data, "--init-from", base, *SMALL[4:], "--max-steps", 10,
                              "--muon-lr", "1e-4", "--adam-lr", "1e-4"))
    assert "out/wood-published: fine-tuning published, " in said and "tiny" not in said
    tuned = Path("out/wood-published")
    assert losses(tuned)[10] < losses(base)[10] - 1
    assert load_model(tuned).config == load_model(base).config


def save_with_tokenizer(folder: Path, **fields: object) -> None:
    model = random_model(**fields)
    save_model(model, folder)
    corpus.train_tokenizer([make_text(2000)], model.config.vocab_size).save(str(folder / "tokenizer.json"))


def test_fine_tuning_goes_twice_through_a_text_of_its_own(script, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_with_tokenizer(Path("out/owl"), n_layer=1)
    tune = [train.main, "--init-from", "out/owl", "--data", text_file, "--eval-tokens", 500, "--threads", 1,
            "--dtype", "float32"]
    assert "--block-size 512: going on with 32" in accepted(script(*tune))[1]
    run, meta = Path("out/wood-owl"), Path("data/wood-owl/meta.json")
    steps = plan(run)["max_steps"]
    assert steps == math.ceil(2 * json.loads(meta.read_text())["train"]["tokens"] / (4 * 32))
    assert flags_of(run)["muon_lr"] == 0 and flags_of(run)["grad_accum"] is None  # another number of ranks may go on
    assert list(losses(run, "val_loss")) == [0, 250, 500, steps]
    assert losses(run)[steps] < losses(run, "val_loss")[0] - 1
    prepared = meta.stat().st_mtime_ns
    accepted(script(*tune, "--max-steps", 1, "--block-size", 16))  # the text is prepared already
    assert meta.stat().st_mtime_ns == prepared
    again = [train.main, "--resume", "--out", run, "--max-steps", steps + 1]
    accepted(script(*again, "--init-from", "out/owl", "--block-size", 512, "--data", text_file))  # as torchrun
    refused(script(*again, "--muon-lr", 0.01), "muon_lr is 0")
    os.utime(meta, (0, 0))
    refused(script(*tune), "data/wood-owl holds tokens of another text, an older one")


def test_fine_tuning_on_a_short_text(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_with_tokenizer(Path("owl"))
    Path("note.txt").write_text("Owl sees Fox at ten. " * 10)
    said, noted = accepted(script(train.main, "--init-from", "owl", "--data", "note.txt", "--threads", 1))
    assert "going on with 20" in noted and "steps 0 to 5 (2.1 passes) of 80 tokens" in said


def test_fine_tuning_takes_data_of_its_own_tokenizer(script, data, text_file, tmp_path, monkeypatch):
    """Another tokenizer's tokens mean nothing to the model, even where it knows as many."""
    monkeypatch.chdir(tmp_path)
    save_with_tokenizer(Path("owl"), vocab_size=300)
    tune = [train.main, "--init-from", "owl", "--max-steps", 1, "--eval-tokens", 500, "--threads", 1]
    advice = "`python data/prepare.py --input FILE --tokenizer owl`"
    refused(script(*tune), "data/", advice)  # none at all
    shutil.copytree(data, "data/bytes")
    refused(script(*tune), "data/bytes", "owl's tokenizer", advice)
    refused(script(*tune, "--data", "data/bytes"), "data/bytes", "owl's tokenizer", advice)
    assert not Path("out").exists()
    ours = corpus.prepare(corpus.PrepareConfig(input=(text_file,), out=Path("data/ours"), tokenizer=Path("owl")))
    tokenizer = ours / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text())))  # the same, otherwise written
    os.utime(ours / "meta.json", (0, 0))  # older than the bytes
    for more in ([], ["--data", ours]):
        said, _ = accepted(script(*tune, *more))
        assert "fine-tuning owl" in said and "ours (" in said
    assert [plan(Path("out") / name)["data"] for name in ("ours-owl", "ours-owl-2")] == [str(ours.resolve())] * 2


def test_a_text_instead_of_a_folder(script, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = [*SMALL, "--max-steps", 1]
    accepted(script(train.main, "--data", text_file, *quick))
    assert Path("out/wood-tiny/model.safetensors").exists()
    Path("wood.txt").write_text(make_text(100))
    refused(script(train.main, "--data", "wood.txt", *quick), "data/wood holds tokens of another text")
    Path("zeros.txt").write_bytes(b"\0" * 100)
    refused(script(train.main, "--data", "zeros.txt", *quick), "zeros.txt", "a zero byte at 0")
    assert not Path("data/zeros").exists()
    assert [folder.name for folder in Path("out").iterdir()] == ["wood-tiny"]


@pytest.fixture
def clock(monkeypatch):
    """train.py's clock, which training steps alone move: each takes clock.step seconds."""
    clock = SimpleNamespace(now=0, step=1)

    def pass_seconds(seconds: float) -> None:
        clock.now += seconds

    clock.pass_seconds = pass_seconds
    monkeypatch.setattr(train.Run, "train_step", hooked(train.Run.train_step, lambda _: pass_seconds(clock.step)))
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def seconds_left(said: str) -> dict[int, int]:
    """The seconds left that a run printed, by step."""
    found = re.findall(r"step (\d+)\b.* (?:(\d+)m)?(\d+)s left", said)
    return {int(step): 60 * int(minutes or 0) + int(seconds) for step, minutes, seconds in found}


def test_a_run_of_minutes_ends_with_them(script, data, tmp_path, clock):
    out = tmp_path / "run"
    said, _ = accepted(script(train.main, "--data", data, "--out", out, *SMALL, "--max-minutes", 2))
    assert "2 minutes, at most steps 0 to 1056 (8.0 passes) of 256 tokens" in said
    assert 110 <= clock.now <= 121 and read_state(out)["step"] in losses(out, "val_loss")
    scales = losses(out, "lr_scale")
    assert scales[30] == 1 and scales[100] < 0.4 and min(scales.values()) < 0.1
    left = seconds_left(said)
    assert max(abs(step + rest - 120) for step, rest in left.items()) < 5 and len(left) > 10, left
    accepted(script(train.main, "--resume", "--out", out, "--max-minutes", 3, "--threads", 1))
    assert 170 <= clock.now <= 181
    done = read_state(out)["step"]
    accepted(script(train.main, "--resume", "--out", out, "--max-steps", done + 20, "--threads", 1))
    assert flags_of(out)["max_minutes"] is None and read_state(out)["step"] == done + 20


def test_a_run_of_minutes_reads_a_short_text_no_more_often_than_another(script, data, tmp_path, clock):
    out, length = tmp_path / "run", ["--max-minutes", 60, "--batch-size", 64]
    said, _ = accepted(script(train.main, "--data", data, "--out", out, *SMALL, *length, "--eval-every", 50))
    steps = math.ceil(8 * TokenData(data, 32).tokens["train"] / (64 * 32))
    assert clock.now < 1000 and f"60 minutes, at most steps 0 to {steps} (8.0 passes)" in said
    assert read_state(out)["step"] == steps == max(losses(out, "val_loss"))
    assert min(losses(out, "lr_scale").values()) < 0.1


def test_a_run_whose_minutes_are_over_is_done(run, script, tmp_path, clock, monkeypatch):
    """Also where its last evaluation was quicker than the one before."""
    monkeypatch.setattr(train, "evaluate", hooked(evaluate, lambda n: clock.pass_seconds(20 if n <= 2 else 1)))
    out = run(tmp_path / "run", "--eval-every", 40, "--max-minutes", 2)
    assert clock.now < 122
    assert "steps already; raise --max-minutes" in accepted(script(train.main, "--resume", "--out", out))[0]


def test_a_fine_tuning_of_less_time_than_its_first_evaluation_leaves_a_model(run, finished, tmp_path, clock):
    clock.step = 60
    tuned = run(tmp_path / "tuned", "--init-from", finished("--max-steps", 20), "--max-minutes", 0.01)
    assert load_model(tuned) and read_state(tuned)["step"] == 1 and min(losses(tuned, "lr_scale").values()) >= 0


def test_what_a_resume_is_given_counts(run, finished, script, data, tmp_path):
    tuned = run(tmp_path / "tuned", "--init-from", finished("--max-steps", 20), "--block-size", 16, "--muon-lr", 0,
                "--max-minutes", 0.01)
    resume = [train.main, "--resume", "--out", tuned, "--max-steps", 40]
    refused(script(*resume, "--block-size", 32), "block_size is 16")
    refused(script(*resume, "--weight-decay", 0.5), "weight-decay", "no effect")
    run_file = json.loads((tuned / "run.json").read_text())
    run_file["plan"]["data"] = str(tmp_path / "gone")
    (tuned / "run.json").write_text(json.dumps(run_file))
    accepted(script(train.main, "--resume", "--out", tuned, "--data", data, "--max-minutes", 0.02))
    assert "--max-minutes" in accepted(script(train.main, "--resume", "--out", "nowhere", "--help"))[0]


def test_a_slower_machine_ends_a_run_of_minutes_in_time(run, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(train, "evaluate", hooked(evaluate, lambda _: setattr(clock, "step", 2)))
    run(tmp_path / "run", "--max-minutes", 3)
    assert 165 <= clock.now <= 185


def test_time_left_counts_evaluations_and_not_the_first_step(script, data, tmp_path, clock, monkeypatch):
    monkeypatch.setattr(train, "update", hooked(train.update, lambda n: clock.pass_seconds(25 * (n == 1))))  # compiles
    monkeypatch.setattr(train, "evaluate", hooked(evaluate, lambda _: clock.pass_seconds(7)))
    said, _ = accepted(script(train.main, "--data", data, "--out", tmp_path / "run", *SMALL, "--max-steps", 45))
    assert clock.now == 45 + 25 + 5 * 7
    assert seconds_left(said) == {10: 35 + 28, 20: 25 + 21, 30: 15 + 14, 40: 5 + 7, 45: 0}


def test_over_fitting_is_said_and_the_best_model_kept(script, data, tmp_path, monkeypatch):
    found = iter([3.0, 2.0, 2.5, 2.7])
    monkeypatch.setattr(train, "evaluate", lambda *_: next(found))
    said, noted = accepted(script(train.main, "--data", data, "--out", tmp_path / "run", *SMALL, "--max-steps", 40))
    assert noted.count("the validation loss rises while the training loss falls") == 1
    assert "(no better)" in said and "best validation 2.0000 nats" in said


def test_best_model_is_kept_when_later_ones_are_worse(run, finished, tmp_path):
    out = Path(shutil.copytree(finished("--max-steps", 30, "--warmdown", 0), tmp_path / "run"))
    best, (good, _) = min(losses(out, "val_loss").values()), read_safetensors(out / "model.safetensors")
    run(out, "--resume", "--max-steps", 40, "--muon-lr", 1, "--adam-lr", 1)
    assert losses(out, "val_loss")[40] > best
    assert_same(read_safetensors(out / "model.safetensors")[0], good)


@pytest.mark.parametrize("every", [1, 30])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(finished, script, tmp_path, every):
    out = shutil.copytree(finished("--max-steps", 20), tmp_path / "run")
    refused(script(train.main, "--resume", "--out", out, "--max-steps", 60, "--grad-clip", 0, "--adam-lr", 1e30,
                   "--eval-every", every), "loss is nan")
    assert all(tensor.isfinite().all() for tensor in weights(out).values())
    assert all(tensor.isfinite().all() for tensor in load_model(out).state_dict().values())


def test_a_short_text_is_not_read_too_often(script, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--block-size", 16, "--batch-size", 512,
             "--eval-tokens", 99, "--threads", 1]
    said, _ = accepted(script(train.main, "small", "--data", text_file, *flags))
    tokens = json.loads(Path("data/wood/meta.json").read_text())["train"]["tokens"]
    steps = math.ceil(8 * tokens / (512 * 16))
    assert f"steps 0 to {steps} (8.0 passes)" in said
    assert len(losses(Path("out/wood-small"), "val_loss")) == math.ceil(steps / math.ceil(steps / 8))


@pytest.mark.parametrize(("tokens", "passes", "dropout"), [
    (10**6, 8, 0.0), (10**5, 8, 0.1), (10**4, 8, 0.2), (10**4, 1.9, 0.0)])
def test_dropout_follows_from_the_length_of_the_text_and_of_the_run(tokens, passes, dropout):
    assert recipe.pick_dropout(900_000, tokens, passes) == dropout


@pytest.mark.parametrize(("length", "dropout"), [
    (["--max-steps", "4"], 0.0), (["--max-steps", "5"], 0.1), (["--max-minutes", "0.02"], 0.1),
    (["--max-steps", "5", "--dropout", "0"], 0.0)])
def test_a_run_has_the_dropout_of_its_length(data, length, dropout):
    """The model has 5 parameters for each token of the text, of which a step reads 0.4 to 0.5."""
    shape = ["--n-layer", "4", "--n-embd", "64", "--batch-size", "128", "--block-size", "128"]
    config, _, _ = recipe.read_flags(["--data", str(data), *shape, *length])
    meta = read_meta(data)
    tokens, parameters = meta["train"]["tokens"], GPT(recipe.shape(config, meta)).num_params()
    assert 2 * tokens < parameters < 20 * tokens and 4 * 128 * 128 < 2 * tokens < 5 * 128 * 128
    assert recipe.decide(config, torch.device("cpu")).dropout == dropout


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
