"""Losses over a large vocabulary, a few positions at a time.

Logits `[N, V]` of a student and a teacher, their softmaxes, and the gradients of all of them are what fills the memory
of language-model distillation. Here a loss takes a chunk of positions at a time: its logits are made from the hidden
states by the models' own last layers (where the models give both), and what remains of a chunk is its value and the
gradient of what went in. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kdcore.data import IGNORE
from kdcore.models import Outputs

Rows = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""Student logits `[n, V]`, teacher logits `[n, V]` or `None`, the positions' labels `[n]` -> a value per position."""

CHUNK = {"cpu": 2**23, "cuda": 2**26}
"""Logits of a chunk, about."""
PLAIN = 2**21
"""Logits up to which all positions are taken at once."""


@dataclass(frozen=True)
class Scores:
    """Where logits come from: `[N, V]` themselves, or hidden states `[N, D]` and the layer that makes them."""

    inputs: Tensor
    head: nn.Module | None = None

    @classmethod
    def of(cls, outputs: Outputs) -> Scores:
        """Of a model's outputs `[B, T, ...]`, all positions in a row."""
        if outputs.pending and outputs.head is not None:
            assert outputs.head_input is not None
            return cls(outputs.head_input.flatten(0, -2), outputs.head)
        return cls(outputs.need("logits").flatten(0, -2))

    @property
    def size(self) -> int:
        """Of the vocabulary."""
        return self.head.out_features if self.head is not None else self.inputs.shape[-1]

    def at(self, where: Tensor) -> Tensor:
        """The logits `[n, V]` of some positions."""
        rows = self.inputs[where]
        return rows if self.head is None else self.head(rows)

    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The inputs, and weight and bias of the layer."""
        return self.inputs, *((None, None) if self.head is None else (self.head.weight, self.head.bias))


def mean_over_tokens(rows: Rows, student: Outputs, teacher: Outputs | None, labels: Tensor,
                     parameters: Sequence[Tensor] = ()) -> Tensor:  # fmt: skip
    """The mean of a loss over the positions whose label counts; 0 if there is none.

    Args:
        rows: the loss, by position.
        student: logits `[B, T, V]`, made already or pending.
        teacher: the same; never gets a gradient.
        labels: `[B, T]`; `IGNORE` where a position does not count.
        parameters: tensors that `rows` uses besides and that are trained.
    """
    ours, flat = Scores.of(student), labels.flatten()
    theirs = Scores.of(teacher) if teacher is not None else None
    where = (flat != IGNORE).nonzero().squeeze(1)
    if where.numel() * ours.size <= PLAIN or not _fits(ours):
        whole = None if teacher is None else teacher.need("logits").detach().flatten(0, 1)[where]
        values = rows(student.need("logits").flatten(0, 1)[where], whole, flat[where])
        return values.sum() / max(where.numel(), 1)
    mean: Tensor = _Chunked.apply(rows, theirs, flat, where, torch.is_grad_enabled(), *ours.parts(), *parameters)  # type: ignore[no-untyped-call]
    return mean


def _fits(scores: Scores) -> bool:
    """Whether the layer is one tensor that all of it can be read from: not one that is spread over processes."""
    return scores.head is None or type(scores.head.weight) in (Tensor, nn.Parameter)


class _Chunked(torch.autograd.Function):
    """The mean over positions; its gradients are computed with it, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, teacher: Scores | None, labels: Tensor, where: Tensor, training: bool,
                inputs: Tensor, weight: Tensor | None, bias: Tensor | None, *parameters: Tensor) -> Tensor:  # fmt: skip
        training = training and any(ctx.needs_input_grad)
        student = Student(inputs, weight, bias, [training and wanted for wanted in ctx.needs_input_grad[5:8]])
        others = [torch.zeros_like(p) for p in parameters]
        total = inputs.new_zeros((), dtype=torch.float32)
        step = max(1, CHUNK.get(inputs.device.type, CHUNK["cuda"]) // student.size)
        for chosen in torch.split(where, step):
            theirs = teacher.at(chosen) if teacher is not None else None
            with torch.set_grad_enabled(training):
                logits = student.logits(chosen).requires_grad_(training)
                value = rows(logits, theirs, labels[chosen]).sum()
                found = torch.autograd.grad(value, [logits, *parameters], allow_unused=True) if training else ()
            total += value.detach()
            if found:
                student.add(chosen, found[0])
                for sum_, more in zip(others, found[1:], strict=True):
                    sum_ += more if more is not None else 0
        count = max(where.numel(), 1)
        ctx.gradients = [*student.gradients, *others]
        ctx.count = count
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of this loss were taken before: compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor / ctx.count)
        return None, None, None, None, None, *gradients


class Student:
    """The student's side of a chunk: its logits, and the gradients of what they are made of."""

    def __init__(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None, wanted: Sequence[bool]) -> None:
        self.inputs, self.weight, self.bias = inputs, weight, bias
        kind = inputs.device.type
        half = torch.is_autocast_enabled(kind) and weight is not None
        self.dtype = torch.get_autocast_dtype(kind) if half else inputs.dtype
        self.matrix = None if weight is None else weight.detach().to(self.dtype)
        whole = (inputs, weight, bias)
        self.gradients = [torch.zeros_like(t) if t is not None and want else None
                          for t, want in zip(whole, wanted, strict=True)]  # fmt: skip
        self.size = inputs.shape[-1] if weight is None else weight.shape[0]

    def logits(self, chosen: Tensor) -> Tensor:
        """`[n, V]`, outside the autograd graph."""
        rows = self.inputs.detach()[chosen]
        if self.matrix is None:
            return rows
        return F.linear(rows.to(self.dtype), self.matrix, None if self.bias is None else self.bias.to(self.dtype))

    def add(self, chosen: Tensor, gradient: Tensor) -> None:
        """Add what the gradient of a chunk's logits `[n, V]` means for inputs, weight and bias."""
        inputs, weight, bias = self.gradients
        if self.matrix is None:
            if inputs is not None:
                inputs[chosen] = gradient.to(inputs.dtype)
            return
        gradient = gradient.to(self.dtype)
        if inputs is not None:
            inputs[chosen] = (gradient @ self.matrix).to(inputs.dtype)
        if weight is not None:
            rows = self.inputs.detach()[chosen].to(self.dtype)
            if weight.dtype == self.dtype:
                weight.addmm_(gradient.T, rows)
            else:
                weight += gradient.T @ rows
        if bias is not None:
            bias += gradient.sum(0)
