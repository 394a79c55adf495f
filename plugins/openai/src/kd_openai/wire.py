"""What goes over the wire: requests to a server, and what is read of its replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from kd_openai.options import OPENAI, OpenAIOptions
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt


class MalformedReplyError(Exception):
    """A reply that is not what the protocol says, such as JSON that is cut off."""


@dataclass(frozen=True)
class Reply:
    """What a server said.

    Args:
        answers: one per choice; the server may give fewer than it was asked for.
        usage: tokens of prompt and answers, where it counts both.
    """

    answers: list[Answer]
    usage: tuple[int, int] | None


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as the messages of a chat."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def request(options: OpenAIOptions, prompt: Prompt, sampling: Sampling, n: int, seed: int) -> dict[str, Any]:
    """The arguments of the client's `create`.

    OpenAI's own models refuse arguments that they do not know, even at their default, and want the limit under its
    newer name; other servers take their defaults from the model's files, so that these must be said.
    """
    hosted = options.base_url.rstrip("/") == OPENAI
    chat = options.mode == "chat"
    found: dict[str, Any] = {"model": options.model, "seed": seed, "extra_body": options.extra}
    found |= {"messages": messages(prompt)} if chat else {"prompt": prompt}
    if "max_completion_tokens" not in options.extra:
        found["max_completion_tokens" if chat and hosted else "max_tokens"] = sampling.max_tokens
    if not hosted or sampling.temperature != 1.0:
        found["temperature"] = sampling.temperature
    if not hosted or sampling.top_p != 1.0:
        found["top_p"] = sampling.top_p
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name):
            found[name] = getattr(sampling, name)
    if n > 1:
        found["n"] = n
    if sampling.stop:
        found["stop"] = list(sampling.stop)
    if sampling.logprobs:
        found["logprobs"] = True if chat else 1
    if sampling.json_schema is not None and chat:
        schema = {"name": "answer", "schema": sampling.json_schema}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found


def estimate(texts: Sequence[str]) -> int:
    """Roughly how many tokens some texts have: one for four bytes."""
    return sum(math.ceil(len(text.encode()) / 4) for text in texts)


def prompt_tokens(prompt: Prompt | list[int]) -> int:
    """Roughly how many tokens a prompt has, where they are not given."""
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        return len(prompt)
    return estimate([message["content"] for message in messages(prompt)])


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int | None = Field(None, ge=0)
    completion_tokens: int | None = Field(None, ge=0)

    def both(self) -> tuple[int, int] | None:
        """Of prompt and answers, where both are counted."""
        if self.prompt_tokens is None or self.completion_tokens is None:
            return None  # half a count would let a budget be passed unseen
        return self.prompt_tokens, self.completion_tokens


class _Token(BaseModel):
    logprob: float


class _ChatLogprobs(BaseModel):
    content: list[_Token] | None = None

    def values(self) -> list[float | None] | None:
        return None if self.content is None else [token.logprob for token in self.content]


class _TextLogprobs(BaseModel):
    token_logprobs: list[float | None] | None = None

    def values(self) -> list[float | None] | None:
        return self.token_logprobs


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _ChatChoice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _ChatLogprobs | None = None

    def said(self) -> tuple[str, str]:
        finish = self.finish_reason or "stop"
        return self.message.content or "", "content_filter" if self.message.refusal else finish


class _TextChoice(BaseModel):
    text: str
    finish_reason: str | None = None
    logprobs: _TextLogprobs | None = None

    def said(self) -> tuple[str, str]:
        return self.text, self.finish_reason or "stop"


class _ChatReply(BaseModel):
    choices: list[_ChatChoice] = Field(min_length=1)
    usage: Usage | None = None


class _TextReply(BaseModel):
    choices: list[_TextChoice] = Field(min_length=1)
    usage: Usage | None = None


def read_reply(mode: str, body: str) -> Reply:
    """The answers in a reply's body.

    An answer's log-probability is the sum over its tokens. Its length is known where their log-probabilities are given,
    or where it is the only one.

    Raises:
        MalformedReplyError: if the body is not what the protocol says.
    """
    try:
        found = (_ChatReply if mode == "chat" else _TextReply).model_validate_json(body)
    except ValidationError as error:
        beginning = " ".join(body.split())[:200]
        what = first_problem(error)
        raise MalformedReplyError(f"a reply that cannot be read ({what}): {beginning!r}") from None
    counted = found.usage
    tokens = counted.completion_tokens if counted and len(found.choices) == 1 else None
    return Reply([_answer(choice, tokens) for choice in found.choices], counted.both() if counted else None)


def first_problem(error: ValidationError) -> str:
    """What pydantic says first, on one line."""
    first = error.errors()[0]
    return ": ".join([".".join(map(str, first["loc"])), first["msg"]]).removeprefix(": ")


def _answer(choice: _ChatChoice | _TextChoice, tokens: int | None) -> Answer:
    text, finish = choice.said()
    values = choice.logprobs.values() if choice.logprobs else None
    if not values or None in values:
        return Answer(text, finish, None, tokens)
    return Answer(text, finish, sum(value for value in values if value is not None), len(values))
