"""Where does the time go? Runs a script of this repository under cProfile, with the script's own arguments.

    python profile_run.py train.py tiny --max-steps 50     -> profile-train.prof and profile-train.png
    python profile_run.py --compare before.prof after.prof
    torchrun --nproc_per_node=2 profile_run.py train.py    one profile per rank; rank 0 reports

The script behaves as without the profiler: same output, exit code and Ctrl-C. The report goes to standard error.
`python -m pstats FILE` and snakeviz read the .prof file too.
"""

import cProfile
import marshal
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from types import MethodType, ModuleType

from lib.cli import Count, UserError, flag, interrupt, optional, parse, run
from lib.files import atomic_path, checked, regular_file

Func = tuple[str, int, str]  # file, line, name
Row = tuple[int, int, float, float]  # two counts of calls, own seconds, cumulative seconds
Stats = dict[Func, tuple[int, int, float, float, dict[Func, Row]]]  # pstats' format: a Row, and the Row of each caller
Table = tuple[Counter[str], Counter[str]]  # seconds and calls of each name

PHASE_OF = {function: phase for phase, functions in {
    "data": ["dataloader.py:TokenData.batch"],
    "forward": ["dataloader.py:forward_loss"],
    "backward": ["torch/_tensor.py:Tensor.backward"],
    "optimizer": ["muon.py:update"],
    "evaluation": ["dataloader.py:evaluate"],
    "checkpoint and log": ["train.py:Run.save", "runlog.py:RunLog.add"],
    "waiting for other ranks": ["distributed.py:Ranks.all_values"],
    "set-up": ["distributed.py:Ranks.__init__", "recipe.py:decide", "train.py:Run.compile",
               "machine.py:peak_flops", "muon.py:make_optimizers", "runlog.py:RunLog.__init__"],
    "load": ["checkpoint.py:load_model", "checkpoint.py:read_tokenizer", "int8.py:load_quantized"],
    "quantize": ["smooth.py:smooth", "int8.py:save_quantized", "int8.py:torch_ao", "gguf.py:write_gguf"],
    "generation": ["generate.py:_decode", "generate.py:_write"],
    "tokenizer": ["checkpoint.py:token_ids", "sample.py:Detokenizer.__call__", "corpus.py:train_tokenizer"],
    "text": ["corpus.py:read_text", "corpus.py:clean_plain", "corpus.py:plain_markdown"],
}.items() for function in functions}

cProfile.label = lambda code: (  # cProfile's own leaves out the class of a method
    ("~", 0, code) if isinstance(code, str) else (code.co_filename, code.co_firstlineno, code.co_qualname))


@dataclass
class ProfileConfig:
    out: Path | None = flag(None, "Stem of the files to write; default: profile-SCRIPT in the current folder.")
    top: Count = flag(15, "Functions in each table.")
    compare: tuple[Path, ...] = flag((), "Two .prof files, before and after, to compare. Takes no script.")


def run_script(command: list[str], profile: cProfile.Profile) -> int | str | None:
    """Run a script as `python SCRIPT ARGS...` would, under the profiler. Returns the argument of its sys.exit()."""
    path = Path(command[0]).resolve()
    source = path.read_bytes()
    main = ModuleType("__main__")
    main.__file__ = str(path)
    sys.modules["__main__"] = main  # pickle looks up classes there
    sys.argv = command
    sys.path.insert(0, str(path.parent))
    try:
        code = compile(source, path, "exec")
        with profile:
            mend_monitoring()
            exec(code, vars(main))
        return 0
    except SystemExit as stop:
        return stop.code
    except BaseException as error:
        if interrupt.heard:
            print(f"\n{path.name}: interrupted", file=sys.stderr)
            return 128 + interrupt.heard
        trace = error.__traceback__.tb_next  # without this function's own line
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the report is still to be written


def mend_monitoring() -> None:
    """Work around two errors of cProfile in Python 3.12 and later: a phase of 0.90 s showed as 0.03 s.

    cProfile mixes the calls of all threads; mended() hides those of other threads. cProfile takes a function for ended
    when it calls a bound method written in C (pybind11's are); mended() passes the method's function instead.
    """
    if sys.version_info < (3, 12):
        return
    profiled = threading.get_ident()
    register = partial(sys.monitoring.register_callback, sys.monitoring.PROFILER_ID)

    def mended(callback: Callable, *about: object) -> None:
        if threading.get_ident() == profiled:
            callback(*(part.__func__ if isinstance(part, MethodType) else part for part in about))

    on = sys.monitoring.events
    for event in (on.PY_START, on.PY_RESUME, on.PY_THROW, on.PY_RETURN, on.PY_YIELD, on.PY_UNWIND,
                  on.CALL, on.C_RETURN, on.C_RAISE):
        register(event, partial(mended, register(event, None)))


def read_profile(path: Path) -> Stats:
    expected = f"{path}: expected a profile in cProfile's format"
    try:
        return checked(marshal.loads(regular_file(path, "a profile").read_bytes()), Stats, expected)
    except (EOFError, ValueError, TypeError, MemoryError):
        raise UserError(f"{expected}; it is damaged or another file") from None


def readable(func: Func) -> str:
    """train.py:Run.save, torch/nn/functional.py:linear, <built-in method torch._C._nn.linear>: no path, no address."""
    return re.sub(r"^~:|^/.*/(?:(?:site|dist)-packages|lib/python[\d.]+)/|^/[^:]*/| at 0x[0-9a-f]+", "",
                  f"{func[0]}:{func[2]}")


def by_phase(stats: Stats) -> Table:
    """The seconds sum to the script's. A call from one phase's function to another's counts as the caller's phase."""
    phase_of = {func: PHASE_OF[name] for func in stats if (name := readable(func)) in PHASE_OF}
    modules = [func for func in stats if func[2] == "<module>"]
    script = max(modules, key=lambda func: stats[func][3], default=None)  # its time includes those that it imports
    seconds, calls = Counter(), Counter()
    for func, (_, number, _, cumulative, callers) in stats.items():
        if func in phase_of:
            inside = [row for caller, row in callers.items() if caller in phase_of and caller != func]
            seconds[phase_of[func]] += cumulative - sum(row[3] for row in inside)
            calls[phase_of[func]] += number - sum(row[0] for row in inside)
        elif script in callers and "importlib" in func[0]:  # later imports count where they are made
            seconds["Python import"] += callers[script][3]
            calls["Python import"] += callers[script][0]
    seconds["everything else"] = sum(row[2] for row in stats.values()) - seconds.total()
    return seconds, calls


def by_function(stats: Stats, column: int = 2) -> Table:
    """The functions' own (column 2) or cumulative seconds (column 3), without the functions that import others."""
    seconds, calls = Counter(), Counter()
    for func, row in stats.items():
        if not (name := readable(func)).startswith(("<frozen importlib", "<built-in method builtins.exec")):
            seconds[name] += row[column]
            calls[name] += row[1]
    return seconds, calls


def report(stats: Stats, title: str, top: int) -> str:
    phases = by_phase(stats)
    whole = phases[0].total()
    lines = [f"{title}: {whole:.3f} s under cProfile, without other threads and processes"]
    for heading, (seconds, calls), limit in [("phase", phases, None), ("function, own time", by_function(stats), top),
                                             ("function, with callees", by_function(stats, 3), top)]:
        lines += ["", f"{'seconds':>10} {'share':>7} {'calls':>11}  {heading}"]
        lines += [f"{amount:10.3f} {amount / whole:7.1%} {calls[name]:11,}  {name}"
                  for name, amount in seconds.most_common(limit)]
    return "\n".join(lines)


def plot(stats: Stats, title: str, top: int, path: Path) -> None:
    from lib import picture  # only now: imported before the script, matplotlib would be missing from its imports

    phases = by_phase(stats)[0].most_common()
    names, seconds = zip(*phases, *by_function(stats)[0].most_common(top), strict=True)
    figure = picture.new_figure(10, 1 + 0.26 * len(names))
    axis = figure.subplots()
    bars = axis.barh([name[-60:] for name in names], seconds)
    axis.bar_label(bars, fmt="%.3f s", padding=4)
    axis.axhline(len(phases) - 0.5, color="black")
    axis.set(title=title[-80:], ylabel="functions by own time, phases", xticks=[], xmargin=0.15, ymargin=0.02)
    axis.invert_yaxis()
    picture.save(figure, path)


def compare(before: Stats, after: Stats, top: int) -> str:
    """The phases, and the functions whose own time changed most."""
    lines = []
    for heading, table, limit in ("phase", by_phase, None), ("function, own time", by_function, top):
        old, new = table(before)[0], table(after)[0]
        change = {name: new[name] - old[name] for name in {**old, **new}}
        lines += ["", f"{'before':>10} {'after':>10} {'change':>10} {'ratio':>7}  {heading}"]
        for name in sorted(change, key=lambda name: -abs(change[name]))[:limit]:
            ratio = f"{new[name] / old[name]:.2f}" if old[name] else "new"
            lines.append(f"{old[name]:10.3f} {new[name]:10.3f} {change[name]:+10.3f} {ratio:>7}  {name}")
        if table is by_phase:
            lines.append(f"{old.total():10.3f} {new.total():10.3f}  total")
    return "\n".join(lines[1:])


def main() -> None:
    args = sys.argv[1:]
    options = list(takewhile(lambda word: not word.endswith(".py"), args))
    command = args[len(options):]
    config = parse(ProfileConfig, "profile_run.py [OPTIONS] SCRIPT.py [ITS ARGUMENTS]", options)
    if config.compare:
        if len(config.compare) != 2 or config.out or command:
            raise UserError(f"--compare: expected two .prof files, no --out and no script, got {' '.join(args)}")
        print(compare(*map(read_profile, config.compare), config.top))
        return
    if not command:
        raise UserError("expected a script to run, as in: profile_run.py train.py tiny --max-steps 50")
    rank, title = os.environ.get("RANK"), " ".join(command)
    stem = f"{config.out or 'profile-' + Path(command[0]).stem}{f'-rank{rank}' if rank else ''}"
    stem = Path(stem).absolute()  # the script may change the folder
    if not os.access(stem.parent, os.W_OK):  # refused before the script runs for hours
        raise UserError(f"--out {config.out}: expected a folder to write to, {stem.parent} is none")

    profile = cProfile.Profile()
    code = run_script(command, profile)
    if not profile.getstats():  # the script did not compile
        sys.exit(code)
    with atomic_path(Path(f"{stem}.prof")) as temporary:
        profile.dump_stats(temporary)
    if rank in (None, "0"):
        with optional(f"{stem}.png"):
            plot(profile.stats, title, config.top, Path(f"{stem}.png"))
        sys.stdout.flush()  # the report comes after the script's own output
        print("", report(profile.stats, title, config.top), f"-> {stem}.prof, .png", sep="\n\n", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run(main)
