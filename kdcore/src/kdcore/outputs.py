"""What a model says about a batch, and what its logits mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from kdcore.errors import ModelError

SIGNALS = ("logits", "embedding", "features", "extras")


@dataclass
class Outputs:
    """What a model says about a batch.

    Logits over a large vocabulary are costly, and not every loss needs all of them at once. A model may therefore give
    the input of its last linear layer and the layer itself: `logits` are then made when they are first read.

    Args:
        logits: `[B, C]` for a class per sample, `[B, C, H, W]` for a class per pixel, `[B, T, V]` for tokens.
        embedding: the input of the last linear layer: `[B, D]`, or with the positions of dense logits.
        features: tapped activations by tap name, in the order of the model's modules.
        extras: anything else a method needs, by name.
        head: the last linear layer, where `logits` are left to be made by it from the embedding.
        codes: what the head makes them of, `[B, ..., K]`, where it is not the embedding: a teacher cache's.
    """

    logits: Tensor | None = None
    embedding: Tensor | None = None
    features: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    head: nn.Module | None = None
    codes: Tensor | None = None
    _logits: Tensor | None = field(init=False, repr=False, compare=False)

    @property
    def pending(self) -> bool:
        """Whether the logits are still to be made."""
        return self._logits is None and self.head is not None

    @property
    def classes(self) -> int | None:
        """How many classes, or tokens, the logits tell apart; `None` without logits."""
        made = self._logits
        if made is None:
            return int(self.head.out_features) if self.head is not None else None  # type: ignore[arg-type]
        return made.shape[-1 if made.ndim == 3 else 1]

    def gives(self, signal: str) -> bool:
        """Whether there is such a signal; makes no logits."""
        if signal == "logits":
            return self.classes is not None
        return self.embedding is not None if signal == "embedding" else bool(getattr(self, signal))

    def need(self, signal: str) -> Tensor:
        """`logits` or `embedding`, for certain.

        Raises:
            ModelError: if the model does not give it.
        """
        value = getattr(self, signal)
        if value is None:
            raise ModelError(f"the model gives no {signal}")
        return value  # type: ignore[no-any-return]

    def select(self, names: Sequence[str]) -> list[Tensor]:
        """The features of these tap names, in this order."""
        return [self.features[name] for name in names]

    def detach(self) -> Outputs:
        """The same outputs outside the autograd graph."""
        detached: Outputs = map_tensors(self, Tensor.detach)
        return detached

    @property
    def head_input(self) -> Tensor | None:
        """What `head` makes the logits of."""
        return self.embedding if self.codes is None else self.codes

    def _get(self) -> Tensor | None:
        if self._logits is None and self.head is not None and self.head_input is not None:
            self._logits = self.head(self.head_input)
        return self._logits

    def _set(self, value: Tensor | None) -> None:
        self._logits = value


Outputs.logits = property(Outputs._get, Outputs._set)  # type: ignore[assignment]  # here: a field cannot be one too


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply `function` to every tensor inside nested outputs, dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Outputs):
        return replace(value, **{name: map_tensors(getattr(value, name), function) for name in SIGNALS})
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(v, function) for v in value)
    return value


@dataclass(frozen=True)
class Labels:
    """What a model's logits mean, so that a teacher and a student that do not fit are found before the first step.

    Args:
        count: number of classes or size of the vocabulary.
        names: class names in the order of the logits, where known.
        vocabulary: fingerprint of the tokenizer, where there is one.
    """

    count: int | None = None
    names: tuple[str, ...] | None = None
    vocabulary: str | None = None
