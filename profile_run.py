"""Where does the time go? cProfile around any script of this repository, with the script's own arguments.

    python profile_run.py train.py tiny --max-steps 50     -> profile-train.prof and profile-train.png
    python profile_run.py --torch sample.py --max-new-tokens 100
    python profile_run.py --compare before.prof after.prof
    torchrun --nproc_per_node=2 profile_run.py train.py    one profile a rank; rank 0 reports

The script runs as it would alone: its output, its exit code, Ctrl-C. The report follows on standard error.
The .prof file is pstats' own format: `python -m pstats FILE` and snakeviz read it too.
"""

import cProfile
import marshal
import os
import random
import re
import sys
import time
from collections import Counter, defaultdict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from cli import UserError, flag, parse, run

# files, matplotlib and torch are imported where they are used, after the script has run: what is imported before it is
# missing from the phase "Python import" (as torch is under --torch, which needs it first).

Func = tuple[str, int, str]  # file, line, name; pstats' key
Call = tuple[int, int, float, float]  # calls that are not recursive, all calls, own seconds, cumulative seconds
Stats = dict[Func, tuple[int, int, float, float, dict[Func, Call]]]  # the same four, then by caller; pstats' value

IMPORT, REST = "Python import", "everything else"
PHASES = {  # phase -> its functions, as readable() writes them; none of them calls another of the same phase
    "data": ["dataloader.py:TokenData.batch"],
    "forward": ["dataloader.py:forward_loss"],
    "backward": ["torch/_tensor.py:Tensor.backward"],
    "optimizer": ["muon.py:update"],
    "evaluation": ["dataloader.py:evaluate"],
    "checkpoint and log": ["train.py:snapshot", "train.py:Run.wait_for_save",  # files are written in a thread
                           "runlog.py:RunLog.__init__", "runlog.py:RunLog.add"],
    "waiting for other ranks": ["distributed.py:Ranks.sum", "distributed.py:Ranks.all_values"],
    "set-up": ["distributed.py:Ranks.__init__", "train.py:build_model", "muon.py:make_optimizers",
               "machine.py:peak_flops"],
    "load": ["checkpoint.py:load_model", "int8.py:load_quantized"],
    "quantize": ["int8.py:save_quantized", "int8.py:torch_ao", "to_gguf.py:write_gguf"],
    "generation": ["generate.py:_decode"],
    "memory, in a fresh process": ["multiprocessing/pool.py:Pool.apply"],
    "tokenizer": ["checkpoint.py:read_tokenizer", "tokenizers.Tokenizer.encode", "sample.py:Detokenizer.__init__",
                  "sample.py:Detokenizer.__call__", "prepare.py:train_tokenizer", "prepare.py:encode"],
    "text": ["prepare.py:read_text", "prepare.py:clean_plain", "prepare.py:plain_markdown"],
    IMPORT: ["<frozen importlib._bootstrap>:_find_and_load"],
}
PHASE_OF = {function: phase for phase, functions in PHASES.items() for function in functions}


@dataclass
class ProfileConfig:
    out: Path | None = flag(None, "Stem of the files to write; default: profile-SCRIPT in the current folder.")
    top: int = flag(15, "Functions in each table.", 1)
    torch: bool = flag(
        False, "Profile PyTorch's operators too. Takes some 30 MB of memory a training step: use --max-steps 20.")
    compare: tuple[Path, ...] = flag((), "Two .prof files, before and after, to compare. Takes no script.")


def read_args(args: list[str]) -> tuple[ProfileConfig, list[str]]:
    """Our options, and the script's command line: all from the first word on that is not ours."""
    values = {"--out": 1, "--top": 1, "--compare": 2}  # words that follow an option
    end = 0
    while end < len(args) and args[end].startswith("-"):
        end += 1 + values.get(args[end], 0)
    description = "cProfile around any script: profile_run.py [OPTIONS] SCRIPT [ARGUMENTS OF THE SCRIPT]"
    config, command = parse(ProfileConfig, description, args[:end]), args[end:]
    if config.compare and (len(config.compare) != 2 or command):
        raise UserError(f"--compare: expected two .prof files and no script, got {' '.join(args)}")
    if not config.compare and not command:
        raise UserError("expected a script to run, as in: profile_run.py train.py tiny --max-steps 50")
    if not config.compare and not Path(command[0]).is_file():
        raise UserError(f"{command[0]}: expected a Python script, found no such file")
    return config, command


# ---------------------------------------------------------------- running and recording

def run_script(command: list[str], profile: cProfile.Profile, operators: AbstractContextManager) -> int:
    """Run a script as `python SCRIPT ARGS...` would, under both profilers; returns its exit code."""
    path = Path(command[0]).resolve()
    main = ModuleType("__main__")  # stays: pickles, dataclasses and spawned processes look for it by name
    main.__file__ = str(path)
    sys.modules["__main__"], sys.argv, our_path = main, command, sys.path[:]
    sys.path[0] = str(path.parent)
    try:
        code = compile(path.read_bytes(), path, "exec")
        with operators, profile:
            exec(code, main.__dict__)
        return 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:  # KeyboardInterrupt too: what was recorded so far is reported
        trace = error.__traceback__.tb_next  # without this function's own line
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    finally:
        sys.path[:] = our_path


def snapshot(profile: cProfile.Profile) -> Stats:
    """What was recorded, in pstats' form.

    Unlike cProfile's own, the names have their class in them (Block.forward), and functions that share
    file, line and name (generated code, reloaded modules) are summed, where cProfile keeps the last.
    """
    totals: dict[Func, list] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    edges: dict[Func, dict[Func, list]] = defaultdict(lambda: defaultdict(lambda: [0, 0, 0.0, 0.0]))

    def label(code: CodeType | str) -> Func:
        if isinstance(code, str):  # written in C: no file; the address of an object is news in every run
            return "~", 0, re.sub(r" at 0x[0-9a-f]+", "", code)
        return code.co_filename, code.co_firstlineno, code.co_qualname

    for entry in profile.getstats():
        for callee, row in [(entry, totals[label(entry.code)]),
                            *((callee, edges[label(callee.code)][label(entry.code)]) for callee in entry.calls or ())]:
            row[0] += callee.callcount - callee.reccallcount
            row[1] += callee.callcount
            row[2] += callee.inlinetime
            row[3] += callee.totaltime
    return {func: (*row, {caller: tuple(call) for caller, call in edges[func].items()})
            for func, row in totals.items()}


def cost_per_call() -> float:
    """Seconds that cProfile adds to a call on this machine, measured on a Python function that calls one in C."""
    def call() -> int:
        return len("")

    # Many functions in random order: with one alone cProfile's tables stay in cache, and a call costs a third.
    many = 3 * [FunctionType(call.__code__.replace(), globals()) for _ in range(2000)]
    random.Random(0).shuffle(many)

    def timed() -> float:
        start = time.perf_counter()
        for function in many:
            function()
        return time.perf_counter() - start

    plain = min(timed() for _ in range(5))
    with cProfile.Profile():
        profiled = min(timed() for _ in range(5))
    return max(0.0, profiled - plain) / (2 * len(many))


def read_profile(path: Path) -> Stats:
    try:
        stats = marshal.loads(path.read_bytes())
        for (_file, _line, _name), (_primitive, _calls, own, cumulative, callers) in stats.items():
            own + cumulative, callers.items()  # TypeError or AttributeError where the file holds something else
    except (EOFError, ValueError, TypeError, AttributeError, MemoryError):
        raise UserError(f"{path}: expected a profile as cProfile writes them; this is another file, "
                        "or a damaged one") from None
    return stats


# ---------------------------------------------------------------- names, phases

def readable(func: Func) -> str:
    """train.py:evaluate, torch/nn/functional.py:linear, torch._C._nn.linear: no absolute path, no line."""
    file, _, name = func
    if file == "~":
        name = re.sub(r"^<(?:built-in )?(?:method )?(.*)>$", r"\1", name)
        return re.sub(r"^'?(\S+?)'? of '?([^']+?)'? objects?$", r"\2.\1", name)
    library = re.search(r".*/(?:(?:site|dist)-packages|lib/python[\d.]+|Lib)/(.*)", file := file.replace("\\", "/"))
    return f"{library[1] if library else file.rpartition('/')[2]}:{name}"


def total_seconds(stats: Stats) -> float:
    return sum(own for _, _, own, _, _ in stats.values())


def by_phase(stats: Stats) -> dict[str, tuple[float, int]]:
    """Phase -> (seconds, calls), longest first; the seconds are disjoint and sum to the total.

    A phase's function called by another phase's counts there: the forward pass of an evaluation is
    evaluation. An import is an import wherever it happens: the phase around it is shorter by as much.
    """
    phase_of = {func: phase for func in stats if (phase := PHASE_OF.get(readable(func)))}
    seconds, calls = Counter(), Counter()
    for func, phase in phase_of.items():
        _, number, _, cumulative, callers = stats[func]
        inside = [call for caller, call in callers.items()
                  if phase != IMPORT and phase_of.get(caller, phase) != phase]
        seconds[phase] += cumulative - sum(cumulative for _, _, _, cumulative in inside)
        calls[phase] += number - sum(number for _, number, _, _ in inside)
    seconds.subtract(imports_inside(stats, phase_of))
    seconds = Counter({phase: amount for phase, amount in seconds.items() if amount >= 1e-4})
    seconds[REST] = total_seconds(stats) - seconds.total()
    return {phase: (amount, calls[phase]) for phase, amount in seconds.most_common()}


def imports_inside(stats: Stats, phase_of: dict[Func, str]) -> Counter[str]:
    """Phase -> seconds of imports within it, however many calls below its function.

    A profile knows direct callers only. So the seconds climb from caller to caller, shared among several
    as the cumulative time is, until they arrive at a phase, at the import of an outer module, or at the top.
    """
    machinery = {func for func in stats if func[0].startswith("<frozen importlib")
                 or readable(func) in ("builtins.__import__", "importlib/__init__.py:import_module")}
    climbing: Counter[Func] = Counter()
    for func in machinery:
        for caller, (_, _, _, cumulative) in stats[func][4].items():
            climbing[caller] += cumulative
    arrived: Counter[str] = Counter()
    for _ in range(100):  # calls one above the other; nearly all arrive within twenty
        higher: Counter[Func] = Counter()
        for func in climbing.keys() - machinery:
            if func in phase_of:
                arrived[phase_of[func]] += climbing[func]
            elif whole := sum(cumulative for _, _, _, cumulative in stats[func][4].values()):
                for caller, (_, _, _, cumulative) in stats[func][4].items():
                    higher[caller] += climbing[func] * cumulative / whole
        climbing = Counter({func: amount for func, amount in higher.items() if amount > 1e-6})
    return arrived


def by_function(stats: Stats) -> dict[str, tuple[float, float, int]]:
    """Readable name -> (own seconds, cumulative seconds, calls)."""
    rows: dict[str, tuple[float, float, int]] = {}
    for func, (_, calls, own, cumulative, _) in stats.items():
        before = rows.get(name := readable(func), (0.0, 0.0, 0))
        rows[name] = before[0] + own, before[1] + cumulative, before[2] + calls
    return rows


def hottest(stats: Stats, top: int, key: int = 0) -> list[tuple[str, tuple[float, float, int]]]:
    """The `top` functions by own (key 0) or cumulative (key 1) seconds, without the frames of import and exec."""
    rows = [row for row in by_function(stats).items()
            if not row[0].startswith(("<frozen importlib", "builtins.__import__", "builtins.exec"))]
    return sorted(rows, key=lambda row: -row[1][key])[:top]


# ---------------------------------------------------------------- what it says

def clock(seconds: float, sign: str = "") -> str:
    return f"{seconds:{sign}.2f} s" if abs(seconds) >= 1 else f"{seconds * 1e3:{sign}.1f} ms"


def report(stats: Stats, command: str, top: int, cost: float) -> str:
    """The phases, two tables of functions, and what to think of them; cost in seconds per call."""
    total, calls = total_seconds(stats), sum(number for _, number, _, _, _ in stats.values())
    lines = [f"{command}: {clock(total)} under cProfile", "", f"{'time':>10} {'share':>7} {'calls':>11}  phase"]
    lines += [f"{clock(seconds):>10} {seconds / total:7.1%} {f'{number:,}' if number else '':>11}  {phase}"
              for phase, (seconds, number) in by_phase(stats).items()]
    for key, heading in enumerate(("own time", "with callees")):
        lines += ["", f"{heading:>12} {'share':>7} {'calls':>11}  function"]
        lines += [f"{clock(row[key]):>12} {row[key] / total:7.1%} {row[2]:>11,}  {name}"
                  for name, row in hottest(stats, top, key)]
    return "\n".join([*lines, "",
        f"cProfile's own cost: about {clock(cost * calls)} ({cost * calls / total:.1%}) over {calls:,} calls.",
        "It sees the main thread's Python: an operator is one line (--torch looks inside), other threads and",
        "processes are none, and CUDA's work counts where the program waits for it (.item(), .cpu())."])


def plot(stats: Stats, command: str, top: int, path: Path) -> None:
    """Bars: the phases above, the functions with the most own time below."""
    from matplotlib.figure import Figure

    from files import atomic_path

    total = total_seconds(stats)
    panels = {"phases": [(phase, seconds) for phase, (seconds, _) in by_phase(stats).items()],
              "functions by own time": [(name, own) for name, (own, _, _) in hottest(stats, top)]}
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure = Figure(figsize=(10, 0.26 * sum(heights) + 0.6), layout="constrained")
    axes = figure.subplots(2, height_ratios=heights)
    for axis, color, (title, rows) in zip(axes, ("#08519c", "#6baed6"), panels.items(), strict=True):
        names, seconds = zip(*reversed(rows), strict=True)
        bars = axis.barh([name if len(name) < 60 else f"…{name[-58:]}" for name in names], seconds, color=color)
        axis.bar_label(bars, [f"{clock(s)}  {s / total:.1%}" for s in seconds], padding=4, fontsize=9)
        axis.set_title(title, fontsize=10, loc="left", color=color)
        axis.margins(x=0.16, y=0.02)  # room for the longest bar's label
        axis.tick_params(left=False, labelsize=9)
        axis.spines[:].set_visible(False)
        axis.xaxis.set_visible(False)
    figure.suptitle(f"{command if len(command) < 90 else command[:89] + '…'}: {clock(total)}", fontsize=12)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def compare(before: Stats, after: Stats, top: int) -> str:
    """Phases, then the functions whose own time changed most: seconds before and after, difference, ratio."""
    def table(heading: str, old: dict[str, float], new: dict[str, float], limit: int | None = None) -> list[str]:
        lines = [f"{'before':>10} {'after':>10} {'change':>11} {'ratio':>7}  {heading}"]
        for name in sorted(old | new, key=lambda name: -abs(new.get(name, 0) - old.get(name, 0)))[:limit]:
            a, b = old.get(name, 0.0), new.get(name, 0.0)
            ratio = f"{b / a:.2f}" if a and b else "new" if b else "gone"
            lines.append(f"{clock(a):>10} {clock(b):>10} {clock(b - a, '+'):>11} {ratio:>7}  {name}")
        return lines

    totals = [{"total": total_seconds(stats)} for stats in (before, after)]
    phases = [{phase: seconds for phase, (seconds, _) in by_phase(stats).items()} for stats in (before, after)]
    owns = [{name: own for name, (own, _, _) in by_function(stats).items()} for stats in (before, after)]
    return "\n".join([*table("phase", *phases), *table("", *totals)[1:], "", *table("function, own time", *owns, top)])


# ---------------------------------------------------------------- command line

def record(config: ProfileConfig, command: list[str]) -> int:
    """Run the script under the profilers, write the files, report; returns the script's exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shown = f"{config.out or 'profile-' + Path(command[0]).stem}{f'-rank{rank}' if world > 1 else ''}"
    stem = Path(shown).absolute()  # the script may change the folder
    if not os.access(stem.parent, os.W_OK):  # said now, not after hours
        raise UserError(f"--out {shown}: expected a folder to write to, {stem.parent.name}/ is none")
    operators = nullcontext()
    if config.torch:
        import torch

        operators = torch.profiler.profile()
    cost, profile = cost_per_call(), cProfile.Profile()
    code = run_script(command, profile, operators)

    stats = snapshot(profile)
    if not stats:  # not even compiled
        return code
    from files import atomic_path

    files = [f"{shown}.prof"]
    with atomic_path(Path(f"{stem}.prof")) as temporary:
        temporary.write_bytes(marshal.dumps(stats))
    if config.torch:
        files.append(f"{shown}.trace.json")
        with atomic_path(Path(f"{stem}.trace.json")) as temporary:
            operators.export_chrome_trace(str(temporary))
    sys.stdout.flush()  # the report comes after the script's own words
    if rank == 0:
        files.append(f"{shown}.png")
        title = " ".join([Path(command[0]).name, *command[1:]])
        plot(stats, title, config.top, Path(f"{stem}.png"))
        print("", report(stats, title, config.top, cost), sep="\n", file=sys.stderr)
        if config.torch:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            table = operators.key_averages().table(f"self_{device}_time_total", config.top, max_name_column_width=48)
            print("", table, sep="\n", file=sys.stderr)
        print("", f"-> {', '.join(files)}", sep="\n", file=sys.stderr)
    return code


def main() -> None:
    config, command = read_args(sys.argv[1:])
    if config.compare:
        print(compare(*map(read_profile, config.compare), config.top))
    else:
        sys.exit(record(config, command))


if __name__ == "__main__":
    run(main)
