"""Prompts about a node and its neighbourhood.

A prompt of hop l tells of the node and of nodes at distances 1 to l, found breadth first. Which of them it tells of is
drawn anew for each variant, by the seed, the node, the hop and the variant alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_lingugkd.options import LinguGKDOptions
from kd_pyg.graph import GraphData
from kdcore.data import IGNORE, derive_seed
from kdcore.errors import DataError
from kdcore.text import render

YES, NO = "yes", "no"


@dataclass(frozen=True)
class Request:
    """One prompt of a node: for a hop, with the neighbours of a variant."""

    node: int
    hop: int
    variant: int


class Prompts:
    """Makes the prompts of a graph, and knows their answers.

    Args:
        data: the graph; every node needs a text.
        options: templates, hops, numbers of neighbours and prompts.
        seed: of the draws.

    Raises:
        DataError: if a node has no text, or the classes have no names.
        RecipeError: on a template that names a field that there is not.
    """

    def __init__(self, data: GraphData, options: LinguGKDOptions, seed: int) -> None:
        self.texts = data.need_texts("lingugkd")
        self.classes = data.task.classes
        if not self.classes:
            raise DataError("lingugkd asks a language model for the name of a class, and the data's classes have none")
        self.options, self.seed = options, seed
        self.labels = data.graph.y.tolist()
        self.shown = set(data.nodes("train").tolist()) if options.neighbour_labels else set()
        order = data.graph.edge_index[0].argsort(stable=True)
        self.targets = data.graph.edge_index[1][order].numpy()
        self.ends = np.concatenate(
            [[0], np.bincount(data.graph.edge_index[0].numpy(), minlength=len(self.texts)).cumsum()]
        )
        self.text(Request(int(data.graph.degree.argmax()), options.hops, 0))  # wrong fields are told before any work
        self.link(0, random.Random(0))

    def near(self, node: int) -> list[int]:
        """The nodes that a node is linked to."""
        found: list[int] = self.targets[self.ends[node] : self.ends[node + 1]].tolist()
        return found

    def paths(self, node: int, hops: int) -> list[dict[int, list[int]]]:
        """Breadth-first search: for each distance from 1 to `hops`, the nodes there, each with a shortest path from
        the node to it. There are as many entries as there are distances with nodes."""
        seen, found = {node}, list[dict[int, list[int]]]()
        frontier = {node: [node]}
        for _ in range(hops):
            reached: dict[int, list[int]] = {}
            for source, path in frontier.items():
                for target in self.near(source):
                    if target not in seen:
                        seen.add(target)
                        reached[target] = [*path, target]
            if not reached:
                break
            found.append(reached)
            frontier = reached
        return found

    def requests(self, node: int) -> Iterator[Request]:
        """All prompts of a node. A hop at whose distance there is no node has none: its prompt would be the last's."""
        for hop in range(len(self.paths(node, self.options.hops)) + 1):
            for variant in range(self.options.prompts if hop else 1):
                yield Request(node, hop, variant)

    def text(self, request: Request, drop: int = 0, cut: int = 0) -> str:
        """A prompt; without its last `drop` neighbours, the node's own text without its last `cut` words."""
        o, node = self.options, request.node
        rng = random.Random(derive_seed(self.seed, "prompt", node, request.hop, request.variant))
        neighbours = [self._neighbour(near, path, hop, node)
                      for hop, found in enumerate(self.paths(node, request.hop), 1)
                      for near, path in rng.sample(sorted(found.items()), min(o.neighbours, len(found)))]  # fmt: skip
        words = self.texts[node].split(" ")
        row = {"node": node, "hop": request.hop, "text": " ".join(words[: max(1, len(words) - cut)]),
               "classes": list(self.classes), "neighbours": neighbours[: max(0, len(neighbours) - drop)]}  # fmt: skip
        return render(o.template, row)

    def _neighbour(self, near: int, path: list[int], hop: int, node: int) -> dict[str, Any]:
        label = self.labels[near] if near in self.shown else IGNORE
        return {"node": near, "text": self.texts[near], "hop": hop, "path": path,
                "label": "" if label == IGNORE else self.classes[label]}  # fmt: skip

    def link(self, node: int, rng: random.Random) -> tuple[str, str]:
        """A prompt that asks whether a node is linked to another, drawn in half the cases among its neighbours, and its
        answer."""
        near = self.near(node)
        other = rng.choice(near) if near and rng.random() < 0.5 else rng.randrange(len(self.texts))
        row = {"node": node, "text": self.texts[node], "other_node": other, "other": self.texts[other]}
        return render(self.options.link_template, row), YES if other in near else NO

    def answer(self, node: int) -> str:
        """The name of a node's class."""
        return str(self.classes[self.labels[node]])

    def draw(self, node: int, seed: int) -> Request | None:
        """A prompt to tune on, at random: hop, then variant; `None` for one about a link."""
        rng = random.Random(seed)
        if rng.random() < self.options.link_prompts:
            return None
        hop = rng.randint(0, len(self.paths(node, self.options.hops)))
        return Request(node, hop, rng.randrange(self.options.prompts) if hop else 0)
