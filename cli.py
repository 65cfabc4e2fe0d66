"""How every script of owlet talks to its user: flags, errors, exit codes, Ctrl-C."""

import argparse
import dataclasses
import difflib
import math
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from tqdm import tqdm

Config = TypeVar("Config")


class UserError(Exception):
    """Something the user can put right. The message is one line: what, expected, got."""


# ---------------------------------------------------------------- flags

def flag(default: Any, help: str, low: float | None = None, high: float = math.inf, positional: bool = False,
         renamed: dict[str, str] | None = None) -> Any:
    """A field of a dataclass of flags. Numbers must lie in low..high; `renamed` maps old values to their new names."""
    return dataclasses.field(default=default, metadata={
        "help": help, "low": low, "high": high, "positional": positional, "renamed": renamed or {}})


def parse(config_class: type[Config], description: str, args: Sequence[str] | None = None,
          default: Config | None = None) -> Config:
    """Flags -> dataclass; `default` replaces the fields' defaults. A wrong flag is a UserError."""
    parser = _Parser(description=description, allow_abbrev=False,
                     formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110))
    types_of = get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        value = field.default if default is None else getattr(default, field.name)
        _add(parser, field, types_of[field.name], value)
    args = sys.argv[1:] if args is None else args
    for word in args:  # first, since the value of an unknown flag would be taken for something else
        if word.startswith("--") and word.split("=")[0] not in parser._option_string_actions:
            parser.error(f"unrecognized arguments: {word}")
    return config_class(**vars(parser.parse_args(args)))


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field, kind: Any, default: Any) -> None:
    name, options = f"--{field.name.replace('_', '-')}", {}
    about = field.metadata or flag(None, "").metadata
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is tuple:  # tuple[X, ...]
        kind, options["nargs"] = get_args(kind)[0], "+"
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    options |= {"default": default, "help": about["help"] + ("" if shown in (None, "") else f" (default: {shown})")}
    if kind is bool:  # --name, and --no-name where that changes something
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        parser.add_argument(name, action=action, **options)
        return
    if get_origin(kind) is Literal:
        options["choices"], kind = get_args(kind), str
    else:
        options["metavar"] = kind.__name__.upper()
    if about["positional"]:
        name, options["nargs"] = field.name, "?"
    parser.add_argument(name, type=_conversion(kind, about["low"], about["high"], about["renamed"]), **options)


def _conversion(kind: type, low: float | None, high: float, renamed: dict[str, str]) -> Callable[[str], Any]:
    """The conversion of a flag's word; numbers must lie in low..high."""
    def convert(word: str) -> Any:
        if word in renamed:
            raise argparse.ArgumentTypeError(f"{word} is called {renamed[word]} now")
        try:
            value = kind(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {word!r}") from None
        if low is not None and (not low <= value <= high or value == math.inf):
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {expected}, got {word}")
        return value

    return convert


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors of one line."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1) if unknown != message else []
        hint = f" (perhaps {near[0]}?)" if near else ""
        raise UserError(f"{message.removeprefix('argument ').replace('/--no-', ', --no-')}{hint}; see --help")


# ---------------------------------------------------------------- signals, errors, exit codes

class StopSignals:
    """SIGINT and SIGTERM ask for a stop, which the loop obeys between two steps, where the state is whole.

    The handler only notes the signal: printing could interrupt a write to the same stream, which Python refuses.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the first signal
        self.when, self.said = 0.0, False

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        if self.asked is None:
            self.asked, self.when = number, time.monotonic()
        # a second Ctrl-C means at once; but torchrun and schedulers may send a signal twice in a row
        elif number == signal.SIGINT and time.monotonic() - self.when > 1:
            raise KeyboardInterrupt

    def say_once(self, say: Callable[[str], None]) -> None:
        if self.asked is not None and not self.said:
            say(f"{signal.Signals(self.asked).name}: saving and stopping (Ctrl-C again: stop at once)")
            self.said = True


def run(main: Callable[[], None]) -> None:
    """Run a script: a UserError is one line and exit code 2, Ctrl-C is 130 without a traceback."""
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # the terminal's encoding may lack letters that a book has
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        tqdm.write(f"{name}: {error}", file=sys.stderr)  # below a progress bar, not into it
        sys.exit(2)
    except BrokenPipeError:  # the reader has left, as `head` does: end as SIGPIPE would end us
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except OSError as error:  # not a bug but the machine's answer: a full disk, a missing permission
        print(f"{name}: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
