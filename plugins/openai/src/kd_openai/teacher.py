"""The teacher `openai`: prompts in, answers out, nothing asked twice."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from kd_openai.cache import AnswerCache, Ledger, Spent, cache_folder
from kd_openai.options import OpenAIOptions
from kd_openai.session import Job, Session
from kdcore.data import Task
from kdcore.errors import DataError, ModelError
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt, TextTeacher

logger = logging.getLogger(__name__)


class OpenAITeacher(TextTeacher):
    """A language model behind a server.

    Args:
        options: of the teacher.
        task: not read: any data can be asked about.

    Attributes:
        name: the model's.
        cache: every answer so far.

    Raises:
        ModelError: if the cache folder cannot be made.
    """

    def __init__(self, options: OpenAIOptions, task: Task | None = None) -> None:
        self.options, self.name = options, options.model
        folder = cache_folder(options)
        self.cache = AnswerCache(folder)
        self._ledger = Ledger(folder / "spent.jsonl")

    @property
    def spent(self) -> Spent:
        """What all requests of this model with this cache have cost so far."""
        return self._ledger.spent

    @cached_property
    def _session(self) -> Session:
        """Made when the server must be asked: what the cache holds needs neither key nor a folder to write."""
        key = read_key(self.options.key_env)
        self._ledger.open()
        return Session(self.options, key, self._ledger, lambda job: self.cache.write(job.request, job.entry),
                       str(self.cache.folder))  # fmt: skip

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Answer]]:
        """`sampling.n` answers to each prompt, in order: from the cache, or from the server.

        An answer that is empty or does not fit `sampling.json_schema` is asked for again, with another seed. One that
        stays empty is handed back as it is, and so is one that the server withheld (`content_filter`).

        Raises:
            ModelError: if there is no key, the cache cannot be written, the server cannot be reached, or does not know
                the model or the key.
            RecipeError: if `sampling.json_schema` has a `$ref` that leads nowhere.
            DataError: on a prompt that cannot be sent.
            RunFailed: if the budget is spent, or a prompt cannot be answered.
        """
        jobs = [self._job(i, *asked, sampling) for i, asked in enumerate(zip(prompts, seeds, strict=True))]
        unique = {self.cache.path(job.request): job for job in jobs}
        if missing := sum(job.missing > 0 for job in unique.values()):
            before = self.spent.tokens
            self._session.run(list(unique.values()))
            logger.info("%s answered %d prompts (%d more from the cache) for %d tokens",
                        self.name, missing, len(jobs) - missing, self.spent.tokens - before)  # fmt: skip
        return [list(unique[self.cache.path(job.request)].entry.answers) for job in jobs]

    def _job(self, number: int, prompt: Prompt, seed: int, sampling: Sampling) -> Job:
        check_prompt(number, prompt, self.options.mode)
        request: dict[str, Any] = {
            "base_url": self.options.base_url.rstrip("/"), "model": self.options.model, "mode": self.options.mode,
            "extra": self.options.extra, "prompt": prompt, "sampling": sampling.model_dump(mode="json"), "seed": seed,
        }  # fmt: skip
        return Job(number, prompt, sampling, seed, self.cache.read(request), request)


def check_prompt(number: int, prompt: Prompt, mode: str) -> None:
    """Refuse a prompt that cannot be sent. Raises `DataError`, which names it by its number."""
    if isinstance(prompt, str):
        texts = [prompt]
    elif mode == "completion":
        raise DataError(f"prompt {number} is a chat, and `mode: completion` goes on with a text: set `mode: chat`")
    else:
        texts = [message["content"] for message in prompt if isinstance(message.get("content"), str)]
        if len(texts) < len(prompt) or not all("role" in message for message in prompt):
            raise DataError(f"prompt {number}: a chat is a list of messages {{role: ..., content: a text}}")
    try:
        whole = "".join(texts).encode()
    except UnicodeEncodeError:
        raise DataError(f"prompt {number} is not valid Unicode: it has half a surrogate pair") from None
    if not whole.strip():
        raise DataError(f"prompt {number} is empty")


def read_key(variable: str | None) -> str | None:
    """The key in an environment variable; none for a server that needs none.

    Raises:
        ModelError: if it is not there or cannot be a key. The message names the variable, never what it holds.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ModelError(f"the environment variable {variable}, which `key_env` names, holds no key: set it, or set "
                         "`key_env: null` for a server that needs none")  # fmt: skip
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ModelError(f"what the environment variable {variable} holds is no key: it has blanks, line breaks or "
                         "letters beyond ASCII in it")  # fmt: skip
    return key
