"""How every script of owlet talks to its user: flags, notes, errors, exit codes, signals."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta
from tqdm import tqdm

STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP  # Ctrl-C; a scheduler's end; a closed terminal


class UserError(Exception):
    """Something the user can put right. The message is one line: what, expected, got."""


def one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return (str(error) or type(error).__name__).strip().splitlines()[0]


# ---------------------------------------------------------------- what is printed

def command(*words: object) -> str:
    """A command as a shell reads it."""
    return shlex.join(map(str, words))


@functools.cache  # prints each note once
def note(text: str) -> None:
    """A line on standard error, below a progress bar; of several ranks the first prints."""
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

Count = Annotated[int, Meta(ge=1, le=10**12)]
NonNegative = Annotated[float, Meta(ge=0, le=sys.float_info.max)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Threads = Annotated[int, Meta(ge=1, le=4096)]


def flag(default: Any, help: str, positional: bool = False) -> Any:
    """A field of a dataclass of flags. Its annotation declares its type and range; its metadata are for argparse."""
    return dataclasses.field(default=default, metadata={"help": help} | ({"nargs": "?"} if positional else {}))


def parse(config_class: type, description: str, args: Sequence[str] | None = None, default: Any = None) -> Any:
    """Flags -> dataclass; `default` replaces the fields' defaults. A wrong flag is a UserError."""
    return dataclasses.replace(default or config_class(), **given(config_class, description, args, default))


def given(config_class: type, description: str = "", args: Sequence[str] | None = None, default: Any = None) -> dict:
    """The flags that stand on the command line, by the names of the dataclass's fields."""
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=functools.partial(
        argparse.HelpFormatter, max_help_position=28, width=110))
    kinds = get_type_hints(config_class, include_extras=True)
    for field in dataclasses.fields(config_class):
        kind, value = kinds[field.name], getattr(default or config_class, field.name)
        options = dict(field.metadata)
        name = field.name if "nargs" in options else f"--{field.name.replace('_', '-')}"
        if type(None) in get_args(kind):  # X | None
            kind = get_args(kind)[0]
        elif get_origin(kind) is tuple:  # tuple[X, ...]
            kind, value, options["nargs"] = get_args(kind)[0], " ".join(map(str, value)), "+"
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options["type"] = functools.partial(_value, kind, name)
        if value not in (None, ""):
            options["help"] += f" (default: {value})"
        parser.add_argument(name, **options)

    args, known = sys.argv[1:] if args is None else args, parser._option_string_actions
    for word in args:  # before argparse, which may take the value of an unknown flag for a positional
        name, _, value = word.partition("=")
        if name.startswith("--") and (name not in known or value == "--"):  # argparse drops a value of "--"
            near = difflib.get_close_matches(name, known, 1)
            parser.error(f"unrecognized arguments: {word}" + (f" (perhaps {near[0]}?)" if near else ""))
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in vars(parser.parse_args(args)).items() if value is not None}


def refuse(flags: dict, names: Iterable[str], why: str, positional: str = "") -> None:
    """UserError if one of these names is among the given flags. `positional` is the one written without dashes."""
    for name in names:
        if name in flags:
            word = flags[name] if name == positional else f"--{name.replace('_', '-')}={flags[name]}"
            raise UserError(f"{word} has no effect {why}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = " (one that begins with - is written --name=-...)" * message.endswith("expected one argument")
        raise UserError(f"{message.removeprefix('argument ')}{hint}; see --help")


def _value(kind: Any, name: str, word: str) -> Any:
    """A word of the command line as the type `kind`. `name` is the flag's, for the message."""
    try:
        word.encode()  # the command line may hold other bytes than UTF-8, which could not be printed
        if getattr(kind, "__origin__", kind) is float:
            word = float(word)  # msgspec does not take .5
        return msgspec.convert(word, kind, strict=False, dec_hook=_decode)
    except (ValueError, RuntimeError) as error:  # RuntimeError: a ~ where there is no home
        what = str(error).split(", got")[0]  # msgspec says that it got a `str`
        raise UserError(f"{name} {word!a:.60}: {what[0].lower()}{what[1:]}") from None


def checked(value: Any, kind: Any, where: object) -> Any:
    """Convert `value` to the type `kind`, whose annotations declare types and ranges; dataclasses are made from dicts.

    Raises UserError, which names the field in `where`.
    """
    try:
        return msgspec.convert(value, kind, dec_hook=_decode)
    except (ValueError, RuntimeError) as error:
        what, _, field = str(error).partition(" - at `$.")
        raise UserError(": ".join(filter(None, [str(where), field.strip("`"), what[0].lower() + what[1:]]))) from None


def _decode(kind: type, value: object) -> Any:
    """For msgspec, which does not know paths: they are made from text."""
    if kind is not Path or not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")
    return Path(value).expanduser()  # the shell leaves the ~ of --out=~/x


# ---------------------------------------------------------------- signals, errors, exit codes

@contextlib.contextmanager
def handling(handler: Any, numbers: Iterable[int]) -> Iterator[None]:
    """Within this context `handler` takes these signals, except those that the process ignores (nohup)."""
    before = {n: signal.signal(n, handler) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def interrupt(number: int, frame: object) -> NoReturn:
    """The handler of run(). It raises an exception, so that no temporary file stays behind."""
    interrupt.heard = number  # a library may turn the exception into any other
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP ask for a stop, which the loop obeys between two steps, where the state is whole.

    The handler only notes the signal: printing could interrupt a write to the same stream, which Python refuses.
    """

    asked: int | None = None  # the first signal
    when, said = 0.0, False

    def heard(self) -> contextlib.AbstractContextManager:
        return handling(self.handle, STOPS)

    def handle(self, number: int, frame: object) -> None:
        if self.asked is None:
            self.asked, self.when = number, time.monotonic()
        # a second Ctrl-C stops at once; but torchrun and schedulers may send a signal twice in a row
        elif number == signal.SIGINT and time.monotonic() - self.when > 1:
            interrupt(number, frame)

    def say_once(self, say: Callable[[str], None]) -> None:
        if self.asked is not None and not self.said:
            say(f"{signal.Signals(self.asked).name}: saving and stopping (Ctrl-C again: stop at once)")
            self.said = True


def end_at_once() -> NoReturn:
    """For atexit: end with the exit code of run(), without Python taking itself down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end_at_once.code)


def run(main: Callable[[], None]) -> None:
    """Run a script and exit. An error that is no bug is one line and exit code 2; Ctrl-C is one line and 130."""
    interrupt.heard, end_at_once.code = None, 1  # the exit code after a bug
    # what TensorBoard's thread cannot write, on a full disk, does not end a run
    threading.excepthook = lambda failed: (
        note(f"{one_line(failed.exc_value)}; going on without") if isinstance(failed.exc_value, OSError)
        else threading.__excepthook__(failed))
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:  # it was closed before
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the terminal's encoding may lack letters that a book has
    code: int | str | None = 0
    try:
        with handling(interrupt, STOPS):
            main()
            sys.stdout.flush()
    except SystemExit as stop:
        code = stop.code
    except BrokenPipeError:  # the reader has left, as `head` does: end as SIGPIPE would end us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (Exception, KeyboardInterrupt) as error:
        name, code = Path(sys.argv[0]).name, 2
        no_memory = re.search("allocate memory|out of memory", str(error))  # torch has no class for that on a CPU
        if interrupt.heard or isinstance(error, KeyboardInterrupt):
            print(f"\n{name}: interrupted", file=sys.stderr)
            code = 128 + (interrupt.heard or signal.SIGINT)
        elif no_memory or isinstance(error, (UserError, OSError, MemoryError)):
            if os.environ.get("LOCAL_RANK", "0") != "0":
                time.sleep(5)  # torchrun ends the other ranks once one has ended: one error is said once
            tqdm.write(f"{name}: {one_line(error)}", file=sys.stderr)  # below a progress bar, not into it
        else:
            raise
    end_at_once.code = 1 if isinstance(code, str) else code or 0
    sys.exit(code)
