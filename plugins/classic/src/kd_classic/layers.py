"""Which layers of two models are compared, and their activations as maps ``[B, Ch, H, W]``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from kd_classic.options import LayerOptions
from kdcore import Loss, Model, Outputs
from kdcore.errors import ModelError
from kdcore.losses import count_samples
from kdcore.models import Batch, Source

MOST_STAGES = 4
"""Stages that are compared where one of the models is a CNN: those after the stem."""


class Layers(Loss):
    """A loss on pairs of layers.

    Unless they are named, they are chosen from the stages of the two models, as many of each: the last ones of a CNN,
    evenly spaced ones of a stack of equal blocks. A layer's activations become a map: those of a vision transformer
    the grid of its patches, without class token; those of a text encoder a row of tokens, zero where there is padding
    (or, where a loss compares position by position, one 1x1 map per token).

    Attributes:
        which: the layers compared where none are named.
        before: by role, whether they are read before the activation that they end with.
        by_position: whether each position is compared with the same one and no other.
    """

    needs = {"student": ("features",), "teacher": ("features",)}
    which: Literal["all", "middle", "last"] = "all"
    before: tuple[str, ...] = ()
    by_position: bool = False

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.options: Any = options
        self.taps = {"student": list(options.student_layers), "teacher": list(options.teacher_layers)}

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Choose the layers if none are named, and tap them."""
        if not self.taps["student"] and teacher is not None:
            chosen = choose(student, teacher, self.which)
            for role, names in zip(("student", "teacher"), chosen, strict=True):
                self.taps[role] = [f"{name}:pre" if role in self.before else name for name in names]
        super().bind(student, teacher)
        counts = [len(self.names.get(role, ())) for role in ("student", "teacher")]
        if teacher is not None and counts[0] != counts[1]:
            named = {role: ", ".join(self.names[role]) for role in ("student", "teacher")}
            raise ModelError(f"layers are paired in order, but the student has {counts[0]} ({named['student']}) and "
                             f"the teacher {counts[1]} ({named['teacher']}); set student_layers and "
                             "teacher_layers")  # fmt: skip

    def pairs(self, student: Outputs, teacher: Outputs, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """The maps of both sides, pair by pair.

        Raises:
            ModelError: if a layer's activations cannot be seen as a map.
        """
        return list(zip(self.maps("student", student, batch), self.maps("teacher", teacher, batch), strict=True))

    def maps(self, role: str, outputs: Outputs, batch: Batch) -> list[Tensor]:
        """The maps of one side."""
        names = self.names[role]
        mask = batch.get("attention_mask")
        try:
            return [as_map(f, mask, self.by_position) for f in outputs.select(names)]
        except ValueError as error:
            raise ModelError(f"{type(self).__name__}: the {role}'s layers {', '.join(names)}: {error}; "
                             f"name others in {role}_layers") from error  # fmt: skip

    def count(self, batch: Batch) -> Tensor:
        """Samples, or tokens where each counts by itself."""
        if self.by_position and "attention_mask" in batch:
            mask: Tensor = batch["attention_mask"]
            return mask.sum()
        return count_samples(batch)


def choose(student: Source, teacher: Source, which: str) -> tuple[list[str], list[str]]:
    """Names of the stages of both models that a loss compares.

    Raises:
        ModelError: if a model names no stages, or the teacher is no live model.
    """
    stages = []
    for role, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, Model):
            model.tap("@all")  # says why not
        elif not model.stages:
            raise ModelError(f"the {role} ({type(model.module).__name__}) names no stages to choose layers from: "
                             "give module names in student_layers and teacher_layers, such as [layer3]")  # fmt: skip
        else:
            stages.append((model.stages, _are_blocks(model)))
    count = min(len(names) for names, _ in stages)
    if not all(blocks for _, blocks in stages):
        count = min(count, MOST_STAGES)
    chosen = [_spread(names, count) if blocks else list(names)[-count:] for names, blocks in stages]
    picked = {"all": slice(None), "middle": slice(count // 2, count // 2 + 1), "last": slice(-1, None)}[which]
    return chosen[0][picked], chosen[1][picked]


def _are_blocks(model: Model) -> bool:
    """Whether the stages are a stack of equal blocks, as in a transformer."""
    sizes = {sum(p.numel() for p in model.module.get_submodule(name).parameters()) for name in model.stages}
    return len(sizes) == 1 and len(model.stages) > 1


def _spread(names: Sequence[str], count: int) -> list[str]:
    """So many of the names, evenly spaced, the last among them."""
    return [names[round((i + 1) * len(names) / count) - 1] for i in range(count)]


def as_map(features: Any, attention_mask: Tensor | None = None, by_position: bool = False) -> Tensor:
    """Activations as a map ``[B, Ch, H, W]``; see `Layers`.

    Args:
        features: ``[B, Ch, H, W]``, ``[B, N, D]`` or ``[B, D]``.
        attention_mask: ``[B, N]``, if the positions are tokens of a text.
        by_position: give each token its own 1x1 map, ``[tokens, D, 1, 1]``.

    Raises:
        ValueError: for another number of dimensions, or patches that make no square.
    """
    if not isinstance(features, Tensor):
        raise ValueError(f"give {type(features).__name__}, not a tensor")
    if features.ndim == 4:
        return features
    if features.ndim == 2:
        return features[:, :, None, None]
    if features.ndim != 3:
        raise ValueError(f"give {list(features.shape)}, which is neither a map [B, Ch, H, W] nor positions [B, N, D]")
    if attention_mask is not None and attention_mask.shape == features.shape[:2]:
        if by_position:
            return features[attention_mask.bool()][:, :, None, None]
        return (features * attention_mask[:, :, None]).transpose(1, 2)[:, :, None]
    side = math.isqrt(features.shape[1])
    extra = features.shape[1] - side**2  # class token, distillation token, registers
    if extra >= 2 * side and extra > 1:
        raise ValueError(f"give {features.shape[1]} positions, which make no square of patches")
    return features[:, extra:].transpose(1, 2).unflatten(2, (side, side))


class Vectors(Loss):
    """A loss on one vector per sample: the model's embedding, that is the input of its classifier, unless a layer is
    named. Positions are averaged for tokens, and flattened for maps. It sees the batch of all processes."""

    relational = True

    def __init__(self, options: LayerOptions) -> None:
        super().__init__()
        self.options: Any = options
        self.taps = {"student": list(options.student_layers), "teacher": list(options.teacher_layers)}
        self.needs = {"student": ("embedding",), "teacher": ("embedding",)}

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the named layer, or the input of the classifier for models that give no embedding."""
        super().bind(student, teacher)
        for role, model in (("student", student), ("teacher", teacher)):
            if model is not None and not self.names.get(role):
                self.names[role] = tap_embedding(model)
            if self.names.get(role):
                self.needs = {**self.needs, role: ("features",)}

    def vectors(self, role: str, outputs: Outputs, batch: Batch) -> Tensor:
        """``[B, ...]``, one vector or map per sample."""
        return embedding(outputs, self.names.get(role, []), bool(self.taps[role]), batch)

    def count(self, batch: Batch) -> Tensor:
        """Samples."""
        return count_samples(batch)


def tap_embedding(model: Source) -> list[str]:
    """The tap on what the classifier reads; none where the model has no classifier, or is no live model."""
    try:
        return model.tap("@head:input")
    except ModelError:
        return []


def embedding(outputs: Outputs, names: Sequence[str], named: bool, batch: Batch) -> Tensor:
    """The embedding, or the tapped layer if one was asked for or there is no embedding; tokens are averaged."""
    found = outputs.embedding if outputs.embedding is not None and not named else outputs.select(names)[0]
    if found.ndim != 3:
        return found
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != found.shape[:2]:
        return found.mean(1)
    weight = mask[:, :, None].to(found.dtype)
    return (found * weight).sum(1) / weight.sum(1).clamp(min=1)
