"""How every script of owlet talks to its user: flags, notes, errors, exit codes, Ctrl-C.

Scripts import it first: from then on Ctrl-C ends in one line, also while the slow libraries are imported.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

Config = TypeVar("Config")


class UserError(Exception):
    """Something the user can put right. The message is one line: what, expected, got."""


def one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


# ---------------------------------------------------------------- what is printed

def command(*words: object) -> str:
    """A command as a shell reads it."""
    return shlex.join(map(str, words))


@functools.cache  # the same note once
def note(text: str) -> None:
    """A line on standard error, below a progress bar; of several ranks the first prints."""
    from tqdm import tqdm

    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):  # the disk that holds it may be full
            tqdm.write(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def optional(what: object) -> Iterator[None]:
    """For what a run can do without, such as a picture: where it fails, a note, and the run goes on."""
    try:
        yield
    except BrokenPipeError:  # the reader has left
        raise
    except Exception as error:
        note(f"{what}: {one_line(error).removeprefix(f'{what}: ')}; going on without")


# ---------------------------------------------------------------- flags

def flag(default: Any, help: str, low: float | None = None, high: float = math.inf, positional: bool = False) -> Any:
    """A field of a dataclass of flags. Numbers must lie in low..high."""
    about = {"help": help, "low": low, "high": high, "positional": positional}
    return dataclasses.field(default=default, metadata=about)


def parse(config_class: type[Config], description: str, args: Sequence[str] | None = None,
          default: Config | None = None) -> Config:
    """Flags -> dataclass; `default` replaces the fields' defaults. A wrong flag is a UserError."""
    return dataclasses.replace(default or config_class(), **given(config_class, description, args, default))


def given(config_class: type, description: str = "", args: Sequence[str] | None = None, default: Any = None) -> dict:
    """The flags that stand on the command line, by the names of the dataclass's fields."""
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110))
    types_of = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        value = field.default if default is None else getattr(default, field.name)
        _add(parser, field, types_of[field.name], value)
    args = sys.argv[1:] if args is None else args
    for word in args:  # first, since the value of an unknown flag would be taken for something else
        if word.startswith("--") and word.split("=")[0] not in parser._option_string_actions:
            parser.error(f"unrecognized arguments: {word}")
    found = {name: value for name, value in vars(parser.parse_args(args)).items() if value is not None}
    for name, value in found.items():
        if value == []:  # what argparse makes of --name=--
            parser.error(f"argument --{name.replace('_', '-')}: expected one argument")
    return found


def refuse(flags: dict, names: Iterable[str], why: str) -> None:
    """UserError if one of these stands among the given flags: none is silently without effect."""
    for name in names:
        if name in flags:
            raise UserError(f"{words({name: flags[name]})[0]} has no effect {why}")


def words(settings: dict) -> list[str]:
    """Flags from a dict of their values, so that a file of them is checked as the command line is."""
    return [f"--{'' if value else 'no-'}{name.replace('_', '-')}" if isinstance(value, bool) else
            f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, default: Any) -> None:
    name, options = f"--{field.name.replace('_', '-')}", {}
    about = field.metadata or flag(None, "").metadata
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:  # tuple[X, ...]
        kind, options["nargs"] = get_args(kind)[0], "+"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    options |= {"help": about["help"] + ("" if shown in (None, "") else f" (default: {shown})")}
    if kind is bool:  # --name, and --no-name where that changes something
        action = "store_true" if field.default is False else argparse.BooleanOptionalAction
        parser.add_argument(name, action=action, **options)
        return
    if get_origin(kind) is Literal:
        options["choices"], kind = get_args(kind), str
    else:
        options["metavar"] = kind.__name__.upper()
    if about["positional"]:
        name, options["nargs"], options["default"] = field.name, "?", None
    parser.add_argument(name, type=_conversion(kind, about["low"], about["high"]), **options)


def _path(word: str) -> Path:
    if not word:
        raise ValueError
    return Path(word).expanduser()  # a shell leaves the ~ of --out=~/x


def _conversion(kind: type, low: float | None, high: float) -> Callable[[str], Any]:
    """The conversion of a flag's word; numbers must lie in low..high."""
    what = {int: "a whole number", float: "a number", Path: "a path in UTF-8", str: "text in UTF-8"}[kind]
    most = high if high < math.inf else 10**12 if kind is int else sys.float_info.max

    def convert(word: str) -> Any:
        try:
            word.encode()  # Python takes other bytes than UTF-8 from the command line and fails to print them
            value = (_path if kind is Path else kind)(word)
        except (ValueError, RuntimeError):  # RuntimeError: a ~ where there is no home
            raise argparse.ArgumentTypeError(f"expected {what}, got {word[:60]!a}") from None
        if low is not None and not low <= value <= most:
            expected = f"{low} or more" if high == math.inf and not value > most else f"{low} to {most}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {word[:60]}")
        return value

    return convert


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors of one line."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1) if unknown != message else []
        hint = f" (perhaps {near[0]}?)" if near else ""
        if message.endswith("expected one argument"):
            hint = f" (a value that begins with - is written {message.split()[1].rstrip(':')}=-...)"
        raise UserError(f"{message.removeprefix('argument ').replace('/--no-', ', --no-')}{hint}; see --help")


# ---------------------------------------------------------------- signals, errors, exit codes

@contextlib.contextmanager
def handling(handler: Any, numbers: Iterable[int]) -> Iterator[None]:
    """These signals go to `handler` within this context, or the function that it decorates."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


class _CtrlC:
    """The handler of Ctrl-C, which remembers it: a library may make any error of its KeyboardInterrupt."""

    heard = False

    def __call__(self, *_: object) -> NoReturn:
        self.heard = True
        raise KeyboardInterrupt


_ctrl_c = _CtrlC()


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP ask for a stop, which the loop obeys between two steps, where the state is whole.

    The handler only notes the signal: printing could interrupt a write to the same stream, which Python refuses.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the first signal
        self.when, self.said = 0.0, False

    def heard(self) -> contextlib.AbstractContextManager:
        return handling(self.handle, [signal.SIGINT, *ends()])

    def handle(self, number: int, frame: object) -> None:
        if self.asked is None:
            self.asked, self.when = number, time.monotonic()
        # a second Ctrl-C means at once; but torchrun and schedulers may send a signal twice in a row
        elif number == signal.SIGINT and time.monotonic() - self.when > 1:
            _ctrl_c()

    def say_once(self, say: Callable[[str], None]) -> None:
        if self.asked is not None and not self.said:
            say(f"{signal.Signals(self.asked).name}: saving and stopping (Ctrl-C again: stop at once)")
            self.said = True


def ends() -> list[signal.Signals]:
    """The signals that end a program: SIGTERM, and SIGHUP (the terminal closes) unless it is ignored (nohup)."""
    return [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]


def _stop(number: int, frame: object) -> NoReturn:
    sys.exit(128 + number)  # an exception, so that no temporary file stays behind


def _interrupted(*_: object) -> NoReturn:
    """Ctrl-C while a script imports: an exception would come out as whatever the library makes of it."""
    if multiprocessing.parent_process() is None:  # who started this process says it
        os.write(2, f"\n{Path(sys.argv[0]).name}: interrupted\n".encode())
    os._exit(130)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)


def _os_error(error: OSError) -> str:
    return f"{error.filename or 'file system'}: {error.strerror or error}"


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """What a library's thread cannot write (TensorBoard's on a full disk) does not end a run."""
    if isinstance(failure.exc_value, OSError):
        note(f"{_os_error(failure.exc_value)}; going on without")
    else:
        threading.__excepthook__(failure)


def run(main: Callable[[], None]) -> None:
    """Run a script: a UserError is one line and exit code 2, Ctrl-C is 130 without a traceback."""
    code = 1  # what Python ends with after any other exception
    try:
        _run(main)
        code = 0
    except SystemExit as stop:
        code = (stop.code or 0) if stop.code is None or isinstance(stop.code, int) else 1
        raise
    finally:
        end_at_once.code = code


def end_at_once() -> NoReturn:
    """For atexit: end with the exit code of run(), without Python taking itself down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end_at_once.code)


def _run(main: Callable[[], None]) -> None:
    name, threading.excepthook = Path(sys.argv[0]).name, _thread_failed
    _ctrl_c.heard = False
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the terminal's encoding may lack letters that a book has
    try:
        ours = signal.getsignal(signal.SIGINT) in (_interrupted, signal.default_int_handler)  # not profile_run.py's
        with handling(_ctrl_c, [signal.SIGINT] if ours else []), handling(_stop, ends()):
            main()
            sys.stdout.flush()
        return
    except BrokenPipeError:  # the reader has left, as `head` does: end as SIGPIPE would end us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except UserError as user_error:
        error = str(user_error)
    except OSError as os_error:  # not a bug but the machine's answer: a full disk, a missing permission
        error = _os_error(os_error)
    except (Exception, KeyboardInterrupt) as other:
        if _ctrl_c.heard or isinstance(other, KeyboardInterrupt):
            print(f"\n{name}: interrupted", file=sys.stderr)
            sys.exit(130)
        # torch has no class of its own for a lack of memory on a CPU
        if not isinstance(other, MemoryError) and not re.search("allocate memory|out of memory", str(other)):
            raise
        error = f"out of memory: {one_line(other)}"
    if os.environ.get("LOCAL_RANK", "0") != "0":  # torchrun ends the others once one has ended: one error is said once
        time.sleep(5)
    from tqdm import tqdm

    tqdm.write(f"{name}: {error}", file=sys.stderr)  # below a progress bar, not into it
    sys.exit(2)
