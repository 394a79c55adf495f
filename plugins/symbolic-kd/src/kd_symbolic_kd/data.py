"""Triples of head, relation and tail: read from files, split by head, and as texts for a causal language model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from kd_symbolic_kd.functional import SPLITS, split_by_key
from kd_symbolic_kd.options import TextFormatOptions, TriplesOptions
from kdcore.data import IGNORE, DataModule, Task, vocabulary_fingerprint
from kdcore.errors import DataError, did_you_mean
from kdcore.models import Batch

Triple = dict[str, Any]
"""`head`, `relation`, `tail`; `valid` (0 or 1) where it was judged; `split` where it is known."""

LABELLED = {split: f"labelled-{split}" for split in SPLITS}
"""Splits of judged triples, valid and not."""

NOT_JUDGED = -9


class TripleData(DataModule):
    """Triples as data of a causal language model: `<head> HEAD </head> <relation> RELATION </relation> [GEN] TAIL`,
    then the end token; only tail and end are to be predicted.

    Args:
        triples: rows with `head`, `relation` and `tail` (and `split`, where they must not be split here) that are true.
        labelled: the same with `valid`, for a critic; they may be few or none.
        tokenizer: of transformers, with an end token; the special tokens are added to it.
        format: the special tokens, and the length of a text.
        fractions, seed: of the split by head.

    Raises:
        DataError: if a special token is already in use, or there is no end token.
    """

    def __init__(
        self, triples: Sequence[Triple], labelled: Sequence[Triple], tokenizer: Any, format: TextFormatOptions,
        fractions: Sequence[float] = (0.8, 0.1, 0.1), seed: int = 0,
    ) -> None:  # fmt: skip
        self.format, self.tokenizer = format, tokenizer
        add_tokens(tokenizer, format.special_tokens)
        for row in (*triples, *labelled):
            if token := self.reserved(row):
                raise DataError(f"the triple {row['head']!r}, {row['relation']!r}, {row['tail']!r} holds {token!r}, "
                                "which marks its parts; name others with data.special_tokens")  # fmt: skip
        groups = split_by_key((row["head"] for row in (*triples, *labelled) if "split" not in row), fractions, seed)
        splits: dict[str, list[Triple]] = {}
        for rows, names in ((triples, dict(zip(SPLITS, SPLITS, strict=True))), (labelled, LABELLED)):
            for row in rows:
                splits.setdefault(names[row["split"] if "split" in row else groups[row["head"]]], []).append(row)
        task = Task("causal-lm", num_classes=len(tokenizer), tokenizer=tokenizer,
                    vocabulary=vocabulary_fingerprint(tokenizer))  # fmt: skip
        super().__init__(splits, task, collate=self.batch)

    def reserved(self, row: Mapping[str, Any]) -> str | None:
        """The special token that a triple's text holds, if it does."""
        text = f"{row['head']} {row['relation']} {row['tail']}"
        return next((token for token in self.format.special_tokens if token in text), None)

    def prompt_ids(self, head: str, relation: str, room: int) -> list[int]:
        """Tokens up to `[GEN]`; the head is cut where they would leave less than `room` for the tail."""
        opens, closes, relates, related, asks = self.tokenizer.convert_tokens_to_ids([*self.format.special_tokens])
        middle = [closes, relates, *self._ids(relation), related, asks]
        space = max(self.format.max_length - room - len(middle) - 1, 0)
        return [opens, *self._ids(head)[:space], *middle]

    def batch(self, rows: list[Triple]) -> Batch:
        """`input_ids`, `attention_mask` and `labels`, `[B, T]`, padded on the right."""
        ids, labels = [], []
        for row in rows:
            tail = [*self._ids(f" {row['tail']}")[: self.format.max_length // 2], self.tokenizer.eos_token_id]
            prompt = self.prompt_ids(row["head"], row["relation"], len(tail))
            ids.append(torch.tensor([*prompt, *tail]))
            labels.append(torch.tensor([*[IGNORE] * (len(prompt) - 1), *tail, IGNORE]))
        mask = [torch.ones_like(row) for row in ids]
        return {"input_ids": pad_sequence(ids, True, self.tokenizer.pad_token_id),
                "attention_mask": pad_sequence(mask, True, 0),
                "labels": pad_sequence(labels, True, IGNORE)}  # fmt: skip

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found


def add_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Make the texts that mark the parts of a triple special tokens of a tokenizer (one that has them as such already
    stays as it is), and give it a padding token.

    The blanks around them belong to them, all but the one before the tail: so the written form has the tokens that
    the student learns.

    Raises:
        DataError: if one is an ordinary token of its vocabulary, two are alike, or the tokenizer has no end token.
    """
    from tokenizers import AddedToken

    if getattr(tokenizer, "eos_token_id", None) is None:
        raise DataError("the tokenizer has no end token (eos_token), at which a tail ends; take one that has")
    taken = [token for token in tokens if token in tokenizer.get_vocab() and token not in tokenizer.get_added_vocab()]
    if taken or len(set(tokens)) < len(tokens):
        what = f"{taken[0]!r} is a word of the tokenizer's vocabulary already" if taken else "two of them are alike"
        raise DataError(f"data.special_tokens: {what}; name others")
    marks = [AddedToken(token, lstrip=True, rstrip=token != tokens[-1], normalized=False) for token in tokens]
    tokenizer.add_tokens(marks, special_tokens=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token


def triples(options: TriplesOptions) -> TripleData:
    """The data component.

    Raises:
        DataError: on files that are missing or malformed, or a tokenizer that cannot be loaded.
    """
    rows = read(options.path, options, lambda row: row.get("valid", 1) == 1)
    if not rows:
        raise DataError(f"data.path: {options.path} holds no valid triples of the relations asked for")
    labelled = read(options.labelled or options.path, options, lambda row: "valid" in row)
    return TripleData(rows, labelled, load_tokenizer(options.tokenizer), options, options.fractions, options.seed)


def load_tokenizer(name: str) -> Any:
    """A tokenizer of transformers. Raises `DataError` if it cannot be had."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise DataError(f"data.tokenizer: {name!r} is no folder of a tokenizer and could not be fetched ({cause})"
                        ) from error  # fmt: skip


def read(path: str, options: TriplesOptions, wanted: Callable[[Triple], bool]) -> list[Triple]:
    """The wanted triples of a file, those of other relations and tails that say that there is none left out.

    Raises:
        DataError: naming the line that is wrong.
    """
    reader = {".jsonl": _from_json, ".json": _from_json, ".tsv": _from_table}.get(Path(path).suffix)
    if reader is None:
        raise DataError(f"{path}: triples are read from .jsonl and .tsv files")
    try:
        with open(path, encoding="utf-8") as file:
            rows = [row for row in _rows(file, path, reader, options.drop_unjudged) if wanted(row)]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    dropped = {tail.casefold() for tail in options.drop_tails}
    known = {row["relation"] for row in rows}
    if unknown := [name for name in options.relations if name not in known]:
        raise DataError(f"{path} has no relation {unknown[0]!r}; {did_you_mean(unknown[0], known, 'relations')}")
    return [row for row in rows if row["tail"] and row["tail"].casefold() not in dropped
            and (not options.relations or row["relation"] in options.relations)]  # fmt: skip


def _rows(file: Any, path: str, reader: Callable[[str], Iterator[Triple]], drop_unjudged: bool) -> Iterator[Triple]:
    for number, line in enumerate(file, 1):
        try:
            found = list(reader(line)) if line.strip() else []
            for row in found:
                if row.get("valid") is None:
                    row.pop("valid", None)
                elif int(row["valid"]) == NOT_JUDGED and drop_unjudged:
                    continue
                else:
                    row["valid"] = int(int(row["valid"]) > 0)
                if row.get("split", "train") not in SPLITS:
                    raise ValueError(f"the split is {row['split']!r}; splits: {', '.join(SPLITS)}")
                yield row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"there is no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{path}, line {number} is not a triple: {what}") from None


def _from_json(line: str) -> Iterator[Triple]:
    """`{"head", "relation", "tail"}`, with `valid` (a number above 0, or true, if so) and `split` where known."""
    found = json.loads(line)
    row = {key: found[key].strip() for key in ("head", "relation", "tail")}
    yield row | {key: found[key] for key in ("valid", "split") if found.get(key) is not None}


def _from_table(line: str) -> Iterator[Triple]:
    """`head, relation, tail[, valid]` between tabs, or `head @@ relation`, tab, tails between bars."""
    cells = [cell.strip() for cell in line.rstrip("\n").split("\t")]
    head, at, relation = cells[0].rpartition(" @@ ")
    if at and len(cells) == 2:
        yield from ({"head": head, "relation": relation, "tail": tail.strip()} for tail in cells[1].split("|"))
    elif len(cells) in (3, 4):
        yield dict(zip(("head", "relation", "tail", "valid"), cells, strict=False))
    else:
        raise ValueError(f"it has {len(cells)} columns; write head, relation and tail, and perhaps valid")
