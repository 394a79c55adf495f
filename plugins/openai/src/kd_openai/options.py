"""Options of the teacher `openai`."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from kdcore.options import Options

OPENAI = "https://api.openai.com/v1"
OURS = ("max_tokens", "messages", "model", "n", "prompt", "seed", "stop", "stream", "temperature", "top_p")
"""Fields of a request that come from the recipe and the data."""


class Prices(Options):
    """What a million tokens cost, in a currency of the user's choice."""

    input: float = Field(ge=0, description="a million tokens of prompts")
    output: float = Field(ge=0, description="a million tokens of answers")


class Budget(Options):
    """What may be spent on one model at one server, over all runs that share a cache."""

    tokens: int | None = Field(None, gt=0, description="tokens of prompts and answers together")
    money: float | None = Field(None, gt=0, description="money, at the rates of `prices`")

    @model_validator(mode="after")
    def _says_something(self) -> Budget:
        if self.tokens is None and self.money is None:
            raise ValueError("give `tokens` or `money`, or leave `budget` out")
        return self


class OpenAIOptions(Options):
    """A language model behind a server that speaks the OpenAI protocol."""

    passing: ClassVar[frozenset[str]] = frozenset(
        {"budget", "cache", "concurrency", "key_env", "prices", "requests_per_minute", "retries", "timeout",
         "tokens_per_minute"}
    )  # fmt: skip

    model: str = Field(min_length=1, description="the model's name at the server")
    base_url: str = Field(OPENAI, description="address of the server; most end in /v1")
    mode: Literal["chat", "completion"] = Field(
        "chat",
        description="chat: a prompt that is plain text is one message of the user; completion: it is gone on with",
    )
    key_env: str | None = Field(
        "OPENAI_API_KEY",
        description="environment variable that holds the key, in capitals; null for a server that needs none",
    )
    extra: dict[str, Any] = Field(
        {}, description="further fields of every request, such as vLLM's top_k or chat_template_kwargs"
    )
    concurrency: int = Field(8, gt=0, description="requests under way at a time, in each process")
    requests_per_minute: float | None = Field(None, gt=0, description="requests started in a minute, at most")
    tokens_per_minute: float | None = Field(
        None, gt=0, description="tokens asked for in a minute, at most: prompt and max_tokens of each answer"
    )
    timeout: float = Field(120.0, gt=0, description="seconds until a request is given up")
    retries: int = Field(
        6, ge=0, description="how often a prompt is asked again, after a failure or an answer that cannot be used"
    )
    prices: Prices | None = Field(None, description="price of a million tokens: {input: ..., output: ...}")
    budget: Budget | None = Field(
        None,
        description="when this is spent the run stops: {tokens: ...} or {money: ...}, over all runs with this cache",
    )
    cache: str | None = Field(None, description="folder of all answers; default: in the user's cache folder")

    @model_validator(mode="after")
    def _fits(self) -> OpenAIOptions:  # as a whole: an error about one field would show what it holds, perhaps a key
        url = urlsplit(self.base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("base_url: give the server's address, such as http://localhost:8000/v1")
        if "@" in url.netloc or url.query:
            raise ValueError("base_url: an address with a key or password in it would be kept in the run folder; "
                             "put the key in an environment variable and name that in `key_env`")  # fmt: skip
        if self.key_env is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_env):  # a key has small letters
            raise ValueError("key_env: name the environment variable that holds the key, in capitals; the key itself "
                             "does not belong in a recipe")  # fmt: skip
        if taken := [field for field in OURS if field in self.extra]:
            raise ValueError(f"extra.{taken[0]}: this comes from the recipe's own options; leave it out")
        if self.budget and self.budget.money is not None and self.prices is None:
            raise ValueError("budget.money: money is counted by `prices: {input: ..., output: ...}`; give them too")
        return self


class LogprobsOptions(OpenAIOptions):
    """A language model behind vLLM, which says how likely the tokens of given texts are."""

    mode: Literal["completion"] = Field("completion", description="texts are scored as they are")
    k: int = Field(20, gt=0, description="likeliest tokens of each position; more than 20 want vLLM's --max-logprobs")
    size: int | None = Field(None, gt=0, description="logits of a position; default: as many as the data has tokens")
