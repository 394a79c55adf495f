"""Search spaces: what a search may choose, written as strings."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SearchSpace:
    """Architectures that are one choice at each of several positions. The options of a student that is a search space
    have a field `arch` and a method `space()` that returns one of these.

    Args:
        positions: the choices at each position.
        encode: the choices made -> the string that `arch` takes.
        decode: its inverse.
    """

    positions: tuple[tuple[str, ...], ...]
    encode: Callable[[Sequence[str]], str]
    decode: Callable[[str], Sequence[str]]

    @property
    def size(self) -> int:
        """How many architectures there are."""
        count = 1
        for choices in self.positions:
            count *= len(choices)
        return count

    def __iter__(self) -> Iterator[str]:
        """Every architecture once."""
        return (self.encode(choices) for choices in itertools.product(*self.positions))

    def random(self, rng: random.Random) -> str:
        """One of them, all alike likely."""
        return self.encode([rng.choice(choices) for choices in self.positions])

    def mutate(self, arch: str, rng: random.Random) -> str:
        """One that differs in one position; the same where there is no choice anywhere."""
        chosen = list(self.decode(arch))
        open_positions = [i for i, choices in enumerate(self.positions) if len(choices) > 1]
        if open_positions:
            where = rng.choice(open_positions)
            chosen[where] = rng.choice([c for c in self.positions[where] if c != chosen[where]])
        return self.encode(chosen)


def depths_space(choices: Sequence[int], stages: int) -> SearchSpace:
    """Blocks per stage, such as `5-5-7`: space S1 of the paper for (1, 3, 5, 7) and three stages."""
    return SearchSpace((tuple(map(str, choices)),) * stages, "-".join, lambda arch: arch.split("-"))


CELL_OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
CELL_EDGES = ((0,), (0, 1), (0, 1, 2))
"""The nodes that each node of a cell after the first reads."""


def cell_space(operations: Sequence[str] = CELL_OPERATIONS) -> SearchSpace:
    """NAS-Bench-201's cells: an operation on each of six edges, such as
    `|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|nor_conv_1x1~2|`; space S0 of the paper."""
    return SearchSpace((tuple(operations),) * 6, encode_cell, decode_cell)


def encode_cell(operations: Sequence[str]) -> str:
    """Six operations as NAS-Bench-201 writes them."""
    rest = iter(operations)
    return "+".join("|" + "|".join(f"{next(rest)}~{node}" for node in nodes) + "|" for nodes in CELL_EDGES)


def decode_cell(arch: str) -> list[str]:
    """The six operations of a cell. Raises `ValueError` where the string is none."""
    nodes = [node.strip("|").split("|") for node in arch.split("+")]
    found = [edge.partition("~") for node in nodes for edge in node]
    wanted = [str(source) for sources in CELL_EDGES for source in sources]
    if [len(node) for node in nodes] != [1, 2, 3] or [source for _, _, source in found] != wanted:
        raise ValueError(f"{arch!r} is no cell of NAS-Bench-201, such as {encode_cell(['none'] * 6)}")
    operations = [name for name, _, _ in found]
    if wrong := [name for name in operations if name not in CELL_OPERATIONS]:
        raise ValueError(f"{wrong[0]!r} is no operation of a cell; there are: {', '.join(CELL_OPERATIONS)}")
    return operations
