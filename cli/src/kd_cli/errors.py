"""How a command ends when something goes wrong: a message for people, and an exit status."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import typer

from kdcore.errors import Interrupted, KDError, UserError, shown, visible

UNEXPECTED = "unexpected error"
LAUNCHED = "KD_LAUNCHED"
"""Set by `kd run --processes`, which tells the errors of its processes itself, each once."""


def is_main_process() -> bool:
    """Whether this process is the one that speaks, of those a launcher started together."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """End the program with a message instead of a traceback. Typer's own errors and broken pipes are left to Typer."""
    try:
        yield
    except (typer.TyperException, typer.Exit, typer.Abort, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _end("interrupted", "", 130)
    except KDError as error:
        _end("interrupted" if isinstance(error, Interrupted) else "error", str(error), error.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # a name of ours never is
            _end("error", f"{shown(error.filename)}: {error.strerror}", UserError.exit_code)
        _end(UNEXPECTED, f"{type(error).__name__}: {error}", 1)


def say(label: str, message: str, colour: str = "red") -> None:
    """A message on stderr, its label in colour where that is a terminal."""
    label = visible(label)
    typer.secho(f"{label}:" if message else label, fg=colour, bold=True, nl=not message, err=True)
    if message:
        typer.echo(f" {visible(message)}", err=True)
    if label == UNEXPECTED and not _debugging():
        typer.echo("set KD_DEBUG=1 for the traceback", err=True)


def _end(label: str, message: str, code: int) -> NoReturn:
    if _debugging():
        traceback.print_exc()
    if is_main_process() and (label == "interrupted" or LAUNCHED not in os.environ):
        say(label, message)
    if where := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # from here the launcher learns what happened
        Path(where).write_text(json.dumps({"message": f"{label}: {message}", "timestamp": int(time.time())}))
    raise SystemExit(code)


def _debugging() -> bool:
    return os.environ.get("KD_DEBUG", "0") not in ("", "0")
