"""What a Unix program copes with: any name, signals, pipes, masks, full disks, busy cores."""

import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import prepare
import pytest
import torch
from conftest import ROOT, end_well, fork_train, make_text, random_model, refused, save_model
from test_fuzz import run_script, start_script
from test_quantize import quick  # noqa: F401  (a fixture)

import quantize
import sample
import train
from dataloader import TokenData
from lib import checkpoint, corpus, machine
from lib.checkpoint import STATE, read_state
from lib.files import beside

TINY = ["--n-layer", 1, "--n-embd", 16, "--n-head", 2]
QUICK = ["--block-size", 16, "--batch-size", 4, "--max-steps", 2, "--eval-tokens", 500, "--threads", 1,
         "--device", "cpu", "--compile", "off"]
SHORT = ["--max-new-tokens", 8, "--seed", 1]


def start(*words: object, **options: object) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, words)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)


# ---------------------------------------------------------------- names

@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", ["100$__a_plan", "书", "My Book [1] (v2)", "-milk", *(
    pytest.param(name, marks=pytest.mark.long) for name in ("$x^{2", "it's; a \"test\" & `x`"))])
def test_no_name_is_a_language(tmp_path, text_file, name):
    """Pictures, hints and logs take a name as it is, and every printed command pastes."""
    (tmp_path / f"{name}.txt").write_text(text_file.read_text())
    commands = []
    for words in [["prepare", f"--input=./{name}.txt"], ["train", *map(str, TINY + QUICK), "--data", f"data/{name}"],
                  ["quantize", "--checkpoint", f"out/{name}-tiny", "--no-compare"]]:
        code, err = run_script(words, tmp_path)
        assert code in (0, None) and err == "", err
        commands.append(shlex.split(re.search("^next: (.*)$", (tmp_path / "stdout").read_text(), re.M)[1]))
    assert commands == [["python", "train.py", "--data", f"data/{name}"],
                        ["python", "sample.py", "--checkpoint", f"out/{name}-tiny"],
                        ["python", "sample.py", "--checkpoint", f"out/{name}-tiny-int8"]]
    row = dict.fromkeys(["file_bytes", "memory_bytes", "bits_per_byte_change", "prompt_tokens_per_second",
                         "decode_tokens_per_second"], 1.0)
    result = {"model": f"{name}-tiny", "parameters": 1, "threads": 1, "rows": {"fp32": row, "int8": row}}
    quantize.plot(result, tmp_path / "comparison.png")
    for path in (f"out/{name}-tiny/loss.png", "comparison.png"):
        assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("main", "flag"), [(main, flag) for main, flags in {
    prepare.main: "--input --out --tokenizer", train.main: "--data --out --init-from",
    sample.main: "--checkpoint --prompt --prompt-file", quantize.main: "--checkpoint --out --data",
}.items() for flag in flags.split()])
@pytest.mark.parametrize("word", ["caf\udce9", ""])
def test_a_name_that_cannot_be_written_down_is_refused(script, tmp_path, monkeypatch, main, flag, word):
    monkeypatch.chdir(tmp_path)
    Path("caf\udce9").write_text("x" * 1000)
    if (flag, word) != ("--prompt", ""):
        refused(script(main, f"{flag}={word}"), flag)
    assert list(Path().iterdir()) == [Path("caf\udce9")]


@pytest.mark.parametrize("name", [".", ".."])
def test_a_folder_beside_has_a_name(tmp_path, monkeypatch, name):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert beside(Path(name), "-int8") == tmp_path / {".": "a/b-int8", "..": "a-int8"}[name]


# ---------------------------------------------------------------- compilers

def test_a_compiler_may_be_several_words(tmp_path, monkeypatch):
    (tmp_path / "ccache").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "ccache").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CXX", "ccache g++ -pipe")
    assert machine.cxx() and machine.cxx().endswith("g++") and machine.can_compile(torch.device("cpu"))
    monkeypatch.setenv("CXX", "ccache no-such-compiler")
    assert machine.cxx() is None and not machine.can_compile(torch.device("cpu"))
    make = ["make", "-n", "-W", "setup.py", "kernels", "CXX=ccache g++"]
    made = subprocess.run(make, cwd=ROOT, capture_output=True, text=True)
    assert 'CXX="ccache g++"' in made.stdout and "command -v ccache >" in made.stdout
    for compiler in ("no-such-compiler", "g++ -pipe"):
        monkeypatch.setenv("CXX", f"ccache {compiler}")
        done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True)
        assert ("no C++ compiler" in done.stderr) == (compiler == "no-such-compiler")


@pytest.mark.long  # test_train.py's two ranks, of which one cannot compile, are quick
def test_where_nothing_compiles_training_goes_on(data, tmp_path):
    log = tmp_path / "log"
    changes = "from lib import machine; machine.cxx = lambda: '/bin/false'"
    said = end_well(fork_train(log, *TINY, *QUICK[:-2], "--compile", "on", "--data", data, "--out", tmp_path / "run",
                               changes=changes), log)
    assert len(re.findall("^note: torch.compile failed .*; going on without it, more slowly$", said, re.M)) == 1
    assert "Traceback" not in said and "step 2/2" in said


@pytest.mark.long
def test_training_compiles_where_the_path_has_a_space(data, tmp_path):
    place = tmp_path / "My Projects"
    place.mkdir()
    (place / "packages").symlink_to(Path(torch.__file__).parents[1])
    code = f"""if True:
        import runpy, sys
        sys.path[:0] = [{str(ROOT)!r}, {str(place / 'packages')!r}]
        sys.argv[0] = "train.py"
        runpy.run_path({str(ROOT / 'train.py')!r}, run_name="__main__")
    """
    no_cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TORCHINDUCTOR_FX_GRAPH_CACHE": "0"}
    done = start("-c", code, *TINY, *QUICK[:-2], "--compile", "on", "--data", data, "--out", tmp_path / "run",
                 env=os.environ | no_cache)
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0 and "torch.compile failed" not in err and "compiling first" in out, err


@pytest.mark.long
@pytest.mark.parametrize("flag", ["disable", "skip", "only", "json"])
def test_benchmarks_take_the_flags_of_pytest_benchmark(tmp_path, flag):
    env = os.environ | {"OWLET_BENCH_SIZES": "tiny", "OWLET_BENCH_THREADS": "1"}
    option = f"--benchmark-{flag}" + f"={tmp_path / 'x.json'}" * (flag == "json")
    words = [option, "-k", "qkv-owlet or (inference and tiny)"]
    benches = [ROOT / "tests/bench" / f"bench_{name}.py" for name in ("kernels", "inference")]
    done = subprocess.run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *words, *benches], cwd=ROOT,
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert ("| matrix |" in done.stdout) == (flag in ("only", "json"))


# ---------------------------------------------------------------- what a run can do without

@pytest.mark.parametrize("lost", ["log.jsonl", "loss.png", "runs"])
def test_what_cannot_be_written_in_the_middle_of_a_run_is_a_note(script, data, tmp_path, monkeypatch, lost):
    step, out = train.Run.train_step, tmp_path / "run"

    def lose(run: train.Run) -> None:
        if run.step == 12:
            path = out / lost
            if path.is_dir():
                shutil.rmtree(path)
                path.touch()
            else:
                path.unlink(missing_ok=True)
                path.mkdir()
        step(run)

    monkeypatch.setattr(train.Run, "train_step", lose)
    code, said, err = script(train.main, "--data", data, "--out", out, *TINY, *QUICK, "--max-steps", 30,
                             "--eval-every", 10)
    assert code == 0 and "step 30/30" in said and "Traceback" not in err
    assert read_state(out)["step"] == 30
    if lost != "runs":  # TensorBoard holds its file open: nothing is lost
        assert lost in err and err.count("note") == 1


@pytest.mark.parametrize("broken", ["lib.picture.Figure.savefig", "lib.picture.Figure",
                                    "torch.utils.tensorboard.SummaryWriter"])
def test_pictures_and_curves_that_fail_do_not_end_a_run(script, data, tmp_path, monkeypatch, broken):
    def fail(*_: object, **__: object) -> None:
        raise ValueError("no font\nat all")

    monkeypatch.setattr(broken, fail)
    code, _, err = script(train.main, "--data", data, "--out", tmp_path / "run", *TINY, *QUICK)
    assert code == 0 and read_state(tmp_path / "run")["step"] == 2
    assert err.count("\n") == 1 and "no font; going on without" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_does_not_end_training(data, tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, ROOT / "train.py", "--data", data, "--out", tmp_path / "run",
                               *map(str, TINY + QUICK)], stdout=full, stderr=full)
    assert read_state(tmp_path / "run")["step"] == 2
    assert done.returncode in (0, 2, 120)


def test_closed_streams_are_no_error(text_file, tmp_path):
    command = shlex.join([sys.executable, str(ROOT / "data/prepare.py"), "--input", str(text_file), "--out", "made"])
    for closed in ("<&- >&- 2>&-", ">&-"):
        assert subprocess.run(f"{command} {closed}", shell=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "made" / "meta.json").exists()


def test_no_home_is_no_error(data, tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "HOME"} | {"HOME": "/proc/nowhere"}
    done = subprocess.run([sys.executable, ROOT / "train.py", "--data", data, "--out", tmp_path / "run",
                           *map(str, TINY + QUICK)], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and done.stderr == "" and (tmp_path / "run" / "loss.png").exists(), done.stderr


# ---------------------------------------------------------------- signals

@pytest.mark.parametrize("ignored", [False, True], ids=["heard", "nohup"])
def test_a_closed_terminal_saves_and_stops(data, tmp_path, ignored):
    out, log = tmp_path / "run", tmp_path / "log"
    changes = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)" if ignored else ""
    process, = fork_train(log, *TINY, *QUICK, "--max-steps", 100_000, "--eval-every", 100, "--data", data, "--out", out,
                          changes=changes)
    while "step 100/" not in (log.read_text() if log.exists() else ""):
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGHUP)
    if ignored:
        time.sleep(1)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + (signal.SIGTERM if ignored else signal.SIGHUP)
    assert f"stopped at step {read_state(out)['step']}; go on with: " in log.read_text()


@pytest.mark.long
def test_a_closed_terminal_saves_and_stops_under_torchrun(data, tmp_path):
    out = tmp_path / "run"
    process = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *TINY,
                    *QUICK, "--max-steps", 1_000_000, "--eval-every", 50, "--data", data, "--out", out)
    while not (out / STATE).exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    said, _ = process.communicate(timeout=60)
    assert f"stopped at step {read_state(out)['step']}" in said


@pytest.mark.parametrize(("words", "letters"), [
    ("train.py", 0), ("sample.py", 0), ("sample.py --max-new-tokens 1000000", 20), ("quantize.py", 0),
    ("data/prepare.py --input book.txt", 0), ("profile_run.py sample.py", 0)])
@pytest.mark.parametrize("moment", [0, *(pytest.param(0.1 + 0.2 * i, marks=pytest.mark.long) for i in range(12))])
def test_ctrl_c_is_one_line_once_a_script_runs(folder, data, words, letters, moment):
    """Ctrl-C during the imports prints Python's own traceback. The test reads `letters` of the script's text first."""
    Path("book.txt").write_text(make_text(200_000))
    Path("data").mkdir()
    Path("data/wood").symlink_to(data)
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words.split()]
    process = start("-c", f"""if True:
        import runpy, sys
        sys.path.insert(0, {str(ROOT)!r})
        from lib import cli
        run, sys.argv = cli.run, {words!r}
        cli.run = lambda main: run(lambda: (print("running", flush=True), main()))
        runpy.run_path({words[0]!r}, run_name="__main__")
    """)
    assert process.stdout.readline() == "running\n" and len(process.stdout.read(letters)) == letters
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    try:
        said, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "Traceback" not in err and "Error" not in err, err
    if process.returncode not in (0, -signal.SIGINT):  # it had not ended, all but its exit
        saved = "stopped at step" in said  # train.py was in its loop already
        assert process.returncode == 130 and err.count("interrupted") == (not saved), err
        if "profile_run" in words[0] and "cProfile" in err:
            assert Path("profile-sample.prof").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", [0, 2, *(pytest.param(i, marks=pytest.mark.long) for i in (1, 3))])
def test_a_stopped_prepare_leaves_nothing(tmp_path, number, moment):
    (tmp_path / "book.txt").write_text(make_text(300_000))
    process = start_script(["prepare", "--input", "book.txt", "--out", "made", "--vocab-size", "2000"], tmp_path)
    while not list(tmp_path.glob("made/.*.tmp")):
        assert process.is_alive(), (tmp_path / "stderr").read_text()
        time.sleep(0.01)
    time.sleep(0.15 * moment)
    os.kill(process.pid, number)
    process.join(30)
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    if moment > 1 and (tmp_path / "made/meta.json").exists():  # it had ended already, or all but its exit
        assert process.exitcode in (0, 128 + number, -number)
        TokenData(tmp_path / "made", 16)
    else:
        assert process.exitcode == 128 + number
        assert {path.name for path in tmp_path.iterdir()} == {"book.txt", "stdin", "stdout", "stderr"}


@pytest.mark.parametrize("moved", range(6))
@pytest.mark.parametrize("kind", ["data", "int8"])
def test_killed_while_it_replaces_a_folder_nothing_is_mixed(script, folder, monkeypatch, kind, moved):
    """The new folder becomes valid in one moment. Making it once more makes all valid."""
    made, marker, make, use = {
        "data": (Path("data/a"), "meta.json", [prepare.main, "--input", "a.txt", "--out", "data/a"],
                 [train.main, "--data", "data/a", "--out", "run", *TINY, *QUICK]),
        "int8": (Path("out/wood-int8"), "config.json", [quantize.main, "--checkpoint", folder, "--no-compare"],
                 [sample.main, "--checkpoint", "out/wood-int8", *SHORT])}[kind]
    text = make_text(2000, seed=1)
    Path("a.txt").write_text(text)
    assert script(*make)[0] == 0
    before, files = [path.read_bytes() for path in made.glob("train.bin")], len(list(made.iterdir()))
    Path("a.txt").write_text(text.replace("Owl", "Elk"))  # as many bytes
    replace, left = Path.replace, iter(range(moved))

    def die(path: Path, target: Path) -> Path:
        if path.parent != target.parent and next(left, None) is None:
            os._exit(9)
        return replace(path, target)

    def killed() -> None:
        monkeypatch.setattr(Path, "replace", die)
        script(*make)

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join()
    if moved < files:
        assert process.exitcode == 9
        refused(script(*use), marker)
    assert script(*make)[0] == 0 and not list(made.glob(".*"))
    assert script(*use)[0] == 0
    assert kind == "int8" or before != [path.read_bytes() for path in made.glob("train.bin")]


def test_a_mask_holds_for_every_file(script, data, tmp_path, quick):  # noqa: F811
    before = os.umask(0o077)
    try:
        assert script(train.main, "--data", data, "--out", tmp_path / "out" / "run", *TINY, *QUICK)[0] == 0
        assert script(quantize.main, "--checkpoint", tmp_path / "out" / "run", "--gguf", "--eval-tokens", 99)[0] == 0
        assert script(prepare.main, "--input", data / "meta.json", "--out", tmp_path / "out" / "data")[0] == 0
    finally:
        os.umask(before)
    wrong = [path for path in (tmp_path / "out").rglob("*") if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert not wrong


# ---------------------------------------------------------------- pipes

def test_a_book_may_come_through_a_pipe(script, tmp_path, text_file, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def pipe(content: bytes) -> int:
        read, write = os.pipe()
        threading.Thread(target=lambda: (os.write(write, content), os.close(write))).start()
        return read

    assert script(prepare.main, "--input", text_file, "--out", "file")[0] == 0
    for word in ("-", "/dev/stdin", "/dev/fd/{}"):
        read, before = pipe(text_file.read_bytes()), os.dup(0)
        os.dup2(read, 0)
        assert script(prepare.main, "--input", word.format(read), "--out", "piped")[0] == 0
        os.dup2(before, 0)
        for part in ("train.bin", "val.bin"):
            assert Path("piped", part).read_bytes() == Path("file", part).read_bytes()
        shutil.rmtree("piped")
    refused(script(prepare.main, "--input", f"/dev/fd/{pipe(b'')}", "--out", "none"), "an empty file")
    assert not Path("none").exists()


def test_a_book_may_say_where_its_texts_end(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "Once upon a time.<|endoftext|>\n" * 300
    Path("tales.txt").write_text(text)
    for size, end in (256, 256), (270, 270):
        assert script(prepare.main, "--input", "tales.txt", "--vocab-size", size, "--out", "data/tales")[0] == 0
        tokens = np.fromfile("data/tales/train.bin", "<u2")
        assert (tokens == end).sum() in (269, 270)
        out = f"out/{size}"
        assert script(train.main, "--data", "data/tales", "--out", out, *TINY, *QUICK, "--max-steps", 60,
                      "--adam-lr", 0.03)[0] == 0
        assert json.loads(Path(out, "config.json").read_text())["eos_token_id"] == end
        said = script(sample.main, "--checkpoint", out, "--max-new-tokens", 400, "--temperature", 0)[1]
        assert len(said) < 400 and "endoftext" not in said
        assert script(quantize.main, "--checkpoint", out, "--no-compare", "--gguf")[0] == 0


def test_a_fine_tuned_model_ends_where_the_texts_do(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = corpus.train_tokenizer([], 256)
    tokenizer.add_special_tokens(["<|done|>"])
    base = Path("out/base")
    save_model(random_model(vocab_size=257, eos=[256]), base)
    tokenizer.save(str(base / "tokenizer.json"))
    Path("tales.txt").write_text("Once upon a time.<|endoftext|>\n" * 300)
    assert script(train.main, "--init-from", base, "--data", "tales.txt", "--max-steps", 1, "--threads", 1)[0] == 0
    assert (np.fromfile("data/tales-base/train.bin", "<u2") == 256).sum() in (269, 270)
    tokenizer.add_special_tokens(["<|endoftext|>"])  # now it has both
    save_model(random_model(vocab_size=258, eos=256), base)
    tokenizer.save(str(base / "tokenizer.json"))
    assert script(prepare.main, "--input", "tales.txt", "--tokenizer", base, "--out", "data/more")[0] == 0
    assert (np.fromfile("data/more/train.bin", "<u2") == 257).sum() in (269, 270)
    assert script(train.main, "--init-from", base, "--data", "data/more", "--max-steps", 1, "--threads", 1)[0] == 0
    assert json.loads(Path("out/more-base/config.json").read_text())["eos_token_id"] == [256, 257]


def test_a_model_larger_than_memory_is_refused(script, folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "free_memory", lambda: 1000)
    for main in (sample.main, quantize.main):
        refused(script(main, "--checkpoint", folder), folder, "GB", "free memory")


# ---------------------------------------------------------------- flags

def test_flags_that_greedy_decoding_ignores_are_noted(script, folder):
    code, _, err = script(sample.main, "--temperature", 0, "--top-k", 3, "--top-p", 0.5, *SHORT)
    noted = re.findall("^note: (--[a-z-]+) has no effect", err, re.M)
    assert code == 0 and sorted(noted) == ["--seed", "--top-k", "--top-p"]


def test_seeds_reach_as_far_in_every_script(script, data, folder, tmp_path):
    for flags in ([train.main, "--data", data, "--out", tmp_path / "x", *TINY, *QUICK],
                  [sample.main, "--max-new-tokens", 2]):
        assert script(*flags, "--seed", 2**63 - 1)[0] == 0


@pytest.mark.parametrize("threads", ["1", "2"])
def test_threads_are_those_that_openmp_is_told(threads):
    code = "import torch; from lib.distributed import Ranks; Ranks('cpu', None); print(torch.get_num_threads())"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": threads},
                          capture_output=True, text=True).stdout
    assert said == f"{threads}\n"


@pytest.mark.parametrize("asked, told, others, expected", [
    (None, None, 0.2, 4), (None, None, 1.1, 3), (None, None, 2.9, 1), (None, None, 9, 1), (3, None, 2, 3),
    (None, "4", 2, 4)])
def test_threads_are_as_many_as_cores_are_free(monkeypatch, notes_anew, capsys, asked, told, others, expected):
    seconds = iter([(0, 10, 5), (2, 14 + 2 * others, 9), (3, 15 + 2 * others, 10)])
    monkeypatch.setattr(machine, "core_seconds", lambda: next(seconds))
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine.time, "monotonic", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if told:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    torch.set_num_threads(4)
    try:
        threads = machine.CPUThreads(asked)
        threads.adapt()
        assert torch.get_num_threads() == expected
        assert ("other processes use" in capsys.readouterr().err) == (expected < (asked or 4))
        if asked is None and told is None:
            threads.adapt()  # they have ended
            assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)


def test_seconds_of_cores_are_counted():
    before, start = machine.core_seconds(), time.process_time()
    while time.process_time() < start + 0.5:
        pass
    seconds, busy, own = (now - then for now, then in zip(machine.core_seconds(), before, strict=True))
    assert 0.45 < own < 1.05 * seconds and own - 0.05 < busy < machine.cores() * seconds + 0.1


def test_a_mistake_under_torchrun_is_said_once(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           ROOT / "train.py", "--max-stepz", "5"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("train.py: unrecognized arguments: --max-stepz") == 1


def test_a_fine_tune_begins_with_the_loss_it_is_given(script, data, folder, tmp_path):
    code, out, err = script(train.main, "--init-from", folder, "--data", data, "--out", tmp_path / "tuned", *QUICK)
    assert code == 0 and "step 0/2: validation 5." in out, err
    first = json.loads((tmp_path / "tuned" / "log.jsonl").read_text().splitlines()[0])
    before = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert first["step"] == 0 and first["val_loss"] == pytest.approx(before["val_loss"])


def test_another_length_of_a_run_is_said_with_its_rates(script, folder):
    _, _, err = script(train.main, "--resume", "--out", folder, "--max-steps", 4, "--threads", 1)
    assert "4 steps instead of 2: the learning rates go on at 71% of their peak instead of 0%" in err
