"""Teachers that answer with text, and the prompts they are given."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from kdcore.errors import ModelError, RecipeError, did_you_mean
from kdcore.models import Labels
from kdcore.options import Sampling

Prompt = str | list[dict[str, str]]
"""A text to go on with, or the messages of a chat: `{"role": ..., "content": ...}`."""


@dataclass(frozen=True)
class Answer:
    """What a teacher said to a prompt.

    Args:
        text: the answer without the prompt.
        finish: why it ended: `stop`, `length`, or what else the teacher says.
        logprob: sum of the log-probabilities of its tokens (natural logarithm), where asked for and given.
        tokens: how many tokens it has, where known.
    """

    text: str
    finish: str = "stop"
    logprob: float | None = None
    tokens: int | None = None


class TextTeacher:
    """A teacher that is asked for text: a language model in this process, or a server. A teacher component's target
    returns one in place of a `Model`; a method gets it by `run.text_teacher(role)`.

    Attributes:
        name: what the rows of a corpus name as their origin.
    """

    name: str = "teacher"
    labels = Labels()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Answer]]:
        """`sampling.n` answers to each prompt, in order. Each prompt's answers depend on it and its own seed, as far as
        the teacher can be seeded, and not on the other prompts of the call."""
        raise TypeError(f"{type(self).__name__} does not implement generate(prompts, sampling, seeds)")

    def to(self, device: Any) -> TextTeacher:
        """Move to a device, where that means something; returns itself."""
        return self

    def freeze(self) -> TextTeacher:
        """Nothing to freeze; returns itself."""
        return self

    def eval(self) -> TextTeacher:
        """Nothing to change; returns itself."""
        return self

    def tap(self, *patterns: str) -> NoReturn:
        """Refused: texts hold no activations."""
        raise ModelError(f"{self.name} answers with text; features ({', '.join(patterns)}) need a live model")

    def __call__(self, batch: Any) -> NoReturn:
        """Refused: there are no logits to compare."""
        raise ModelError(f"{self.name} answers with text and gives no logits; this method needs a live model")


def misfit(text: str, schema: Mapping[str, Any]) -> str | None:
    """Why an answer does not fit a JSON Schema (`Sampling.json_schema`); `None` if it does.

    Raises:
        RecipeError: on a `$ref` that leads nowhere; nothing is fetched.
    """
    from jsonschema.exceptions import best_match
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(validator_for(schema)(schema, registry=Registry()).iter_errors(json.loads(text)))
    except ValueError as problem:
        return f"it is no JSON: {problem}"
    except Unresolvable as problem:
        raise RecipeError(f"json_schema: {problem}") from None
    return f"{error.json_path}: {error.message}" if error else None


def render(template: str, row: Mapping[str, Any]) -> str:
    """A prompt from a Jinja2 template and the fields of a row. Templates run in a sandbox.

    Raises:
        RecipeError: on a template that is no Jinja2, would leave the sandbox, fails, or names a field that the row
            does not have.
    """
    from jinja2 import TemplateError, UndefinedError, meta

    try:
        text: str = _compiled(template).render(dict(row))
        return text
    except UndefinedError as error:
        environment = _compiled(template).environment
        unknown = sorted(meta.find_undeclared_variables(environment.parse(template)) - set(row))
        what = f"has no field {unknown[0]!r}; {did_you_mean(unknown[0], row, 'fields')}" if unknown else str(error)
        raise RecipeError(f"the template {_short(template)!r} does not fit the data: a row {what}") from None
    except (TemplateError, ArithmeticError, TypeError, ValueError, LookupError, RecursionError) as error:
        raise RecipeError(f"the template {_short(template)!r} is not valid: {error}") from None


@functools.lru_cache(maxsize=64)
def _compiled(template: str) -> Any:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)


def _short(template: str) -> str:
    return " ".join(template.split())[:60]
