"""Chats: messages to text and tokens by the tokenizer's chat template, and which tokens the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kdcore.errors import DataError

Message = dict[str, Any]

GENERATION = re.compile(r"\{%-?\s*generation\b")
"""What a chat template has that marks by itself what the assistant says."""


def checked(value: Any, role: str) -> list[Message]:
    """The messages of a chat without the fields that are `None`.

    Raises:
        DataError: if they are no list of messages, each with the texts `role` and `content`.
    """
    fits = isinstance(value, list) and all(
        isinstance(said, Mapping) and isinstance(said.get("role"), str) and isinstance(said.get("content"), str)
        for said in value
    )
    if not fits:
        raise DataError(f"{role}: found {value!r:.80} where a list of messages is expected, each with the texts `role` "
                        "and `content`")  # fmt: skip
    return [{key: part for key, part in said.items() if part is not None} for said in value]


def rendered(tokenizer: Any, messages: list[Message], generation_prompt: bool = False) -> str:
    """A chat as the one text that the template makes of it. Raises `DataError` as `_applied` does."""
    return str(_applied(tokenizer, messages, tokenize=False, add_generation_prompt=generation_prompt))


def marks_assistant(tokenizer: Any) -> bool:
    """Whether the template says by itself which tokens are the assistant's."""
    return bool(tokenizer.is_fast and GENERATION.search(str(tokenizer.chat_template)))


def marked(tokenizer: Any, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and whether the template marks each as the assistant's. Raises `DataError` as `_applied`
    does."""
    encoded = _applied(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return list(encoded["input_ids"]), [bool(mark) for mark in encoded["assistant_masks"]]


def _applied(tokenizer: Any, messages: list[Message], **how: bool) -> Any:
    """Raises `DataError` if the tokenizer has no chat template, or its template refuses the chat."""
    if not tokenizer.chat_template:
        raise DataError("messages: the tokenizer has no chat template. Take that of a model for chats, or give prompt "
                        "and completion as texts")  # fmt: skip
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # a template is a program of the tokenizer's
        raise DataError(f"messages: the tokenizer's chat template refuses them: {error}") from error


def turns(tokenizer: Any, messages: list[Message]) -> list[tuple[str, str]]:
    """For each turn of the assistant the text before it, with the generation prompt, and the text that ends with it."""
    return [
        (rendered(tokenizer, messages[:i], generation_prompt=True), rendered(tokenizer, messages[: i + 1]))
        for i, said in enumerate(messages)
        if said["role"] == "assistant"
    ]


def spans(tokenizer: Any, whole: str, parts: Sequence[tuple[str, str]]) -> tuple[list[int], list[bool]]:
    """The tokens of a chat, and whether each lies between the first and the second text of one of the parts, which are
    beginnings of the whole.

    Raises:
        DataError: if the tokens of a part are not those that the whole begins with: then nobody could say where the
            assistant begins.
    """
    ids = tokens(tokenizer, whole)
    counts = [False] * len(ids)
    for before, through in parts:
        start, stop = (_length(tokenizer, part, whole, ids) for part in (before, through))
        counts[start:stop] = [True] * (stop - start)
    return ids, counts


def tokens(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text without special ones around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _length(tokenizer: Any, part: str, whole: str, ids: list[int]) -> int:
    """How many of the tokens of the whole belong to its beginning."""
    if part == whole:
        return len(ids)
    head = tokens(tokenizer, part)
    if not whole.startswith(part) or ids[: len(head)] != head:
        raise DataError(f"messages: the chat up to {part[-40:]!r}, as the tokenizer's chat template writes it, is not "
                        "what the whole chat begins with, so that nobody can tell where the assistant begins. Take a "
                        "template that marks it (`{% generation %}`), or set `train_on: all`")  # fmt: skip
    return len(head)
