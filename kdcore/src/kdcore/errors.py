"""Errors that are for people: what is wrong, where, and what to do about it.

Everything a user can get wrong raises a subclass of `UserError` (exit status 2 on the command line); a run that
fails for another reason raises `RunFailed` (exit status 1), one that was asked to stop `Interrupted` (130), one that a
scheduler ended with SIGTERM `Terminated` (75).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class KDError(Exception):
    """Base of all errors this project raises on purpose."""

    exit_code = 1


class UserError(KDError):
    """Wrong input. The message is complete: shown as it is, without a traceback."""

    exit_code = 2


class ComponentError(UserError):
    """A component that does not exist, is named ambiguously, or whose plugin is broken."""


class PluginError(UserError):
    """A plugin that breaks the rules of the hook specifications."""


class RecipeError(UserError):
    """A recipe, or an override of one, that is not valid."""


class DataError(UserError):
    """Data that is missing, malformed, or does not fit the task."""


class ModelError(UserError):
    """A model, tap or signal that cannot be had, or a teacher and student that do not fit together."""


class RunFolderError(UserError):
    """A run folder that exists, is locked, or cannot be written."""


class RunFailed(KDError):  # noqa: N818 - it reads as what happened
    """A run that stopped by itself, such as on a term that became NaN. Checkpoints are kept."""


class Interrupted(KDError):  # noqa: N818
    """The run was interrupted by a signal, after its state was saved."""

    exit_code = 130


class Terminated(Interrupted):
    """The run was ended by SIGTERM, as schedulers send it before they take a machine away: run the same command again.

    The exit status is `EX_TEMPFAIL` of sysexits.h."""

    exit_code = 75


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text that may come from anywhere, for a terminal or a page: control characters and those that turn the direction
    of writing are written as escapes, such as `\\u001b`, as JSON has them. Line breaks and tabs stay."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shown(value: object, longest: int = 200) -> str:
    """A value as part of a message: as text, cut where it is too long to be read."""
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}… ({len(text)} characters)"


def did_you_mean(name: str, valid: Iterable[str], label: str = "valid names") -> str:
    """A sentence that offers the valid names nearest to `name`, or lists them all when none is near."""
    names = sorted(set(valid))
    lowered = {n.lower(): n for n in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(repr(lowered[n]) for n in near)}?"
    shown = ", ".join(names[:12]) + (f", … ({len(names)} in all)" if len(names) > 12 else "")
    return f"{label}: {shown or 'none'}"
