"""What can go wrong with a request: what is tried again, after how long, and what a person is told."""

from __future__ import annotations

import contextlib
import email.utils
import math
import time
from typing import Any

from openai import APIConnectionError, APIStatusError, OpenAIError
from tenacity import RetryCallState, wait_exponential_jitter

from kd_openai.wire import MalformedReplyError
from kdcore.text import Answer

BUSY = (408, 409, 425, 429)
"""Statuses after which the same request may succeed, besides those from 500 on."""
LONGEST_WAIT = 600.0
"""Seconds that a server may ask us to wait before the run stops instead."""

backoff = wait_exponential_jitter(initial=0.5, max=30.0, jitter=0.5)


class UnusableError(Exception):
    """A reply without an answer that can be used."""


class EmptyError(UnusableError):
    """A reply without any text.

    Args:
        answer: the empty answer.
    """

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"an empty answer (it ended by {answer.finish!r})")
        self.answer = answer


class BudgetSpentError(Exception):
    """The budget does not allow another request."""


class StoppedError(Exception):
    """No more requests are to be made."""


EXPECTED = (OpenAIError, TimeoutError, MalformedReplyError, UnusableError, BudgetSpentError)
"""What is told to a person in words of our own."""


def is_transient(error: BaseException) -> bool:
    """Whether to ask again."""
    if isinstance(error, APIStatusError):
        if error.code == "insufficient_quota" or (retry_after(error) or 0) > LONGEST_WAIT:
            return False
        return error.status_code in BUSY or error.status_code >= 500
    return isinstance(error, APIConnectionError | TimeoutError | MalformedReplyError | UnusableError)


def pause(state: RetryCallState) -> float:
    """Seconds until the next attempt: what the server asks for, none after an answer that could not be used, or else
    twice as many each time."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, UnusableError):
        return 0.0
    asked = retry_after(error) if isinstance(error, APIStatusError) else None
    return backoff(state) if asked is None else asked


def retry_after(error: APIStatusError) -> float | None:
    """The wait in seconds that a server asks for, as a number or a date; `None` where it asks for none."""
    headers = error.response.headers
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            return _positive(float(headers.get(name, "")) * unit)
    with contextlib.suppress(TypeError, ValueError):
        return _positive(email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    return None


def _positive(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def describe(error: BaseException) -> str:
    """A failure in a few words."""
    if isinstance(error, APIStatusError):
        return f"status {error.status_code}: {_message(error.body)}"
    if isinstance(error, TimeoutError) or "timed out" in str(error):
        return "no answer in time"
    if isinstance(error, APIConnectionError):
        cause = error.__cause__ or error
        return f"the connection failed: {str(cause) or type(cause).__name__}"
    return str(error)


def _message(body: Any) -> str:
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body.get("error") or body
    return " ".join(str(body or "no reason given").split())
