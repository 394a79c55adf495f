"""Few-shot prompts, and a triple as the critic reads it (sections 3.1 and 3.2 of the paper)."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_symbolic_kd.functional import with_names
from kd_symbolic_kd.options import Relation, SymbolicKDOptions
from kdcore.data import derive_seed
from kdcore.errors import RecipeError
from kdcore.text import render

MARK = "\ue000"  # of Unicode's private use: stands in no text
EVENT_GAP, ITEM_GAP = "\n\n\n", "\n\n"


def left_open(template: str, row: Mapping[str, Any], field: str) -> str:
    """A template rendered up to where a field stands, without the blanks before it.

    Raises:
        RecipeError: if it does not use the field, or one that there is not.
    """
    before, mark, _ = render(template, {**row, field: MARK}).partition(MARK)
    if not mark:
        raise RecipeError(f"the template {template!r} does not use {{{{ {field} }}}}, which the teacher is to add")
    return before.rstrip()


def event_prompt(template: str, events: Sequence[str]) -> str:
    """Numbered events, and the number of one more."""
    items = [render(template, {"number": i, "event": event}) for i, event in enumerate(events, 1)]
    return EVENT_GAP.join([*items, left_open(template, {"number": len(items) + 1}, "event")])


def tail_prompt(
    relation: Relation, examples: Sequence[Mapping[str, str]], head: str, names: Sequence[str],
    query_names: tuple[str, str], rng: random.Random,
) -> str:  # fmt: skip
    """The relation's question, numbered examples with names drawn for each, and the head with its own names."""
    items = [relation.intro] if relation.intro else []
    for i, shown in enumerate(examples, 1):
        item = render(relation.item, {"number": i, "head": shown["head"], "tail": shown["tail"]})
        items.append(with_names(item, *rng.sample(names, 2)))
    query = left_open(relation.item, {"number": len(examples) + 1, "head": head}, "tail")
    return ITEM_GAP.join([*items, with_names(query, *query_names)])


def critic_pair(connector: str, head: str, tail: str, names: Sequence[str]) -> tuple[str, str]:
    """What the critic reads: the event, and the verbalised relation with the tail, both with the names."""
    x, y = names
    return with_names(head, x, y), with_names(f"{connector} {tail}", x, y)


def event_prompter(options: SymbolicKDOptions, events: Sequence[str], seed: int) -> Callable[[dict[str, Any]], str]:
    """`row -> prompt` for rows with a number `draw`, which alone decides what events are shown."""

    def prompt(row: dict[str, Any]) -> str:
        rng = random.Random(derive_seed(seed, "events", row["draw"]))
        return event_prompt(options.event_template, rng.sample(events, min(options.event_shots, len(events))))

    return prompt


def tail_prompter(
    options: SymbolicKDOptions, examples: Mapping[str, Sequence[Mapping[str, str]]], seed: int
) -> Callable[[dict[str, Any]], str]:
    """`row -> prompt` for rows with head and relation: every prompt of a relation shows the same examples, each prompt
    with other names. All templates are tried at once.

    Raises:
        RecipeError: if one of them does not fit.
    """

    def prompt(row: dict[str, Any]) -> str:
        rng = random.Random(derive_seed(seed, row["head"], row["relation"]))
        relation = options.words[row["relation"]]
        return tail_prompt(relation, examples[row["relation"]], row["head"], options.names, options.query_names, rng)

    for name in options.relations:
        prompt({"head": "PersonX", "relation": name})
    return prompt
