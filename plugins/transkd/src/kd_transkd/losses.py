"""The losses: distillation of maps and patch embeddings, and the cross-entropy at stride 4."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kd_classic.functional import hcl
from kd_transkd.functional import (
    as_tokens,
    embedding_loss,
    label_weight,
    reduce_labels,
    resize_map,
    resize_tokens,
    strided_cross_entropy,
)
from kd_transkd.modules import CrossSelectiveFusion, EmbeddingAlignment, EmbeddingAssistant, GLMixer
from kd_transkd.options import TransKDLossOptions
from kd_transkd.taps import tap_embeddings, tap_stages
from kdcore import Loss, Outputs
from kdcore.data import IGNORE
from kdcore.errors import DataError, ModelError
from kdcore.losses import count_samples
from kdcore.models import Batch, Source

ROLES = ("student", "teacher")


class TransKD(Loss):
    """Liu et al. 2024: the hierarchical context loss between the teacher's maps and the student's after cross
    selective fusion, and squared errors between patch embeddings.

    It reads the maps `[B, C, H, W]` that come out of four stages of either side, and the patch embeddings that go into
    them; for the variant `ea` the image too. Grids that differ are resized to the teacher's.
    """

    needs: Mapping[str, Sequence[str]] = {"student": ("features",), "teacher": ("features",)}

    def __init__(self, options: TransKDLossOptions | None = None) -> None:
        super().__init__()
        self.options = options or TransKDLossOptions()
        self.weights = {i: w for i, w in enumerate(self.options.stage_weights) if w > 0}
        if not self.weights and not self.options.hcl_weight:
            self.needs = {}
        self.stages: dict[str, list[str]] = {}
        self.embeds: dict[str, list[str]] = {}
        self.fusion: CrossSelectiveFusion | None = None
        self.alignments = nn.ModuleDict()

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap stages and patch embeddings of both sides.

        Raises:
            ModelError: if there are not four of each.
        """
        if not self.needs:
            return
        for role, model in zip(ROLES, (student, teacher), strict=True):
            assert model is not None
            self.stages[role] = tap_stages(model, role, getattr(self.options, f"{role}_stages"))
            if self.weights:
                embeds = getattr(self.options, f"{role}_embeds")
                self.embeds[role] = tap_embeddings(model, role, embeds, self.stages[role])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """`hcl` and `embed`: weighted, each a mean over the images; neither where its weight is 0.

        Raises:
            ModelError: if the tapped activations are no maps or embeddings.
            DataError: if the variant `ea` gets no image.
        """
        if not self.needs:
            return {}
        maps = {role: self._maps(outputs, role) for role, outputs in zip(ROLES, (student, teacher), strict=True)}
        terms = {}
        try:
            if self.options.hcl_weight:
                terms["hcl"] = self.options.hcl_weight * hcl(self._fused(**maps), maps["teacher"])
            if self.weights:
                tokens = {
                    role: [as_tokens(e, m) for e, m in zip(outputs.select(self.embeds[role]), maps[role], strict=True)]
                    for role, outputs in zip(ROLES, (student, teacher), strict=True)
                }
                aligned = self._aligned(maps, tokens, batch)
                theirs = [tokens["teacher"][i] for i in self.weights]
                terms["embed"] = embedding_loss(aligned, theirs, list(self.weights.values()))
        except ValueError as error:
            raise ModelError(f"transkd: {error}") from error
        return terms

    def _maps(self, outputs: Outputs, role: str) -> list[Tensor]:
        maps = outputs.select(self.stages[role])
        for name, found in zip(self.stages[role], maps, strict=True):
            if found.ndim != 4:
                raise ModelError(f"transkd needs maps [B, C, H, W], but the {role}'s {name!r} gives "
                                 f"{list(found.shape)}: name other modules in {role}_stages")  # fmt: skip
        return maps

    def _fused(self, student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
        """The student's maps after CSF, of the teacher's shapes."""
        o = self.options
        if self.fusion is None:
            widths = ([m.shape[1] for m in maps] for maps in (student, teacher))
            reduced = max(o.mid_channels // o.reduction, o.min_reduced)
            made = CrossSelectiveFusion(*widths, channels_mid=o.mid_channels, reduced=reduced)
            self.fusion = made.to(student[0].device).train(self.training)
        found = self.fusion(student)
        return [resize_map(f, _grid(t)) for f, t in zip(found, teacher, strict=True)]

    def _aligned(
        self, maps: Mapping[str, list[Tensor]], tokens: Mapping[str, list[Tensor]], batch: Batch
    ) -> list[Tensor]:
        """The student's embeddings of the stages that have a weight, of the shapes of the teacher's."""
        if self.options.variant == "ea" and "image" not in batch:
            raise DataError("the variant ea embeds the image itself, but the data has no `image`")
        found = []
        for i in self.weights:
            ours, theirs = maps["student"][i], maps["teacher"][i]
            source = maps["student"][i - 1] if i else batch.get("image", ours)
            if str(i) not in self.alignments:
                made = self._alignment(i, ours.shape[1], theirs.shape[1], source.shape[1])
                self.alignments[str(i)] = made.to(ours.device).train(self.training)
            aligned = self.alignments[str(i)](tokens["student"][i], _grid(ours), source)
            found.append(resize_tokens(aligned, _grid(ours), _grid(theirs)))
        return found

    def _alignment(self, index: int, channels_in: int, channels_out: int, channels_source: int) -> nn.Module:
        o = self.options
        mixed = o.variant == "gl" and index == 3
        mixer = GLMixer(channels_in, heads=o.gl_heads, residual=o.gl_residual) if mixed else None
        assisted = o.variant == "ea"
        assistant = EmbeddingAssistant(channels_source, channels_out, first=index == 0) if assisted else None
        return EmbeddingAlignment(channels_in, channels_out, stage=index + 1, mixer=mixer, assistant=assistant)

    def count(self, batch: Batch) -> Tensor:
        """Images: the terms are averaged over them, however many of their pixels are labelled."""
        return count_samples(batch)


class StridedCrossEntropy(Loss):
    """`functional.strided_cross_entropy` between the student's logits `[B, C, h, w]` and the labels `mask`.

    Args:
        class_weights: one per class, or `None` for all alike.
    """

    needs: Mapping[str, Sequence[str]] = {"student": ("logits",)}
    weights: Tensor | None

    def __init__(self, class_weights: Sequence[float] | None = None) -> None:
        super().__init__()
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weights", weights)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Weighted mean over the cells whose label is not ignored."""
        return strided_cross_entropy(student.need("logits"), batch["mask"], self.weights, ignore_index=IGNORE)

    def count(self, batch: Batch) -> Tensor:
        """The weight of the labels at stride 4."""
        return label_weight(reduce_labels(batch["mask"]), self.weights, ignore_index=IGNORE)


def _grid(features: Tensor) -> tuple[int, int]:
    height, width = features.shape[-2:]
    return height, width
