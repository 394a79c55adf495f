"""The teacher `openai-logprobs`: a server that says how likely each token of a text was, and which were likelier."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from kd_openai import wire
from kd_openai.cache import Entry, Ledger, cache_folder
from kd_openai.options import LogprobsOptions
from kd_openai.session import Job, Session
from kd_openai.teacher import read_key
from kdcore.codecs import TopK
from kdcore.data import IGNORE, Task
from kdcore.errors import ModelError
from kdcore.models import Batch, Labels, Model, Outputs
from kdcore.options import Sampling
from kdcore.text import Answer


class _Entry(BaseModel):
    logprob: float


class _Choice(BaseModel):
    prompt_logprobs: list[dict[int, _Entry] | None]


class _Reply(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: wire.Usage | None = None


@dataclass(frozen=True)
class Scored(Answer):
    """What the server says of a text's tokens.

    Args:
        positions: for each token but the first: the likeliest tokens in its place, with their log-probabilities.
    """

    positions: tuple[dict[int, float], ...] = ()


class ScoringSession(Session):
    """A session that has texts scored, given as the numbers of their tokens."""

    async def _post(self, job: Job) -> wire.Reply:
        tokens, wanted = list(job.prompt), {"prompt_logprobs": self.options.k}
        async with asyncio.timeout(self.options.timeout):
            raw = await self._client.completions.with_raw_response.create(
                model=self.options.model, prompt=tokens, max_tokens=1, temperature=0.0,
                extra_body={**self.options.extra, **wanted},
            )  # fmt: skip
        return read_scores(raw.text, len(tokens))

    def _state(self, jobs: Sequence[Job]) -> str:
        return "A run keeps no scores; `kd cache` keeps every shard of them"


def read_scores(body: str, tokens: int) -> wire.Reply:
    """What a reply says of a text of so many tokens.

    Raises:
        MalformedReplyError: if it is not what vLLM says.
    """
    try:
        found = _Reply.model_validate_json(body)
    except ValidationError as error:
        raise wire.MalformedReplyError(
            f"a reply without `prompt_logprobs` that can be read ({wire.first_problem(error)}): is it vLLM?"
        ) from None
    first, *rest = found.choices[0].prompt_logprobs or [None]
    if first is not None or len(rest) != tokens - 1 or not all(rest):
        raise wire.MalformedReplyError(f"`prompt_logprobs` of {len(rest) + 1} positions for a text of {tokens} tokens")
    positions = tuple({token: entry.logprob for token, entry in (place or {}).items()} for place in rest)
    return wire.Reply([Scored("scored", positions=positions)], found.usage.both() if found.usage else None)


class Served(nn.Module):
    """Stands for a language model behind a server: no weights, but a name, by which caches tell it from others.

    Args:
        options: of the teacher.
        classes: how many tokens there are.
    """

    def __init__(self, options: LogprobsOptions, classes: int) -> None:
        super().__init__()
        self.options, self.head = options, TopK(classes)
        if not options.k < classes:
            raise ModelError(f"k: there are {classes} tokens; ask for fewer than that")
        name = f"{options.base_url.rstrip('/')} {options.model} {options.k}".encode()
        self.register_buffer("name", torch.tensor(list(name), dtype=torch.uint8))
        self._sessions: list[ScoringSession] = []

    def session(self) -> ScoringSession:
        """The client, made when the server must be asked."""
        if not self._sessions:
            folder = cache_folder(self.options)
            ledger = Ledger(folder / "spent.jsonl")
            ledger.open()
            key = read_key(self.options.key_env)
            self._sessions.append(ScoringSession(self.options, key, ledger, lambda job: None, str(folder)))
        return self._sessions[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Served:
        return self  # it holds nothing that changes, and a connection cannot be copied

    def forward(self, batch: Batch) -> Outputs:
        """The distributions `[B, T, V]` of the next token, as top-k codes; even ones where there is padding."""
        ids = batch["input_ids"]
        mask = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        texts = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        answers = self.ask([[*text, _next(batch, i, mask)] for i, text in enumerate(texts)])
        codes = self.even().expand(*ids.shape, -1).clone()
        for row, answer in enumerate(answers):
            codes[row, mask[row].cpu()] = torch.stack([self.code(place) for place in answer.positions])
        return Outputs(head=self.head, codes=codes.to(ids.device))

    def ask(self, texts: Sequence[Sequence[int]]) -> list[Scored]:
        """The scores of texts, each of at least two tokens."""
        jobs = [Job(i, list(text), Sampling(), 0, Entry(), {}) for i, text in enumerate(texts)]
        self.session().run(jobs)
        return [job.entry.answers[0] for job in jobs]

    def code(self, place: dict[int, float]) -> Tensor:
        """The k likeliest tokens of a position as `TopK` reads them.

        Raises:
            ModelError: if the server gives fewer, or tokens that are not there.
        """
        k, likeliest = self.options.k, sorted(place.items(), key=lambda entry: -entry[1])
        if len(place) < k:
            raise ModelError(f"the server gives {len(place)} tokens for a position where {k} were asked for: start it "
                             f"with `--max-logprobs {k}`, or set `k` lower")  # fmt: skip
        ids, values = zip(*likeliest[:k], strict=True)
        if max(ids) >= self.head.out_features:
            raise ModelError(f"the server names the token {max(ids)}, and the data has {self.head.out_features}: it "
                             "serves a model with another tokenizer, or give its `size`")  # fmt: skip
        rest = max(1 - math.fsum(map(math.exp, values)), 1e-7)  # as exact as float32 sums are
        return torch.tensor([*map(float, ids), *values, math.log(rest)])

    def even(self) -> Tensor:
        """The codes of an even distribution."""
        k, classes = self.options.k, self.head.out_features
        share = -math.log(classes)
        return torch.tensor([*map(float, range(k)), *([share] * k), math.log(1 - k / classes)])


def _next(batch: Batch, row: int, mask: Tensor) -> int:
    """A token to follow the last of a row: what the server says in its place is the distribution after the last."""
    last = int(mask[row].nonzero()[-1])
    label = int(batch["labels"][row, last]) if "labels" in batch else IGNORE
    return label if label != IGNORE else int(batch["input_ids"][row, last])


def served(options: LogprobsOptions, task: Task) -> Model:
    """A teacher of distributions behind a server.

    Raises:
        ModelError: if the data has no tokens.
    """
    if task.kind != "causal-lm" or task.num_classes is None:
        raise ModelError(f"openai-logprobs scores texts; the data poses a task of kind {task.kind!r}")
    classes = options.size or task.num_classes
    return Model(Served(options, classes), lambda module, batch: module(batch),
                 labels=Labels(classes, None, task.vocabulary), tokenizer=task.tokenizer)  # fmt: skip
