"""Options of the loss and the method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from kdcore.options import Options

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BPKDLossOptions(Options):
    """The teacher's logits, apart at the contours of the labels and in what lies between them."""

    lambda_edge: Weight = Field(50.0, description="weight of the edge term")
    lambda_body: Weight = Field(20.0, description="weight of the body term")
    alpha: Weight | Annotated[list[Weight], Field(min_length=1)] = Field(
        2.0, description="weight of a class in the edge term: one number, or one per class"
    )
    edge_width: int = Field(7, ge=1, description="side of the window that makes the contours, in label pixels, odd")
    temperature: float = Field(1.0, gt=0, description="softmax temperature of both sides and both terms")
    edge_norm: Literal["per_class", "total"] = Field(
        "per_class", description="the edge term is divided by the edge cells of each class, or of all classes together"
    )
    pre_mask: bool = Field(True, description="mask the logits with the contours before the softmax of the edge term")
    post_mask: bool = Field(True, description="weigh the divergence of the edge term with the contours")
    align_corners: bool = Field(False, description="of the resizing of a teacher of another stride")
    ramp: float = Field(0.0, ge=0, le=1, description="part of the training over which lambda_edge rises from 0")

    @field_validator("edge_width")
    @classmethod
    def _odd(cls, width: int) -> int:
        if width % 2 == 0:
            raise ValueError("must be odd, so that the window has a centre")
        return width


class BPKDOptions(BPKDLossOptions):
    """Cross-entropy with the labels, and distillation apart at contours and in bodies."""

    aux_weight: Weight = Field(0.4, description="weight of the cross-entropy of the student's auxiliary head, if any")
