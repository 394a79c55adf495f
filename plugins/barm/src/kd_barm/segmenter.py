"""A network that grows: a student's feature map, and a head with a branch for each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_barm.functional import shared_background, unify_background
from kd_barm.modules import BackgroundResidualHead
from kdcore import Model, Outputs
from kdcore.errors import ModelError
from kdcore.models import Batch

CONFIG, WEIGHTS = "barm.json", "barm.safetensors"
"""Layout and weights of the head, beside the files of the student itself."""

UNSEEN = -1e4
"""Logit of a class that has not been learned yet: its probability is 0."""


class IncrementalSegmenter(nn.Module):
    """A student and the head that reads one of its maps; the student's own head is not used.

    Args:
        body: the student.
        features: tap of the map, `[B, D, h, w]`.
        head: reads it.
        order: the classes of the data in the order in which they are learned; 0 first.
        shared: whether all steps share one background logit.
    """

    def __init__(
        self, body: Model, features: str, head: BackgroundResidualHead, order: Sequence[int], shared: bool = False
    ) -> None:
        super().__init__()
        self.body, self.features, self.head = body, features, head
        self.order, self.shared = tuple(order), shared

    @classmethod
    def build(
        cls, body: Model, batch: Batch, features: str, order: Sequence[int], shared: bool, head: Mapping[str, Any]
    ) -> IncrementalSegmenter:
        """One with a new head for the map that a batch gives; `head` are its arguments but `in_channels`.

        Raises:
            ModelError: if the tap matches none or several modules, or what it reads is no map.
        """
        names = body.tap(features)
        if len(names) != 1:
            raise ModelError(f"method.features: {features!r} matches {len(names)} modules ({', '.join(names)}); the "
                             "head reads one map")  # fmt: skip
        was_training = body.training
        body.eval()
        with torch.no_grad():
            found = body(batch).features[names[0]]
        body.train(was_training)
        if not isinstance(found, Tensor) or found.ndim != 4:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ModelError(
                f"method.features: {names[0]!r} gives {shape}, not a map [B, D, h, w]; name another module"
            )
        made = BackgroundResidualHead(found.shape[1], **head)
        return cls(body, names[0], made, order, shared)

    def parts(self, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """Raw logits and branch features of each step: see `BackgroundResidualHead.forward`."""
        found: tuple[list[Tensor], list[Tensor]] = self.head(self.body(batch).features[self.features])
        return found

    def unified(self, groups: Sequence[Tensor]) -> Tensor:
        """The logits that it predicts with, of the classes so far in the order of learning."""
        return shared_background(groups) if self.shared else unify_background(groups, training=False)

    def read(self, batch: Batch) -> Outputs:
        """Logits `[B, C, h, w]` of all classes in the data's order."""
        logits = self.unified(self.parts(batch)[0])
        logits = F.pad(logits, (0, 0, 0, 0, 0, len(self.order) - logits.shape[1]), value=UNSEEN)
        places = torch.tensor(self.order, device=logits.device).argsort()
        return Outputs(logits.index_select(1, places))

    def as_model(self) -> Model:
        """Behind the uniform call."""
        stages = [f"body.module.{name}" for name in self.body.stages]
        return Model(self, IncrementalSegmenter.read, save=self.save, labels=self.body.labels, stages=stages,
                     channels_last=self.body.channels_last)  # fmt: skip

    def save(self, folder: Path) -> None:
        """The student's own files, `barm.json` and `barm.safetensors`."""
        from safetensors.torch import save_file

        self.body.save(folder)
        config = {"features": self.features, "order": self.order, "shared": self.shared,
                  "num_classes": self.head.num_classes, **self.head.config}  # fmt: skip
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        state = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        save_file(state, folder / WEIGHTS)

    @classmethod
    def load(cls, body: Model, folder: Path) -> IncrementalSegmenter:
        """The network that `save` wrote, around the student with its weights.

        Raises:
            ModelError: if one of the two files is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / CONFIG).is_file():
            raise ModelError(f"{folder}: no {CONFIG} beside the student, so it was not made by barm")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            arguments = {key: config[key] for key in ("in_channels", "channels", "num_classes", "rates")}
            head = BackgroundResidualHead(**arguments)
            head.load_state_dict(load_file(folder / WEIGHTS))
            features, order, shared = config["features"], config["order"], config["shared"]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"{folder}: the head in {CONFIG} and {WEIGHTS} cannot be read: {error}") from error
        body.tap(features)
        return cls(body, features, head, order, shared)
