"""Asking a server: many requests at a time, within limits, until each prompt has its answers or something is wrong."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import logging
import math
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from aiolimiter import AsyncLimiter
from openai import APIConnectionError, APIStatusError, AsyncOpenAI, OpenAIError, Timeout
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from kd_openai import wire
from kd_openai.cache import Entry, Ledger
from kd_openai.failures import (
    BUSY,
    EXPECTED,
    BudgetSpentError,
    EmptyError,
    StoppedError,
    UnusableError,
    describe,
    is_transient,
    pause,
)
from kd_openai.options import Budget, OpenAIOptions
from kdcore.data import derive_seed
from kdcore.errors import ModelError, RunFailed, did_you_mean
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt, misfit

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
SECRET = 10
"""Characters of a key that can stand in no answer by chance; a shorter one, such as `EMPTY`, is no secret."""
FIRST_RETRIES = 2
"""How often a server that never answered is tried again: its address may be wrong."""


@dataclass
class Job:
    """One prompt that is asked, and what is known of it.

    Args:
        number: its place among the prompts of the call.
        prompt, sampling, seed: what is asked.
        entry: answers so far.
        request: everything that the answers depend on.
    """

    number: int
    prompt: Prompt | list[int]
    sampling: Sampling
    seed: int
    entry: Entry
    request: dict[str, Any]

    @property
    def missing(self) -> int:
        """How many answers it still needs."""
        return self.sampling.n - len(self.entry.answers)

    @property
    def next_seed(self) -> int:
        """The seed of its next draw; servers take 31 bits."""
        draws = self.entry.draws
        return (derive_seed(self.seed, draws) if draws else self.seed) % 2**31

    def __str__(self) -> str:
        last = self.prompt if isinstance(self.prompt, str) else self.prompt[-1]
        if isinstance(last, int):
            return f"text {self.number} of {len(self.prompt)} tokens"
        short = " ".join((last if isinstance(last, str) else last["content"]).split())
        return f"prompt {self.number} ({short[:80] + '…' if len(short) > 80 else short!r})"


class Session:
    """A client of one server, with an event loop in a thread of its own: so it works where a loop runs already, and its
    connections and limits last from call to call.

    Args:
        options: of the teacher.
        key: for the server, if it needs one.
        ledger: counts what requests cost.
        keep: called with a job that has more answers than before.
        where: the folder of the answers, for messages.
    """

    def __init__(
        self, options: OpenAIOptions, key: str | None, ledger: Ledger, keep: Callable[[Job], None], where: str
    ) -> None:
        self.options, self.ledger, self.keep, self.where = options, ledger, keep, where
        self._key = key
        self._loop = asyncio.new_event_loop()
        self._calls = threading.Lock()
        threading.Thread(target=self._loop.run_forever, name="kd-openai", daemon=True).start()
        world = int(os.environ.get("WORLD_SIZE", "1"))  # every process keeps to its share of the limits
        self._requests = _limiter(options.requests_per_minute, 1.0, world)
        self._tokens = _limiter(options.tokens_per_minute, (options.tokens_per_minute or 0.0) / 60, world)
        self._stop = asyncio.Event()
        self._one_done = asyncio.Event()
        self._in_flight = 0
        self._answered = False
        self._failure: tuple[Job, Exception] | None = None

    @cached_property
    def _client(self) -> AsyncOpenAI:
        timeout = Timeout(self.options.timeout, connect=min(self.options.timeout, CONNECT_SECONDS))
        key = self._key or "none"  # said outright, or the client would send the key of OPENAI_API_KEY to any server
        return AsyncOpenAI(base_url=self.options.base_url, api_key=key, timeout=timeout, max_retries=0)

    def run(self, jobs: Sequence[Job]) -> None:
        """Ask until every job has its answers.

        After a failure, or Ctrl-C, no further request is made, and those under way are waited for and kept.

        Raises:
            ModelError: if the server cannot be reached, or does not know the model or the key.
            RunFailed: if the budget is spent, or a prompt cannot be answered.
        """
        with self._calls:
            self._run(jobs)

    def _run(self, jobs: Sequence[Job]) -> None:
        self._stop, self._failure = asyncio.Event(), None
        future = asyncio.run_coroutine_threadsafe(self._all(jobs), self._loop)
        try:
            future.result()
        finally:
            if not future.done():  # interrupted; a second Ctrl-C ends the waiting too
                self._loop.call_soon_threadsafe(self._stop.set)
                concurrent.futures.wait([future])

    async def _all(self, jobs: Sequence[Job]) -> None:
        left = iter([job for job in jobs if job.missing])
        if not self._answered:  # the first goes alone: it shows a wrong name or address, and what a request costs
            await self._work(itertools.islice(left, 1))
        await asyncio.gather(*(self._work(left) for _ in range(self.options.concurrency)))
        if self._failure:
            raise await self._told(*self._failure, jobs) from None

    async def _work(self, jobs: Iterator[Job]) -> None:
        """Take jobs until there are no more, or there is a reason to stop."""
        while not self._stop.is_set() and (job := next(jobs, None)):
            try:
                while job.missing:
                    job.entry.answers += await self._answers(job)
                    self.keep(job)
            except StoppedError:
                return
            except Exception as error:
                self._failure = self._failure or (job, error)
                self._stop.set()

    async def _answers(self, job: Job) -> list[Answer]:
        """More answers to a job, after as many attempts as it needs and may have."""

        def tell(state: RetryCallState) -> None:
            level = logging.INFO if state.attempt_number < 3 else logging.WARNING
            logger.log(level, "%s: %s; it is asked again", job, self._said(_error(state)))

        retrying = AsyncRetrying(sleep=self._sleep, stop=self._enough, wait=pause, before_sleep=tell, reraise=True,
                                 retry=retry_if_exception(is_transient))  # fmt: skip
        try:
            return await retrying(self._ask, job)
        except EmptyError as error:
            logger.warning("%s: %s gave %s each time; it is left empty", job, self.options.model, error)
            return [error.answer]

    def _enough(self, state: RetryCallState) -> bool:
        """Whether an attempt was the last."""
        absent = not self._answered and isinstance(_error(state), APIConnectionError | TimeoutError)
        return state.attempt_number > (min(self.options.retries, FIRST_RETRIES) if absent else self.options.retries)

    async def _sleep(self, seconds: float) -> None:
        await self._unless_stopped(asyncio.sleep(seconds))

    async def _unless_stopped(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait for something. Raises `StoppedError` as soon as there is a reason to stop."""
        tasks = [asyncio.ensure_future(waiting), asyncio.ensure_future(self._stop.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        if self._stop.is_set():
            raise StoppedError

    async def _ask(self, job: Job) -> list[Answer]:
        """One request: the answers of its reply that can be used. Raises `UnusableError` if there are none."""
        await self._afford()
        self._in_flight += 1
        try:
            await self._unless_stopped(self._turn(job))
            reply = await self._post(job)
            texts = [answer.text for answer in reply.answers]
            self.ledger.add(*(reply.usage or (wire.prompt_tokens(job.prompt), wire.estimate(texts))))
        finally:
            self._in_flight -= 1
            self._one_done.set()
        self._answered = True
        job.entry.draws += 1
        return _usable(reply.answers[: job.missing], job.sampling.json_schema)

    async def _post(self, job: Job) -> wire.Reply:
        chat = self.options.mode == "chat"
        endpoint: Any = self._client.chat.completions if chat else self._client.completions
        arguments = wire.request(self.options, job.prompt, job.sampling, job.missing, job.next_seed)
        async with asyncio.timeout(self.options.timeout):  # in all; the client's own is from byte to byte
            raw = await endpoint.with_raw_response.create(**arguments)
        secret = self._key is not None and len(self._key) >= SECRET
        return wire.read_reply(self.options.mode, self._clean(raw.text) if secret else raw.text)

    async def _turn(self, job: Job) -> None:
        """Wait until the limits let a request through."""
        await _take(self._requests, 1.0)
        await _take(self._tokens, wire.prompt_tokens(job.prompt) + job.missing * job.sampling.max_tokens)

    async def _afford(self) -> None:
        """Wait until the budget allows one more request, those under way taken to cost as much as those before.

        Raises:
            BudgetSpentError: if it does not.
        """
        budget, prices = self.options.budget, self.options.prices
        while budget is not None and not self._stop.is_set():
            spent = self.ledger.spent
            used = max(spent.tokens / (budget.tokens or math.inf), spent.money(prices) / (budget.money or math.inf))
            if used >= 1:
                raise BudgetSpentError
            if not self._in_flight or used * (1 + self._in_flight / max(spent.requests, 1)) < 1:
                return
            self._one_done.clear()
            await self._one_done.wait()

    async def _told(self, job: Job, error: Exception, jobs: Sequence[Job]) -> Exception:
        """A failure as an error for people."""
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            return RunFailed(f"answers cannot be kept in {self.where}: {error.strerror}")
        if not isinstance(error, EXPECTED):
            return error
        options, said = self.options, self._said(error)
        status = error.status_code if isinstance(error, APIStatusError) else None
        if isinstance(error, BudgetSpentError):
            return RunFailed(f"the budget of {options.model} is spent: {self._bill()}. {self._state(jobs)}. To go on, "
                             "raise the teacher's `budget` and run the same command")  # fmt: skip
        if status in (401, 403):
            key = f"the key in {options.key_env}" if options.key_env else "a request without a key (`key_env: null`)"
            return ModelError(f"{options.base_url} refuses {key}: {said}")
        if not self._answered and status is None:
            return ModelError(f"no server of this kind answers at {options.base_url} ({said}); start it, or correct "
                              "`base_url`, which for most servers ends in /v1")  # fmt: skip
        if not self._answered and (unknown := await self._unknown_model(status)):
            return ModelError(f"{options.base_url} {unknown}; it says {said}")
        if not self._answered and status is not None and status < 500 and status not in BUSY:
            return ModelError(f"{options.base_url} refuses the first request, {job}: {said}; is it `model`, `mode` or "
                              "`extra`?")  # fmt: skip
        return RunFailed(f"{job} got no answer that can be used: {said}. {self._state(jobs)}; the same command goes on")

    async def _unknown_model(self, status: int | None) -> str | None:
        """That the server does not know the model, and which it does, if so."""
        try:
            names = [model.id for model in (await self._client.models.list(timeout=CONNECT_SECONDS)).data]
        except (OpenAIError, ValueError, TypeError, AttributeError):
            names = []
        if self.options.model in names or (status != 404 and not names):
            return None
        near = did_you_mean(self.options.model, names, "it has") if names else "does `base_url` end in /v1?"
        return f"does not know the model {self.options.model!r}; {near}"

    def _bill(self) -> str:
        """What was spent of what."""
        budget, spent = self.options.budget or Budget(tokens=1), self.ledger.spent
        parts = [f"{spent.tokens:,} of {budget.tokens:,} tokens"] if budget.tokens is not None else []
        if budget.money is not None:
            parts.append(f"{spent.money(self.options.prices):.4g} of {budget.money:.4g} in money")
        return f"{' and '.join(parts)}, in {spent.requests:,} requests"

    def _state(self, jobs: Sequence[Job]) -> str:
        done = sum(not job.missing for job in jobs)
        return (f"{done} of the {len(jobs)} prompts asked for last are answered; every answer is kept in {self.where} "
                "and will not be asked for again")  # fmt: skip

    def _said(self, error: BaseException) -> str:
        """A failure in a few words; shortened without the key, or the first half of one would stay."""
        text = self._clean(describe(error))
        return text if len(text) <= 300 else f"{text[:300]}…"

    def _clean(self, text: str) -> str:
        """A text without the key, which some servers repeat."""
        return text.replace(self._key, "***") if self._key else text


def _usable(answers: list[Answer], schema: dict[str, Any] | None) -> list[Answer]:
    """The answers that have text and fit the schema. One that the server withheld is the last word.

    Raises:
        UnusableError: if there are none.
    """
    withheld = [answer.finish == "content_filter" for answer in answers]
    if schema is None:
        found = [a for a, final in zip(answers, withheld, strict=True) if final or a.text.strip()]
        if not found:
            raise EmptyError(answers[0])
        return found
    wrong = [None if final else misfit(a.text, schema) for a, final in zip(answers, withheld, strict=True)]
    found = [answer for answer, problem in zip(answers, wrong, strict=True) if problem is None]
    if not found:
        raise UnusableError(f"an answer that does not fit json_schema: {wrong[0]} (it ended by {answers[0].finish!r})")
    return found


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    return error or StoppedError()


def _limiter(per_minute: float | None, burst: float, share: int) -> AsyncLimiter | None:
    """Lets this process's share of so many through in a minute, evenly, and `burst` (1 at least) at once."""
    if per_minute is None:
        return None
    return AsyncLimiter(max(1.0, burst), 60 * max(1.0, burst) * share / per_minute)


async def _take(limiter: AsyncLimiter | None, amount: float) -> None:
    """Wait until so many are let through."""
    while limiter is not None and amount > 0:
        part = min(amount, limiter.max_rate)
        await limiter.acquire(part)
        amount -= part
