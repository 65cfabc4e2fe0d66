"""Where does the time go? Runs any script of this repository under cProfile, with the script's own arguments.

    python profile_run.py train.py tiny --max-steps 50     -> profile-train.prof and profile-train.png
    python profile_run.py --torch sample.py --max-new-tokens 100
    python profile_run.py --compare before.prof after.prof
    torchrun --nproc_per_node=2 profile_run.py train.py    one profile per rank; rank 0 reports

The script behaves as without the profiler: same output, exit code and Ctrl-C. The report goes to standard error.
The .prof file has pstats' format: `python -m pstats FILE` and snakeviz read it too.
"""

import cProfile
import marshal
import os
import random
import re
import shlex
import signal
import sys
import threading
import timeit
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

from cli import Count, UserError, flag, given, handling, optional, parse, refuse, run

# files, matplotlib and torch are imported after the script has run. A module imported earlier would be missing from the
# phase "Python import", as torch is under --torch.

Func = tuple[str, int, str]  # file, line, name: pstats' key
Row = tuple[int, int, float, float]  # calls without recursive ones, all calls, own seconds, cumulative seconds
Stats = dict[Func, tuple[int, int, float, float, dict[Func, Row]]]  # a Row, and the Row of each caller: pstats' value

IMPORT, REST = "Python import", "everything else"
PHASES = {  # phase -> functions as readable() writes them; no function calls another one of its phase
    "data": ["dataloader.py:TokenData.batch"],
    "forward": ["dataloader.py:forward_loss"],
    "backward": ["torch/_tensor.py:Tensor.backward"],
    "optimizer": ["muon.py:update"],
    "evaluation": ["dataloader.py:evaluate"],
    "checkpoint and log": ["train.py:snapshot", "train.py:Run.wait_for_save",  # a thread writes the files
                           "runlog.py:RunLog.__init__", "runlog.py:RunLog.add"],
    "waiting for other ranks": ["distributed.py:Ranks.all_values"],
    "set-up": ["distributed.py:Ranks.__init__", "train.py:prepared", "train.py:build_model", "muon.py:make_optimizers",
               "muon.py:pick_dtypes", "machine.py:peak_flops"],
    "load": ["checkpoint.py:load_model", "int8.py:load_quantized"],
    "quantize": ["smooth.py:smooth", "int8.py:save_quantized", "int8.py:torch_ao", "to_gguf.py:write_gguf"],
    "generation": ["generate.py:_decode"],
    "memory, in a fresh process": ["multiprocessing/pool.py:Pool.apply"],
    "tokenizer": ["checkpoint.py:read_tokenizer", "checkpoint.py:token_ids", "sample.py:Detokenizer.__init__",
                  "sample.py:Detokenizer.__call__", "corpus.py:train_tokenizer"],
    "text": ["corpus.py:read_text", "corpus.py:clean_plain", "corpus.py:plain_markdown"],
    IMPORT: ["<frozen importlib._bootstrap>:_find_and_load"],
}
PHASE_OF = {function: phase for phase, functions in PHASES.items() for function in functions}
IMPORT_FRAMES = ("<frozen importlib", "builtins.__import__", "importlib/__init__.py:import_module")


@dataclass
class ProfileConfig:
    out: Path | None = flag(None, "Stem of the files to write; default: profile-SCRIPT in the current folder.")
    top: Count = flag(15, "Functions in each table.")
    torch: bool = flag(False, "Profile PyTorch's operators too. Takes some 30 MB a training step: use --max-steps 20.")
    compare: tuple[Path, ...] = flag((), "Two .prof files, before and after, to compare. Takes no script.")


# ---------------------------------------------------------------- recording

def run_script(command: list[str], profile: cProfile.Profile, operators: AbstractContextManager) -> int:
    """Run a script as `python SCRIPT ARGS...` would, under both profilers. Returns its exit code.

    From Ctrl-C on, whatever the script was doing, what was recorded until then is all there will be.
    """
    interrupted = []

    def interrupt(number: int, frame: object) -> None:
        interrupted.append(number)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the report is to be written
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    path = Path(command[0]).resolve()
    main = ModuleType("__main__")  # stays: pickle, dataclasses and spawned processes look it up by name
    main.__file__ = str(path)
    sys.modules["__main__"], sys.argv, our_path = main, command, sys.path[:]
    sys.path[0] = str(path.parent)
    try:
        code = compile(path.read_bytes(), path, "exec")
        with operators, profile:
            mend_monitoring()
            exec(code, main.__dict__)
        return 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException as error:
        if interrupted:  # by Ctrl-C, of which a library that was being imported may have made another error
            print(f"\n{Path(command[0]).name}: interrupted", file=sys.stderr)
            return 130
        trace = error.__traceback__.tb_next  # without this function's own line
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        return 1
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the report is written
        sys.path[:] = our_path


def mend_monitoring() -> None:
    """Mend what a running cProfile reports from Python 3.12 on.

    It takes the calls of all threads for those of one, and a bound method in C (pybind11's are) for one that returns
    without a call: each leaves out a caller from then on.
    """
    if not hasattr(sys, "monitoring"):
        return
    this, on = threading.get_ident(), partial(sys.monitoring.register_callback, sys.monitoring.PROFILER_ID)
    for name in ("PY_START", "PY_RESUME", "PY_THROW", "PY_RETURN", "PY_YIELD", "PY_UNWIND",
                 "CALL", "C_RETURN", "C_RAISE"):
        event = getattr(sys.monitoring.events, name)

        def forward(code: CodeType, *of: object, theirs: Callable = on(event, None)) -> None:  # noqa: B008
            if threading.get_ident() == this:
                theirs(code, *(part.__func__ if type(part) is MethodType else part for part in of))

        on(event, forward)


def add(table: dict, key: object, row: tuple) -> None:
    """Add a row of numbers to the table's row for `key`."""
    table[key] = tuple(map(sum, zip(table[key], row, strict=True))) if key in table else row


def snapshot(profile: cProfile.Profile) -> Stats:
    """The recorded calls in pstats' form.

    Unlike cProfile's own snapshot, names contain the class (Block.forward), and functions with the same
    file, line and name (generated code, reloaded modules) are summed, where cProfile keeps the last one.
    """
    def label(code: CodeType | str) -> Func:
        if isinstance(code, str):  # a function in C has no file; an object's address differs from run to run
            return "~", 0, re.sub(r" at 0x[0-9a-f]+", "", code)
        return code.co_filename, code.co_firstlineno, code.co_qualname

    rows: dict[Func, dict[Func | None, Row]] = defaultdict(dict)  # function -> caller, or None for all callers -> row
    for entry in profile.getstats():
        for called, caller in [(entry, None), *((callee, label(entry.code)) for callee in entry.calls or ())]:
            row = called.callcount - called.reccallcount, called.callcount, called.inlinetime, called.totaltime
            add(rows[label(called.code)], caller, row)
    return {func: (*callers.pop(None), callers) for func, callers in rows.items() if None in callers}


def cost_per_call() -> float:
    """Seconds that cProfile adds to a call on this machine, measured on a Python function that calls one in C."""
    # Many functions in random order: with a single one cProfile's tables stay in cache, and a call costs a third.
    functions = [FunctionType((lambda: len("")).__code__.replace(), globals()) for _ in range(2000)]
    many = random.Random(0).choices(functions, k=6000)
    timer = timeit.Timer(lambda: [function() for function in many])
    plain = min(timer.repeat(number=1))
    with cProfile.Profile():
        mend_monitoring()
        profiled = min(timer.repeat(number=1))
    return max(0.0, profiled - plain) / (2 * len(many))


def read_profile(path: Path) -> Stats:
    from files import checked, plain_file

    try:
        stats = marshal.loads(plain_file(path, "a profile").read_bytes())
    except (EOFError, ValueError, TypeError, MemoryError):
        raise UserError(f"{path}: expected a profile in cProfile's format; it is damaged or another file") from None
    return checked(stats, Stats, f"{path}: expected a profile in cProfile's format")


# ---------------------------------------------------------------- names and phases

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
    """Phase -> (seconds, calls), longest first. The seconds are disjoint and sum to the total.

    A phase that runs inside another one counts as the outer one: the forward pass of an evaluation is
    evaluation. Imports are the exception: an import is always "Python import", never the phase around it.
    """
    names = {func: readable(func) for func in stats}
    phase_of = {func: PHASE_OF[name] for func, name in names.items() if name in PHASE_OF}
    frames = {func for func, name in names.items() if name.startswith(IMPORT_FRAMES)}
    seconds, calls = Counter(), Counter()
    for func, phase in phase_of.items():
        _, number, _, cumulative, callers = stats[func]
        inside = [row for caller, row in callers.items() if phase_of.get(caller, phase) != phase != IMPORT]
        calls[phase] += number - sum(row[1] for row in inside)
        seconds[phase] += cumulative - sum(row[3] for row in inside)

    # A profile records direct callers only. So the seconds of imports are passed up from callee to callers, shared in
    # proportion to the callers' seconds, until they reach a phase (which loses them), an outer import, or the top.
    climbing = {func: sum(row[3] for row in stats[func][4].values()) for func in frames}
    for _ in range(100):  # levels of the call stack; nearly all arrive within twenty
        higher: Counter[Func] = Counter()
        for func, amount in climbing.items():
            callers = stats[func][4]
            scale = amount / (sum(row[3] for row in callers.values()) or 1)
            for caller in callers.keys() - frames:
                if caller in phase_of:
                    seconds[phase_of[caller]] -= callers[caller][3] * scale
                else:
                    higher[caller] += callers[caller][3] * scale
        climbing = {func: amount for func, amount in higher.items() if amount > 1e-9}

    seconds = Counter({phase: amount for phase, amount in seconds.items() if amount >= 1e-4})
    seconds[REST] = total_seconds(stats) - seconds.total()
    return {phase: (amount, calls[phase]) for phase, amount in seconds.most_common()}


def by_function(stats: Stats) -> dict[str, tuple[float, float, int]]:
    """Readable name -> (own seconds, cumulative seconds, calls)."""
    rows: dict[str, tuple[float, float, int]] = {}
    for func, (_, calls, own, cumulative, _) in stats.items():
        add(rows, readable(func), (own, cumulative, calls))
    return rows


def hottest(stats: Stats, top: int, key: int = 0) -> list[tuple[str, float, int]]:
    """(name, seconds, calls) of the `top` functions by own (key 0) or cumulative (key 1) time, no frames of import."""
    rows = [(name, row[key], row[2]) for name, row in by_function(stats).items()
            if not name.startswith((*IMPORT_FRAMES, "builtins.exec"))]
    return sorted(rows, key=lambda row: -row[1])[:top]


# ---------------------------------------------------------------- reports

def clock(seconds: float, sign: str = "") -> str:
    return f"{seconds:{sign}.2f} s" if abs(seconds) >= 1 else f"{seconds * 1e3:{sign}.1f} ms"


def report(stats: Stats, command: str, top: int, cost: float) -> str:
    """The phases, two tables of functions, and how to read them; cost in seconds per call."""
    total, calls = total_seconds(stats), sum(number for _, number, _, _, _ in stats.values())
    lines = [f"{command}: {clock(total)} under cProfile"]
    phases = [(phase, *row) for phase, row in by_phase(stats).items()]
    tables = {"time": phases, "own time": hottest(stats, top), "with callees": hottest(stats, top, 1)}
    for heading, rows in tables.items():
        lines += ["", f"{heading:>12} {'share':>7} {'calls':>11}  {'phase' if rows is phases else 'function'}"]
        lines += [f"{clock(seconds):>12} {seconds / total:7.1%} {f'{number:,}' if number else '':>11}  {name}"
                  for name, seconds, number in rows]
    return "\n".join([*lines, "",
        f"cProfile's own cost: about {clock(cost * calls)} ({cost * calls / total:.1%}) over {calls:,} calls.",
        "It sees the Python of the main thread: an operator is one line (--torch looks inside), other threads and",
        "processes are missing, and CUDA's work counts where the program waits for it (.item(), .cpu())."])


def plot(stats: Stats, command: str, top: int, path: Path) -> None:
    """Bars: the phases above, the functions with the most own time below."""
    import picture

    total = total_seconds(stats)
    panels = {"phases": [(phase, *row) for phase, row in by_phase(stats).items()],
              "functions by own time": hottest(stats, top)}
    heights = [len(rows) + 1.5 for rows in panels.values()]
    figure = picture.new_figure(10, 0.26 * sum(heights) + 0.6)
    figure.suptitle(f"{command if len(command) < 90 else command[:89] + '…'}: {clock(total)}", fontsize=12)
    for axis, (title, rows) in zip(figure.subplots(2, height_ratios=heights), panels.items(), strict=True):
        names, seconds, _ = zip(*reversed(rows), strict=True)
        bars = axis.barh([name if len(name) < 60 else f"…{name[-58:]}" for name in names], seconds, color="#6baed6")
        axis.bar_label(bars, [f"{clock(s)}  {s / total:.1%}" for s in seconds], padding=4)
        axis.set(title=title, xticks=[], xmargin=0.2, ymargin=0.02)  # xmargin: room for the longest bar's label
        axis.spines[:].set_visible(False)
    picture.save(figure, path)


def compare(before: Stats, after: Stats, top: int) -> str:
    """Phases, then the functions whose own time changed most: seconds before and after, difference, ratio."""
    def table(rows: Callable[[Stats], dict[str, tuple]], limit: int | None = None) -> list[str]:
        old, new = ({name: row[0] for name, row in rows(stats).items()} for stats in (before, after))
        lines = []
        for name in sorted(old | new, key=lambda name: -abs(new.get(name, 0) - old.get(name, 0)))[:limit]:
            a, b = old.get(name, 0.0), new.get(name, 0.0)
            ratio = f"{b / a:.2f}" if a and b else "new" if b else "gone"
            lines.append(f"{clock(a):>10} {clock(b):>10} {clock(b - a, '+'):>11} {ratio:>7}  {name}")
        return lines

    heading = f"{'before':>10} {'after':>10} {'change':>11} {'ratio':>7}"
    return "\n".join([
        f"{heading}  phase", *table(by_phase), *table(lambda stats: {"total": (total_seconds(stats),)}), "",
        f"{heading}  function, own time", *table(by_function, top)])


# ---------------------------------------------------------------- command line

@handling(signal.default_int_handler, [signal.SIGINT])  # run_script changes that, to the end of the report
def record(config: ProfileConfig, command: list[str]) -> int:
    """Run the script under the profilers, write the files, report. Returns the script's exit code."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shown = f"{config.out or 'profile-' + Path(command[0]).stem}{f'-rank{rank}' if world > 1 else ''}"
    stem = Path(shown).absolute()  # the script may change the folder
    if not os.access(stem.parent, os.W_OK):  # refused before the script runs for hours
        raise UserError(f"--out {shown}: expected a folder to write to, {stem.parent.name}/ is none")
    operators = nullcontext()
    if config.torch:
        import torch
        operators = torch.profiler.profile()
    cost, profile = cost_per_call(), cProfile.Profile()
    code = run_script(command, profile, operators)

    stats, title = snapshot(profile), shlex.join([Path(command[0]).name, *command[1:]])
    if not stats:  # the script did not compile
        return code
    from files import atomic_path

    writers = {".prof": lambda path: path.write_bytes(marshal.dumps(stats))}
    if config.torch:
        writers[".trace.json"] = lambda path: operators.export_chrome_trace(str(path))
    for ending, write in writers.items():
        with atomic_path(Path(f"{stem}{ending}")) as temporary:
            write(temporary)
    if rank == 0:
        writers[".png"] = plot
        with optional(f"{stem}.png"):
            plot(stats, title, config.top, Path(f"{stem}.png"))
        parts = [report(stats, title, config.top, cost)]
        if config.torch:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            parts.append(operators.key_averages().table(f"self_{device}_time_total", config.top,
                                                        max_name_column_width=48))
        parts.append(f"-> {', '.join(shown + ending for ending in writers)}")
        sys.stdout.flush()  # the report comes after the script's own output
        print("", "\n\n".join(parts), sep="\n", file=sys.stderr)
    return code


def main() -> None:
    args, end = sys.argv[1:], 0  # the first word that is neither an option nor its value is the script
    while end < len(args) and args[end].startswith("-"):
        end += 1 + {"--out": 1, "--top": 1, "--compare": 2}.get(args[end], 0)
    description = "cProfile around any script: profile_run.py [OPTIONS] SCRIPT [ARGUMENTS OF THE SCRIPT]"
    config, command = parse(ProfileConfig, description, args[:end]), args[end:]
    if config.compare:
        refuse(given(ProfileConfig, args=args[:end]), ["out", "torch"], "with --compare")
        if len(config.compare) != 2 or command:
            raise UserError(f"--compare: expected two .prof files and no script, got {' '.join(args)}")
        print(compare(*map(read_profile, config.compare), config.top))
        return
    if not command:
        raise UserError("expected a script to run, as in: profile_run.py train.py tiny --max-steps 50")
    if not Path(command[0]).is_file():
        raise UserError(f"{command[0]}: expected a Python script, found no such file")
    sys.exit(record(config, command))


if __name__ == "__main__":
    run(main)
