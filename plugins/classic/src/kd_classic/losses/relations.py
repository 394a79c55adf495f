"""Losses on the relations between samples; each sees the batch of all processes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kd_classic import functional
from kd_classic.layers import Layers, Vectors
from kd_classic.modules import ContrastMemory
from kd_classic.options import CRDOptions, PKTOptions, RKDOptions, SPOptions
from kdcore import DataModule, Outputs
from kdcore.data import derive_seed
from kdcore.errors import DataError
from kdcore.models import Batch


class SP(Layers):
    """`functional.sp`."""

    which = "last"
    relational = True

    def __init__(self, options: SPOptions | None = None) -> None:
        super().__init__(options or SPOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """One value for the batch."""
        (pair,) = self.pairs(student, teacher, batch)
        return functional.sp(*pair)


class RKD(Vectors):
    """`functional.rkd`."""

    def __init__(self, options: RKDOptions | None = None) -> None:
        super().__init__(options or RKDOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """One value for the batch."""
        ours, theirs = self.vectors("student", student, batch), self.vectors("teacher", teacher, batch)
        o = self.options
        return functional.rkd(ours, theirs, distance_weight=o.distance_weight, angle_weight=o.angle_weight)


class PKT(Vectors):
    """`functional.pkt`."""

    def __init__(self, options: PKTOptions | None = None) -> None:
        super().__init__(options or PKTOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """One value for the batch."""
        return functional.pkt(self.vectors("student", student, batch), self.vectors("teacher", teacher, batch))


class CRD(Vectors):
    """`functional.crd` on both sides of `modules.ContrastMemory`, which checkpoints hold.

    A step costs time by the number of negatives, not by the size of the data set.
    """

    def __init__(self, options: CRDOptions | None = None) -> None:
        super().__init__(options or CRDOptions())
        self.memory: ContrastMemory | None = None
        self.negatives: Negatives | None = None
        self.seed = 0

    def setup(self, data: DataModule, split: str) -> None:
        """Learn how many samples there are and, for negatives of other classes, their labels.

        Raises:
            DataError: for a stream, or if more negatives are asked for than there are.
        """
        size = data.size(split)
        if size is None:
            raise DataError("crd keeps a row of memory for each sample: it cannot learn from a stream")
        if self.negatives is None:
            o = self.options
            labels = data.labels(split).numpy() if o.mode == "exact" else np.arange(size)
            self.negatives = Negatives(labels, o.negatives, o.replacement)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch. In training it also moves the rows of the banks."""
        ours, theirs = (self.vectors(role, o, batch).flatten(1) for role, o in
                        (("student", student), ("teacher", teacher)))  # fmt: skip
        assert self.negatives is not None, "setup() comes before forward()"
        size = len(self.negatives.labels)
        if self.memory is None:
            o = self.options
            self.memory = ContrastMemory(ours.shape[1], theirs.shape[1], size, width=o.width,
                                         temperature=o.temperature, momentum=o.momentum)  # fmt: skip
            self.memory.to(ours.device).train(self.training)
            self.seed = int(torch.randint(2**62, ()))
        index: Tensor = batch["index"]
        samples = index.tolist()
        drawn = self.negatives.draw(samples, derive_seed(self.seed, self.progress.step, samples[0]))
        rows = torch.cat([index[:, None], torch.from_numpy(drawn).to(index.device)], dim=1)
        student_scores, teacher_scores, anchors, targets = self.memory(ours, theirs, rows)
        if self.training:
            self.memory.update(anchors, targets, index)
        return functional.crd(student_scores, size) + functional.crd(teacher_scores, size)


class Negatives:
    """Draws, for a sample, others with another label.

    Args:
        labels: ``[N]``.
        count: how many per sample.
        replacement: whether one may be drawn twice.

    Raises:
        DataError: if there are not as many, or none at all.
    """

    def __init__(self, labels: np.ndarray, count: int, replacement: bool) -> None:
        self.labels, self.count, self.replacement = labels, count, replacement
        self.order = np.argsort(labels, kind="stable")
        values, starts, sizes = np.unique(labels[self.order], return_index=True, return_counts=True)
        self.blocks = {v: (start, n) for v, start, n in zip(values.tolist(), starts, sizes, strict=True)}
        least = len(labels) - sizes.max()
        if least < 1:
            raise DataError("crd contrasts a sample with those of other classes, but all have one label")
        if least < count and not replacement:
            raise DataError(f"crd: {count} negatives are asked for, but some samples have only {least} others to be "
                            "contrasted with; set fewer `negatives`, or `replacement: true`")  # fmt: skip

    def draw(self, samples: Sequence[int], seed: int) -> np.ndarray:
        """Indices ``[len(samples), count]``: positions outside the block of the sample's label, in label order."""
        generator = np.random.default_rng(seed)
        drawn = np.empty((len(samples), self.count), dtype=np.int64)
        for row, sample in zip(drawn, samples, strict=True):
            start, size = self.blocks[self.labels[sample].item()]
            others = len(self.labels) - size
            picks = generator.choice(others, self.count, replace=self.replacement, shuffle=False)
            row[:] = self.order[np.where(picks < start, picks, picks + size)]
        return drawn
