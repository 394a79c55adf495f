"""Options of the loss and the method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from kdcore.options import Options

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Levels = Annotated[list[str], Field(min_length=1)]


class ACAMLossOptions(Options):
    """Logits or feature maps, through masks that teacher and student make together in each step."""

    levels: Levels = Field(
        ["logits"], description="what is distilled: `logits`, and taps of feature maps such as `@-1` or a module name"
    )
    teacher_levels: Levels | None = Field(
        None, description="the teacher's counterparts, in the same order; default: what `levels` names"
    )
    alpha: Weight = Field(1.0, description="weight of the masked errors")
    lambda_div: Weight = Field(1.0, description="weight of the likeness of the masks to each other")
    masks: Annotated[list[Literal["channel", "spatial"]], Field(min_length=1)] = Field(
        ["channel", "spatial"], description="over what there are masks"
    )
    num_masks: int | None = Field(
        None, ge=2, description="masks of each kind at a level; default: the classes of a segmentation, otherwise 6"
    )
    query_from: Literal["teacher", "student"] = Field(
        "teacher", description="which net's positions ask in the attention; those of the other answer"
    )
    qk_ratio: float = Field(0.5, gt=0, le=1, description="channels of queries and keys, as a part of the level's")
    max_tokens: int | None = Field(
        4096, ge=1, description="positions in the attention: larger maps are average-pooled for it; null: no limit"
    )
    channel_units: Literal["scalar", "full"] = Field(
        "scalar", description="a channel mask's unit: one gain for all channels, or one for each"
    )
    diversity: Literal["pairwise", "global"] = Field(
        "pairwise", description="mean of the Dice coefficients of all pairs of masks, or one ratio of sums over all"
    )
    mask_weight: Literal["squared", "linear"] = Field(
        "squared", description="how a mask M weighs the squared error: by M squared, or by M, over the sum of M"
    )
    mask_grad: Literal["diversity_only", "full"] = Field(
        "diversity_only",
        description="what trains the masks: their diversity alone, or the masked errors too (with `squared` they "
        "vanish)",
    )
    detach_student_in_fusion: bool = Field(
        True, description="the masks follow the student's maps, but send it no gradient"
    )
    min_mask: float = Field(
        0.02, ge=0, lt=1, description="stop the run where the masks' mean has fallen below this, for then nothing is "
        "distilled any more"
    )  # fmt: skip

    @field_validator("masks")
    @classmethod
    def _once(cls, masks: list[str]) -> list[str]:
        if len(set(masks)) < len(masks):
            raise ValueError("names a kind of mask twice")
        return masks


class ACAMOptions(ACAMLossOptions):
    """Cross-entropy with the labels, and distillation through masks."""

    aux_weight: Weight = Field(0.4, description="weight of the cross-entropy of the student's auxiliary head, if any")
