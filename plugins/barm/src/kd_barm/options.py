"""Options of the method, and of the backbone from timm."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from kdcore.options import Download, Options

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BARMOptions(Options):
    """Classes in steps, each learned without the data and the labels of the others."""

    task: str = Field(
        "15-1",
        pattern=r"^[1-9]\d*-[1-9]\d*$",
        description="foreground classes of the first step, and of each further",
    )
    protocol: Literal["overlap", "disjoint"] = Field(
        "overlap", description="images of a step: all with one of its classes, or only those without a later class"
    )
    class_order: list[int] | None = Field(
        None, description="foreground classes in the order in which they are learned; default: that of the data"
    )
    features: str = Field("@head:input", description="tap of the student's map `[B, D, h, w]` that the new head reads")
    aspp: bool = Field(False, description="atrous spatial pyramid pooling between that map and the branches")
    aspp_rates: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [6, 12, 18], description="dilations of its 3x3 convolutions; for stride 8 twice as large"
    )
    channels: int = Field(256, ge=1, description="channels of ASPP and of the branches")
    background: Literal["residual", "shared"] = Field(
        "residual", description="each step's residual lowers the background, or all steps train one background channel"
    )
    pseudo_thresh: float | None = Field(
        0.7, gt=0, le=1, description="teacher's probability from which background gets an old class; null for never"
    )
    w_tri: Weight = Field(5.0, description="weight of the residual's triplet term, on the background")
    w_bfd: Weight = Field(4.0, description="weight of the distillation of background features")
    w_gkd: Weight = Field(1.0, description="weight of the distillation of the old steps' logits")
    w_bga_bce: Weight = Field(1.0, description="weight of the residual's cross-entropy, on the new classes")
    freeze_bn: bool = Field(True, description="freeze every batch norm from the second step on")
    copy_bn_stats: bool = Field(False, description="a new branch also takes over the first one's running statistics")
    lr_aspp: Rate = Field(1e-3, description="learning rate of ASPP from the second step on")
    lr_old: Rate = Field(1e-4, description="learning rate of backbone and old branches from the second step on")
    lr_backbone: Rate = Field(1e-3, description="learning rate of the backbone in the first step")
    best_base: bool = Field(
        True, description="the first step ends with the weights that were best on the first split of `eval.on`"
    )

    @model_validator(mode="after")
    def _has_residuals(self) -> BARMOptions:
        if self.background == "shared" and (self.w_tri or self.w_bga_bce):
            raise ValueError("background: shared has no residuals: set w_tri and w_bga_bce to 0")
        return self


class TimmFeaturesOptions(Options):
    """The last feature map of a timm network."""

    model: str = Field(description="timm name, such as `resnet101.tv_in1k`")
    pretrained: bool = Field(False, description="start from the published weights")
    checkpoint: str | None = Field(None, description="folder of a saved student, or a run folder")
    output_stride: Literal[8, 16, 32] = Field(16, description="pixels of the image for one cell of the map")
    bn_momentum: float = Field(0.01, ge=0, le=1, description="momentum of the statistics of the batch norms")

    def downloads(self) -> list[Download]:
        """The published weights, unless they are not asked for or already in the cache."""
        if not self.pretrained or self.checkpoint:
            return []
        from kd_timm.models import published_weights

        return published_weights(self.model)
