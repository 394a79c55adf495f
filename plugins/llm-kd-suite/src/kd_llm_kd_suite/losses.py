"""The losses of the suite as terms of an objective."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_llm_kd_suite import functional, liger
from kd_llm_kd_suite.chunked import mean_over_tokens
from kd_llm_kd_suite.options import (
    AttentionOptions,
    HiddenOptions,
    JSDOptions,
    SkewOptions,
    SymmetricOptions,
    TemperatureOptions,
    ULDOptions,
)
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import DataError, ModelError
from kdcore.models import Batch


def need_labels(batch: Batch) -> Tensor:
    """Labels `[B, T]` of a batch of texts. Raises `DataError` where it has none."""
    if "labels" not in batch:
        raise DataError(f"a language model's loss needs labels; the data's batches have only {', '.join(batch)}")
    labels: Tensor = batch["labels"]
    return labels


class NextToken(Loss):
    """Cross-entropy of the next token: supervised fine-tuning, over a large vocabulary too."""

    needs = {"student": ("logits",)}

    def __init__(self, options: None = None) -> None:
        super().__init__()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions that are not ignored."""
        return mean_over_tokens(next_token, student, None, need_labels(batch))


def next_token(logits: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """`-log q(y)` of each position `[n]`, a row function for `mean_over_tokens`."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


class Divergence(Loss):
    """A divergence between next-token distributions: mean over the positions that are not ignored.

    Args:
        name: in `functional.DIVERGENCES`.
        options: of it.
    """

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.rows = functools.partial(functional.DIVERGENCES[name], **options)
        self.beta = liger.BETAS.get(name, options.get("beta"))
        self.temperature = options.get("temperature", 1.0)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean, in nats."""
        labels = need_labels(batch)
        if self.beta is not None and liger.fits(student, teacher, labels):
            return liger.generalized_jsd(student, teacher, labels, self.beta, self.temperature)
        return mean_over_tokens(lambda ours, theirs, _: self.rows(ours, theirs), student, teacher, labels)


def forward_kl(options: TemperatureOptions | None = None) -> Divergence:
    """The loss `fkl`."""
    return _of("fkl", options)


def reverse_kl(options: TemperatureOptions | None = None) -> Divergence:
    """The loss `rkl`."""
    return _of("rkl", options)


def symmetric_kl(options: SymmetricOptions | None = None) -> Divergence:
    """The loss `symmetric-kl`."""
    return _of("sym", options)


def jsd(options: JSDOptions | None = None) -> Divergence:
    """The loss `jsd`."""
    return _of("jsd", options)


def total_variation(options: TemperatureOptions | None = None) -> Divergence:
    """The loss `tvd`."""
    return _of("tvd", options)


def skewed_forward_kl(options: SkewOptions | None = None) -> Divergence:
    """The loss `sfkl`."""
    return _of("sfkl", options)


def skewed_reverse_kl(options: SkewOptions | None = None) -> Divergence:
    """The loss `srkl`."""
    return _of("srkl", options)


def _of(name: str, options: Any) -> Divergence:
    return Divergence(name, **(options.model_dump() if options else {}))


class HiddenStates(Loss):
    """Hidden states of the student, each projected by a linear layer of its own, against those of evenly spread layers
    of the teacher; mean over the positions with a token and over the layers."""

    needs = {"student": ("features",), "teacher": ("features",)}

    def __init__(self, options: HiddenOptions | None = None) -> None:
        super().__init__()
        self.options = options or HiddenOptions()
        self.taps = {"student": self.options.student, "teacher": self.options.teacher}
        self.projectors = nn.ModuleList()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """The mean."""
        ours, theirs = student.select(self.names["student"]), teacher.select(self.names["teacher"])
        if len(theirs) < len(ours):
            raise ModelError(f"hidden-states: {len(ours)} layers of the student and {len(theirs)} of the teacher: tap "
                             "as many of the student as there are of the teacher, or fewer")  # fmt: skip
        theirs = _spread(theirs, len(ours))
        if not self.projectors:
            self.projectors = nn.ModuleList(_projector(s, t) for s, t in zip(ours, theirs, strict=True))
        real = _real(batch, ours[0])
        compare = getattr(functional, f"hidden_{self.options.kind}" if self.options.kind != "mmd" else "mmd")
        values = [compare(project(s[real]), t[real]) for project, s, t in
                  zip(self.projectors, ours, theirs, strict=True)]  # fmt: skip
        return torch.stack(values).mean()

    def count(self, batch: Batch) -> Tensor:
        """Positions with a token."""
        return _count_real(batch)


def _spread(layers: list[Any], count: int) -> list[Any]:
    """So many of the layers: uniformly, up to the last. The i-th of n goes with the (i m / n)-th of m."""
    return [layers[(i + 1) * len(layers) // count - 1] for i in range(count)]


def _count_real(batch: Batch) -> Tensor:
    ids: Tensor = batch["input_ids"]
    mask: Tensor = batch.get("attention_mask", torch.ones_like(ids))
    return mask.sum()


def _projector(student: Tensor, teacher: Tensor) -> nn.Linear:
    layer = nn.Linear(student.shape[-1], teacher.shape[-1], device=student.device, dtype=torch.float32)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _real(batch: Batch, like: Tensor) -> Tensor:
    """Bool `[B, T]`: where there is a token."""
    mask = batch.get("attention_mask")
    return torch.ones(like.shape[:2], dtype=torch.bool, device=like.device) if mask is None else mask > 0


class AttentionMaps(Loss):
    """Attention maps of the student's layers against those of evenly spread layers of the teacher."""

    needs = {"student": ("extras",), "teacher": ("extras",)}

    def __init__(self, options: AttentionOptions | None = None) -> None:
        super().__init__()
        self.options = options or AttentionOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the layers of the student."""
        ours, theirs = (o.extras.get("attentions") for o in (student, teacher))
        if not ours or not theirs:
            raise ModelError("attention-maps: a model gives no attention maps: set `attentions: true` for teacher "
                             "and student")  # fmt: skip
        compare = functional.attention_mse if self.options.kind == "mse" else functional.attention_kl
        mask = _real(batch, batch["input_ids"])
        pairs = zip(ours, _spread(theirs, len(ours)), strict=True)
        return torch.stack([compare(s, t, mask) for s, t in pairs]).mean()

    def count(self, batch: Batch) -> Tensor:
        """Positions with a token."""
        return _count_real(batch)


class ULD(Loss):
    """Sorted probabilities of two vocabularies, position by position of the answers: the i-th token of the student's
    answer goes with the i-th of the teacher's, as far as both go (Boizard et al. 2024)."""

    needs = {"student": ("logits",), "teacher": ("logits",)}
    same_labels = False

    def __init__(self, options: ULDOptions | None = None) -> None:
        super().__init__()
        self.options = options or ULDOptions()

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the positions of the student's answers that have a counterpart."""
        labels: Tensor = batch["teacher_labels" if "teacher_labels" in batch else "labels"]
        ours, theirs = need_labels(batch) != IGNORE, labels != IGNORE
        first, second = counterparts(ours, theirs)
        rows = functional.uld(student.need("logits").flatten(0, 1)[first], teacher.need("logits").flatten(0, 1)[second],
                              top=self.options.top)  # fmt: skip
        return rows.sum() / max(len(rows), 1)


def counterparts(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """Flat places of the i-th answer token of each row in two masks `[B, S]` and `[B, T]`, as far as both have one."""
    first, second = [], []
    for row in range(len(ours)):
        a, b = ours[row].nonzero().squeeze(1), theirs[row].nonzero().squeeze(1)
        size = min(len(a), len(b))
        first.append(a[:size] + row * ours.shape[1])
        second.append(b[:size] + row * theirs.shape[1])
    return torch.cat(first), torch.cat(second)
