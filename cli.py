"""How every script of owlet talks to its user: flags, errors, exit codes, Ctrl-C."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

Config = TypeVar("Config")


class UserError(Exception):
    """Something the user can put right. The message is one line: what, expected, got."""


def parse(config_class: type[Config], description: str, args: Sequence[str] | None = None,
          default: Config | None = None) -> Config:
    """Flags -> dataclass, by tyro. A wrong flag is one line on stderr and exit code 2."""
    import tyro

    extra = {} if default is None else {"default": default}
    box = io.StringIO()  # tyro frames its errors over several lines; we want the sentence inside
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(config_class, description=description, args=args, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│ \n") for line in box.getvalue().splitlines()]
        body = [line for line in lines if line and not line.startswith("╭")]
        rule = next((i for i, line in enumerate(body) if re.match(r"[─╰]", line)), len(body))
        message = re.sub(r"\[/?bold\]", "", " ".join(body[:rule])) or "the flags could not be read"
        hint = re.search(r"Perhaps you meant:\n?\s*(--[\w-]+)", "\n".join(lines))
        if hint:
            message += f" (perhaps {hint[1]}?)"
        raise UserError(f"{message}; see --help") from None


def run(main: Callable[[], None]) -> None:
    """Run a script: a UserError is one line and exit code 2, Ctrl-C is 130 without a traceback."""
    name = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may lack letters that a book has
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        tqdm.write(f"{name}: {error}", file=sys.stderr)  # below a progress bar, not into it
        sys.exit(2)
    except OSError as error:  # the machine's answer, not a bug: a full disk, a missing right
        if isinstance(error, BrokenPipeError):  # `| head`: the reader has seen enough, as SIGPIPE says elsewhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + 13)
        print(f"{name}: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(130)
