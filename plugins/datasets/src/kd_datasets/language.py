"""Rows of a language model's data to tokens and labels, and which rows are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from kd_datasets import chat
from kd_datasets.options import DatasetsOptions
from kd_datasets.pictures import Sample
from kd_datasets.targets import Form
from kdcore.data import IGNORE
from kdcore.errors import DataError
from kdcore.text import render


class LeftOut(Exception):  # noqa: N818 - it reads as what happened
    """A row that does not fit, or could teach nothing. `reason` is the same for all rows of a kind."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Tokens:
    """A prompt with its completion, or a text.

    Args:
        ids: its tokens.
        counts: whether each is to be predicted.
        special: how many the tokenizer puts before every text.
        answer: where the last completion begins; 0 for a text without one.
    """

    ids: list[int]
    counts: list[bool]
    special: int = 0
    answer: int = 0

    def fitted(self, length: int | None, truncation: str) -> Tokens:
        """At most `length` tokens. `keep_end` cuts behind the special tokens, and leaves the last token before the
        completion: what is too long even then is cut at its end.

        Raises:
            LeftOut: if it is longer, and nothing may be cut.
        """
        if length is None or len(self.ids) <= length:
            return self
        if truncation in ("drop", "error"):
            raise LeftOut("longer than max_length", f"{len(self.ids)} tokens, {length} are allowed")
        if truncation == "keep_start":
            return replace(self, ids=self.ids[:length], counts=self.counts[:length])
        excess = len(self.ids) - length
        end = self.special + min(excess, max(0, self.answer - 1 - self.special) if self.answer else excess)
        kept = [*range(self.special), *range(end, len(self.ids))][:length]
        return replace(self, ids=[self.ids[i] for i in kept], counts=[self.counts[i] for i in kept])

    def labels(self) -> list[int]:
        """At each position the token that follows, where it is to be predicted. Raises `LeftOut` where none is."""
        following = zip(self.ids[1:], self.counts[1:], strict=True)
        labels = [token if counts else IGNORE for token, counts in following] + [IGNORE]
        if all(label == IGNORE for label in labels):
            raise LeftOut("without a token to predict", f"{len(self.ids)} tokens are kept")
        return labels


@dataclass(frozen=True)
class Encoder:
    """Makes tokens and labels of a row.

    Args:
        options: of the data.
        form: of its columns.
        roles: `role -> column`, those of the form and `text_pair`.
        tokenizer: of transformers.
    """

    options: DatasetsOptions
    form: Form
    roles: Mapping[str, str]
    tokenizer: Any

    def __call__(self, row: Mapping[str, Any], split: str, index: int) -> dict[str, Any]:
        """`_input_ids`, `_labels`, in preferences the same of the answer that was not preferred (`_rejected_…`), and,
        other than for train, the texts `_prompt` and `_completion`; `_left_out` says why there are none.

        Raises:
            DataError: naming split and row, if the row holds something else than texts or chats, or if it would have to
                be left out, and `truncation` is `error`.
        """
        fields: dict[str, Any] = {key: [] for key in self.token_fields} | dict.fromkeys(self.text_fields(split), "")
        try:
            made = self._encoded(row)
            return {key: made[key] for key in fields} | {"_left_out": ""}
        except LeftOut as why:
            if self.options.truncation == "error":
                raise DataError(
                    f"split {split!r}, row {index} is {why}. Mend it, or choose another `truncation`"
                ) from None
            return {**fields, "_left_out": why.reason}
        except DataError as error:
            raise DataError(f"split {split!r}, row {index}: {error}") from error

    @property
    def token_fields(self) -> tuple[str, ...]:
        """Names of the fields that hold lists of numbers."""
        rejected = ("_rejected_input_ids", "_rejected_labels") if self.form == "preference" else ()
        return ("_input_ids", "_labels", *rejected)

    def text_fields(self, split: str) -> tuple[str, ...]:
        """Names of the fields that hold texts: there are none in train, where nothing is measured."""
        return () if split == "train" or self.form == "text" else ("_prompt", "_completion")

    def _encoded(self, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.form == "text":
            return self._finished(self._text(row), "", "")
        if self.form == "messages":
            return self._finished(*self._chat(row[self.roles["messages"]]))
        prompt = self._prompt(row)
        if self.form == "completion":
            return self._finished(*self._answered(prompt, row, "completion"))
        rejected = self._finished(*self._answered(prompt, row, "rejected"))
        return {
            **self._finished(*self._answered(prompt, row, "chosen")),
            "_rejected_input_ids": rejected["_input_ids"],
            "_rejected_labels": rejected["_labels"],
        }

    def _finished(self, tokens: Tokens, prompt: str, completion: str) -> dict[str, Any]:
        if self.options.train_on == "all":
            tokens = replace(tokens, counts=[True] * len(tokens.ids))
        fitted = tokens.fitted(self.options.max_length, self.options.truncation)
        return {"_input_ids": fitted.ids, "_labels": fitted.labels(), "_prompt": prompt, "_completion": completion}

    def _text(self, row: Mapping[str, Any]) -> Tokens:
        text, pair = row[self.roles["text"]], row[self.roles["text_pair"]] if "text_pair" in self.roles else None
        if not isinstance(text, str):
            raise DataError(f"text: column {self.roles['text']!r} holds {text!r:.80} where a text is expected")
        ids = list(self.tokenizer(text, pair, verbose=False)["input_ids"])
        return Tokens(ids, [True] * len(ids), len(self._special))

    def _prompt(self, row: Mapping[str, Any]) -> Any:
        if self.options.template is not None:
            return render(self.options.template, row)
        return row[self.roles["prompt"]]

    def _answered(self, prompt: Any, row: Mapping[str, Any], role: str) -> tuple[Tokens, str, str]:
        """Tokens, text of the prompt, text of the answer."""
        answer = row[self.roles[role]]
        if answer is None or not (answer.strip() if isinstance(answer, str) else answer):
            raise LeftOut(f"without a {role} answer" if self.form == "preference" else "without a completion")
        if isinstance(prompt, str) and isinstance(answer, str):
            return self._strings(prompt, answer)
        if isinstance(prompt, list) and isinstance(answer, list):
            return self._messages(chat.checked(prompt, "prompt"), chat.checked(answer, role))
        raise DataError(f"prompt and {role} have to be two texts or two lists of messages; found {prompt!r:.60} and "
                        f"{answer!r:.60}")  # fmt: skip

    def _strings(self, prompt: str, answer: str) -> tuple[Tokens, str, str]:
        """Tokenised apart, so that the tokens of the prompt are those that a model is given when it is to answer."""
        before = self._special + chat.tokens(self.tokenizer, prompt)
        after, end = chat.tokens(self.tokenizer, answer), self.tokenizer.eos_token_id
        if end is not None and after[-1:] != [end]:
            after.append(end)
        counts = [False] * len(before) + [True] * len(after)
        return Tokens(before + after, counts, len(self._special), len(before)), prompt, answer

    def _messages(self, prompt: list[chat.Message], answer: list[chat.Message]) -> tuple[Tokens, str, str]:
        if not (said := "\n".join(message["content"] for message in answer)).strip():
            raise LeftOut("without a completion")
        before = chat.rendered(self.tokenizer, prompt, generation_prompt=True)
        whole = chat.rendered(self.tokenizer, prompt + answer)
        parts = [(before, whole)] if self.options.train_on == "completion" else []
        return _last_answer(*chat.spans(self.tokenizer, whole, parts)), before, said

    def _chat(self, value: Any) -> tuple[Tokens, str, str]:
        messages = chat.checked(value or [], "messages")
        spoken = [i for i, said in enumerate(messages) if said["role"] == "assistant" and said["content"].strip()]
        if not spoken:
            raise LeftOut("without a completion")
        last = spoken[-1]
        before = chat.rendered(self.tokenizer, messages[:last], generation_prompt=True)
        if self.options.train_on == "completion" and chat.marks_assistant(self.tokenizer):
            found = chat.marked(self.tokenizer, messages)
        else:
            parts = chat.turns(self.tokenizer, messages) if self.options.train_on == "completion" else []
            found = chat.spans(self.tokenizer, chat.rendered(self.tokenizer, messages), parts)
        return _last_answer(*found), before, messages[last]["content"]

    @cached_property
    def _special(self) -> list[int]:
        """The tokens that the tokenizer puts before every text."""
        whole, bare = list(self.tokenizer("a")["input_ids"]), chat.tokens(self.tokenizer, "a")
        places = range(len(whole) - len(bare) + 1)
        return whole[: next((i for i in places if whole[i : i + len(bare)] == bare), 0)]


def _last_answer(ids: list[int], counts: list[bool]) -> Tokens:
    starts = [i for i in range(1, len(ids)) if counts[i] and not counts[i - 1]]
    return Tokens(ids, counts, answer=starts[-1] if starts else 0)


def to_sample(fields: Mapping[str, Any], pad: int) -> Sample:
    """Int `[T]` each: `input_ids`, `attention_mask`, `labels`; of a preference also `ranked_input_ids`,
    `ranked_attention_mask` and `ranked_labels`, int `[2, T]`, the preferred answer first; and the texts."""
    ids, labels = torch.tensor(fields["_input_ids"]), torch.tensor(fields["_labels"])
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if "_rejected_input_ids" in fields:
        other = torch.tensor(fields["_rejected_input_ids"])
        sample["ranked_input_ids"] = padded([ids, other], pad)
        sample["ranked_attention_mask"] = padded([torch.ones_like(ids), torch.ones_like(other)], 0)
        sample["ranked_labels"] = padded([labels, torch.tensor(fields["_rejected_labels"])], IGNORE)
    return sample | {name[1:]: fields[name] for name in ("_prompt", "_completion") if name in fields}


def padded(tensors: list[torch.Tensor], value: int) -> torch.Tensor:
    """One tensor `[N, …, T]` of tensors `[…, t]`, filled up at the end."""
    longest = max(tensor.shape[-1] for tensor in tensors)
    pad = torch.nn.functional.pad
    return torch.stack([pad(tensor, (0, longest - tensor.shape[-1]), value=value) for tensor in tensors])
