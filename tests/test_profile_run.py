"""profile_run.py: the script runs as it would alone, and the report's figures add up and are in the right place."""

import cProfile
import marshal
import os
import pstats
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import profile_run
from lib.cli import handling

ROOT = Path(__file__).resolve().parent.parent
PNG = b"\x89PNG\r\n\x1a\n"


def python(folder, *args, env=None):
    return subprocess.run([sys.executable, *map(str, args)], cwd=folder, capture_output=True, text=True, timeout=120,
                          env=os.environ | (env or {}))


def profiled(folder, *args, **kwargs):
    return python(folder, ROOT / "profile_run.py", *args, **kwargs)


@pytest.fixture
def record(monkeypatch):
    """Run a script in this process: exit code and profile."""
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(path):
        profile = cProfile.Profile()
        with handling(signal.SIG_IGN, [signal.SIGINT]):
            code = profile_run.run_script([str(path)], profile)
        profile.create_stats()
        return code, profile.stats

    return run


# ---------------------------------------------------------------- as it would run alone

PORTRAIT = """
import dataclasses, os, pickle, sys
@dataclasses.dataclass
class Thing:
    x: "int" = 1
print(sys.argv, sys.path[0], __name__, __file__, sys.modules["__main__"].__name__, pickle.loads(pickle.dumps(Thing())))
print("words", file=sys.stderr)
os.chdir("/")
sys.exit(3)
"""


def test_script_sees_what_python_shows_it(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/portrait.py").write_text(PORTRAIT)
    command = ["sub/portrait.py", "--out", "x", "--top", "0", "--help", "--", "--compare", "a.prof"]
    alone, ours = python(tmp_path, *command), profiled(tmp_path, *command)
    assert alone.stdout and ours.stdout == alone.stdout
    assert ours.returncode == alone.returncode == 3
    assert ours.stderr.startswith("words\n") and "under cProfile" in ours.stderr
    assert pstats.Stats(str(tmp_path / "profile-portrait.prof")).total_calls > 0
    assert (tmp_path / "profile-portrait.png").read_bytes().startswith(PNG)
    assert not list(tmp_path.glob(".*.tmp"))


def test_ctrl_c_reports_what_was_recorded(tmp_path):
    (tmp_path / "long.py").write_text("import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGINT)\n"
                                      "    while True: pass\nprint('begun')\nf()\n")
    ours = profiled(tmp_path, "long.py")
    assert (ours.returncode, ours.stdout) == (130, "begun\n")
    assert ours.stderr.startswith("\nlong.py: interrupted\n") and "Traceback" not in ours.stderr
    assert "long.py:f" in ours.stderr
    assert (tmp_path / "profile-long.prof").exists()


@pytest.mark.parametrize("code, expected, said, reported", [
    ("import sys; sys.exit()", 0, "", "script.py:<module>"),
    ("import sys; sys.exit('no luck')", 1, "no luck\n", "script.py:<module>"),
    ("raise SystemExit(7)", 7, "", "script.py:<module>"),
    ("def f():\n    return 1 / 0\n\nf()\n", 1, "ZeroDivisionError", "script.py:f"),
    ("def (", 1, "SyntaxError", ""),
])
def test_exit_codes_and_tracebacks(tmp_path, code, expected, said, reported):
    (tmp_path / "script.py").write_text(code)
    alone, ours = python(tmp_path, "script.py"), profiled(tmp_path, "script.py")
    assert ours.returncode == alone.returncode == expected
    assert said in alone.stderr and reported in ours.stderr.replace(alone.stderr, "")
    before_report = "sys.exit(" not in code  # Python prints the argument of sys.exit() at the very end
    assert ours.stderr.startswith(alone.stderr) if before_report else ours.stderr.endswith(alone.stderr)


GOOD = {("a.py", 1, "f"): (1, 1, 0.5, 0.5, {})}
ODD = [5, None, [1, 2], {5: (1, 1, 0.5, 0.5, {})}, {("a", "b", "c"): (1, 1, 0.5, 0.5, {})},
       {("a", 1, "f"): (1, 1, "x", 0.5, {})}, {("a", 1, "f"): (1, 1, 0.5, 0.5, {"x": 1})}, {("a", 1, "f"): ()},
       {("a", 1): (1, 1, 0.5, 0.5, {})}]


@pytest.mark.parametrize("args, said", [
    ([], "expected a script"),
    (["--top", "3"], "expected a script"),
    (["script", "x"], "unrecognized arguments: script x"),
    (["nowhere.py", "--x"], "nowhere.py: No such file"),
    (["--top", "0", "script.py"], "--top '0': expected `int` >= 1"),
    (["--tip", "3", "script.py"], "--tip"),
    (["--out", "no/where", "script.py"], "--out"),
    (["--compare", "text.prof"], "expected two .prof files"),
    (["--out", "x", "--compare", "good.prof", "good.prof"], "no --out"),
    (["--compare", "good.prof", "text.prof"], "text.prof: expected a profile"),
    (["--compare", "good.prof", "cut.prof"], "cut.prof: expected a profile"),
    (["--compare", "good.prof", "none.prof"], "none.prof"),
    *[(["--compare", f"odd{i}.prof", "good.prof"], f"odd{i}.prof: expected a profile in cProfile's format")
      for i in range(len(ODD))],
])
def test_misuse_is_one_line(tmp_path, monkeypatch, capsys, args, said):
    good, odd = marshal.dumps(GOOD), {f"odd{i}.prof": marshal.dumps(stats) for i, stats in enumerate(ODD)}
    for name, content in {"script.py": b"1", "good.prof": good, "cut.prof": good[:-8], "text.prof": b"once upon",
                          **odd}.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["profile_run.py", *args])
    with pytest.raises(SystemExit) as stop:
        profile_run.run(profile_run.main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error
    assert error.count("\n") == 1 and error.startswith("profile_run.py: ")


def test_each_rank_writes_a_profile_and_the_first_reports(tmp_path):
    (tmp_path / "ranked.py").write_text("import os; print('rank', os.environ['RANK'])")
    for rank in "01":
        ours = profiled(tmp_path, "ranked.py", env={"RANK": rank})
        assert ours.returncode == 0 and ours.stdout == f"rank {rank}\n", ours.stderr
        assert ("under cProfile" in ours.stderr) == (rank == "0")
    files = sorted(path.name for path in tmp_path.glob("profile-*"))
    assert files == ["profile-ranked-rank0.png", "profile-ranked-rank0.prof", "profile-ranked-rank1.prof"]


def test_a_profile_that_cannot_be_written_fails_after_a_script_of_several_ranks_too(tmp_path):
    (tmp_path / "ranked.py").write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from lib.cli import run
from lib.distributed import Ranks

def main():
    ranks = Ranks("cpu", 1)
    (Path(f"profile-ranked-rank{{ranks.rank}}.prof") / "in the way").mkdir(parents=True)
    ranks.close()
    sys.exit(0)

run(main)
""")
    ours = python(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                  ROOT / "profile_run.py", "ranked.py", env={"OMP_NUM_THREADS": "1"})
    assert ours.returncode == 1, ours.stderr  # torchrun's own
    assert re.search(r"exitcode\s*: 2\b", ours.stderr)
    assert "profile-ranked-rank0.prof: could not be written" in ours.stderr


# ---------------------------------------------------------------- the figures

def test_training_by_phase(data, tmp_path):
    done = profiled(tmp_path, "--out", "run", "--top", 40, ROOT / "train.py", "tiny", "--data", data, "--n-layer", 1,
                    "--n-embd", 32, "--block-size", 32, "--max-steps", 8, "--eval-every", 4, "--threads", 1)
    assert done.returncode == 0, done.stderr
    seconds, calls = profile_run.by_phase(profile_run.read_profile(tmp_path / "run.prof"))
    assert sum(seconds.values()) == pytest.approx(pstats.Stats(str(tmp_path / "run.prof")).total_tt, rel=0.01)
    steps = {"data": 8, "forward": 8, "backward": 8, "optimizer": 8, "evaluation": 2}
    assert {phase: calls[phase] for phase in steps} == steps
    _, phases, own, cumulative, files = done.stderr[done.stderr.index("train.py tiny"):].strip().split("\n\n")
    for phase in (*steps, "checkpoint and log", "Python import"):
        assert seconds[phase] > 0 and phase in phases
    assert 0 <= seconds["everything else"] < 0.3 * sum(seconds.values())
    assert len(own.splitlines()) == len(cumulative.splitlines()) == 1 + 40
    assert "train.py:train" in cumulative and "'run_backward' of 'torch._C._EngineBase'" in own
    assert files == f"-> {tmp_path / 'run'}.prof, .png"
    assert str(ROOT) not in phases + own + cumulative and sys.prefix not in own + cumulative
    assert (tmp_path / "run.png").read_bytes().startswith(PNG)


TOY_TRAINING = {
    "slow_module.py": "import time; time.sleep(0.2)",
    "late_module.py": "import time; time.sleep(0.1)",
    "dataloader.py": """
import time
from types import MethodType
import slow_module
def forward_loss():
    time.sleep(0.05)
def evaluate():
    MethodType(len, "a bound method in C, as pybind11's")()
    forward_loss()
    indirectly()
def indirectly():
    import late_module
""", "muon.py": """
import time
def update(depth=3):
    time.sleep(0.02)
    if depth:
        update(depth - 1)
""", "train.py": """
import threading, time
from dataloader import evaluate, forward_loss
from muon import update
stop = False
def count(number=0):
    if number:
        count(number - 1)
def other():
    while not stop:
        count(20)
        time.sleep(0.001)
threads = [threading.Thread(target=other) for _ in range(3)]
for thread in threads: thread.start()
forward_loss()
evaluate()
update()
time.sleep(0.03)
stop = True
for thread in threads: thread.join()
"""}


def test_phases_are_disjoint(tmp_path, record, monkeypatch):
    """Evaluation's forward pass and import are evaluation; recursion counts once; another thread adds no time."""
    for name, text in TOY_TRAINING.items():
        (tmp_path / name).write_text(text)
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
    code, stats = record(tmp_path / "train.py")
    for name in TOY_TRAINING:
        sys.modules.pop(Path(name).stem, None)
    phases, calls = profile_run.by_phase(stats)
    expected = {"forward": 0.05, "evaluation": 0.15, "Python import": 0.2, "optimizer": 0.08, "everything else": 0.03}
    assert code == 0 and phases.keys() == expected.keys()
    late = sum(phases.values()) - sum(expected.values())  # sleeps last longer on a busy machine
    assert late < 0.6  # the three threads would add 0.9
    for phase, seconds in expected.items():
        assert -1e-3 < phases[phase] - seconds < late + 5e-3
    assert calls["forward"] == 1


def test_methods_carry_their_class(tmp_path, record):
    """Two methods of one name stay apart, which pstats' own labels cannot tell."""
    code = "class A:\n    def f(self): pass\nclass B:\n    def f(self): pass\n\nA().f()\n[B().f() for _ in range(3)]\n"
    (tmp_path / "methods.py").write_text(code)
    _, stats = record(tmp_path / "methods.py")
    _, calls = profile_run.by_function(stats)
    assert (calls["methods.py:A.f"], calls["methods.py:B.f"]) == (1, 3)


@pytest.mark.parametrize("func, name", [
    (("~", 0, "<built-in method torch._C._nn.linear>"), "<built-in method torch._C._nn.linear>"),
    (("~", 0, "<method 'item' of 'torch._C.TensorBase' objects>"), "<method 'item' of 'torch._C.TensorBase' objects>"),
    (("~", 0, "<built-in method f of a.B object at 0x7f00a>"), "<built-in method f of a.B object>"),
    (("/home/me/owlet/train.py", 9, "evaluate"), "train.py:evaluate"),
    (("/x/lib/python3.11/site-packages/torch/nn/functional.py", 1, "silu"), "torch/nn/functional.py:silu"),
    (("/usr/lib/python3.12/json/decoder.py", 1, "decode"), "json/decoder.py:decode"),
    (("<frozen importlib._bootstrap>", 1, "_find_and_load"), "<frozen importlib._bootstrap>:_find_and_load"),
])
def test_readable_names(func, name):
    assert profile_run.readable(func) == name


def test_compare(tmp_path):
    def profile(name, **own):
        files = {"update": "muon.py", "evaluate": "dataloader.py"}
        stats = {(files.get(func, "train.py"), 1, func): (1, 1, seconds, seconds, {}) for func, seconds in own.items()}
        (tmp_path / name).write_bytes(marshal.dumps(stats))

    profile("a.prof", update=2.0, evaluate=1.0, old=0.25, same=1.0)
    profile("b.prof", update=1.0, evaluate=1.5, new=0.125, same=1.0)
    ours = profiled(tmp_path, "--top", 4, "--compare", "a.prof", "b.prof")
    assert (ours.returncode, ours.stderr) == (0, "")
    phases, functions = ([line.split() for line in part.splitlines()] for part in ours.stdout.split("\n\n"))
    assert phases[-1] == ["4.250", "3.625", "total"]
    assert phases[1] == ["2.000", "1.000", "-1.000", "0.50", "optimizer"]
    assert phases[2] == ["1.000", "1.500", "+0.500", "1.50", "evaluation"]
    assert [row[-1] for row in functions[1:]] == [
        "muon.py:update", "dataloader.py:evaluate", "train.py:old", "train.py:new"]
    assert [row[-2] for row in functions[1:]] == ["0.50", "1.50", "0.00", "new"]
