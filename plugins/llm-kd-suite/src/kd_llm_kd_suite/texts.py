"""Which texts a training step is on: the data's, the teacher's, new ones of the student, or older ones of it.

Sources: Agarwal et al. 2024 (GKD, arXiv 2306.13649), Ko et al. 2024 (DistiLLM, arXiv 2402.03898).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from kdcore.data import derive_seed
from kdcore.generation import join_rows
from kdcore.models import Batch
from kdcore.processes import world_size

Row = dict[str, Any]
"""`prompt` and `answer`, lists of tokens, and what else is known of them."""
Kind = Literal["data", "teacher", "new", "old"]

RAISE = 0.1
"""By how much the adaptive fraction of student texts grows at a time."""


class Buffer(nn.Module):
    """The latest rows, first in first out; the same in every process, and part of a checkpoint.

    Args:
        capacity: rows that it holds.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.rows: list[Row] = []
        self.facts: dict[str, float] = {}

    def push(self, rows: Sequence[Row]) -> None:
        """Add the rows of all processes, in the order of their ranks."""
        more: list[Row] = gather_object(list(rows)) if world_size() > 1 else list(rows)
        self.rows = [*self.rows, *more][-self.capacity :]

    def draw(self, batch: Batch, *parts: object) -> Batch:
        """The batch with a row of the buffer in the place of each of its own; which, depends on parts and sample."""
        chosen = [self.rows[derive_seed(*parts, index) % len(self.rows)] for index in batch["index"].tolist()]
        return join_rows([row["prompt"] for row in chosen], [row["answer"] for row in chosen], batch)

    def get_extra_state(self) -> Tensor:
        """Rows and facts, for a checkpoint."""
        return torch.frombuffer(bytearray(json.dumps([self.rows, self.facts]).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Put back what `get_extra_state` gave."""
        self.rows, self.facts = json.loads(bytes(state.cpu().tolist()))


class Schedule:
    """Draws what each step is on.

    Args:
        fraction: of steps on texts of the student, at first.
        teacher: whether the other steps are on texts of the teacher.
        replay: whether texts of the student come from a buffer, and new ones go into it with a probability that falls
            to nothing: `fraction * (1 - step / total)` (DistiLLM, section 3.2).
        adaptive: whether the fraction grows by `RAISE` whenever the validation loss grew.
        eps: by how much it must have grown.
    """

    def __init__(self, fraction: float, *, teacher: bool = False, replay: bool = False, adaptive: bool = False,
                 eps: float = 0.1) -> None:  # fmt: skip
        self.first, self.teacher, self.replay, self.adaptive, self.eps = fraction, teacher, replay, adaptive, eps

    def choose(self, buffer: Buffer, done: float, *parts: object) -> Kind:
        """What a step is on.

        Args:
            buffer: of the texts of the student; keeps the fraction.
            done: the fraction of the training that is done, in [0, 1).
            parts: what the choice depends on: the run's seed and the step, say.
        """
        fraction = buffer.facts.get("fraction", self.first)
        number = random.Random(derive_seed(*parts)).random()
        if number >= fraction:
            return "teacher" if self.teacher else "data"
        if not self.replay:
            return "new"
        return "new" if number < fraction * (1 - done) or not buffer.rows else "old"

    def watch(self, buffer: Buffer, perplexity: float | None) -> None:
        """Raise the fraction if the validation loss grew since it was looked at last."""
        if not self.adaptive or perplexity is None or perplexity <= 0:
            return
        loss = math.log(perplexity)
        if loss >= buffer.facts.get("loss", math.inf) + self.eps:
            buffer.facts["fraction"] = min(1.0, buffer.facts.get("fraction", self.first) + RAISE)
        buffer.facts["loss"] = loss
