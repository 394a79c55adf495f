"""Options of the loss and the method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kdcore.options import Options

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Four = Annotated[tuple[Weight, ...], Field(min_length=4, max_length=4)]
Taps = tuple[str, ...]


class TransKDLossOptions(Options):
    """Feature maps of four stages, fused from the deepest up, and the patch embeddings that the stages begin with."""

    variant: Literal["base", "gl", "ea"] = Field(
        "base", description="base; gl: the last embedding is mixed globally and locally; ea: with embedding assistants"
    )
    mid_channels: int = Field(64, ge=1, description="channels of the maps that a stage hands on to the one above it")
    reduction: int = Field(16, ge=1, description="the gate of a fusion has mid_channels / reduction channels,")
    min_reduced: int = Field(32, ge=1, description="and this many at least")
    hcl_weight: Weight = Field(1.0, description="weight of the hierarchical context loss between the maps")
    embed: int = Field(
        5, ge=0, le=5, description="embeddings that are distilled: 0 none, 1 to 4 that stage alone with weight 1, 5 all"
    )
    embed_weights: Four = Field((0.1, 0.1, 0.5, 1.0), description="weight of each stage's embedding, under embed=5")
    gl_heads: int = Field(8, ge=1, description="attention heads of the gl variant; they divide the student's width")
    gl_residual: bool = Field(False, description="add the embedding to what the gl variant makes of it")
    student_stages: Taps = Field(
        ("@all",), min_length=1, description="taps of the student's four maps [B, C, H, W], shallow to deep"
    )
    teacher_stages: Taps = Field(("@all",), min_length=1, description="taps of the teacher's four maps")
    student_embeds: Taps = Field(
        (), description="taps of the student's four patch embeddings; default: found beside the stages"
    )
    teacher_embeds: Taps = Field((), description="taps of the teacher's patch embeddings; default: as the student's")

    @property
    def stage_weights(self) -> tuple[float, ...]:
        """Weight of each stage's embedding, as `embed` and `embed_weights` have it together."""
        return self.embed_weights if self.embed == 5 else tuple(float(i == self.embed) for i in (1, 2, 3, 4))


class TransKDOptions(TransKDLossOptions):
    """Cross-entropy at stride 4, and distillation of feature maps and patch embeddings."""

    class_weights: tuple[Weight, ...] | None = Field(
        None, description="weight of each class in the cross-entropy; default: all alike"
    )
