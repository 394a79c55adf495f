"""Options of the method, and of the loss between regions."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from kdcore.options import Options

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Role = Literal["deep", "wide"]


def _number(value: Any) -> Any:
    """`1/8` as a number; what is no fraction is left for the field to refuse."""
    try:
        return float(Fraction(value)) if isinstance(value, str) else value
    except (ValueError, ZeroDivisionError):
        return value


Share = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)]


class RegionOptions(Options):
    """Which maps are compared by the similarities of their regions."""

    region_grid: int = Field(7, ge=2, description="regions in height and in width of a map")
    feature_layer: str | None = Field(
        None, description="tap of the map [B, D, h, w] that is compared, such as `decoder`; default: what goes into "
        "the last 1x1 convolution, of as many channels in student and teacher"
    )  # fmt: skip
    teacher_feature_layer: str | None = Field(
        None, description="the same of the teacher, where its map has another name than the student's"
    )


class CutMixOptions(Options):
    """The boxes that are pasted from one unlabelled image into another."""

    n_boxes: int = Field(3, ge=1, description="boxes of a mask; where two overlap they cancel")
    prop: tuple[float, float] = Field(
        (0.25, 0.5), description="least and largest area of the boxes, as part of the image"
    )

    @model_validator(mode="after")
    def _is_a_range(self) -> CutMixOptions:
        if not 0 < self.prop[0] <= self.prop[1] <= 1:
            raise ValueError(f"prop: {list(self.prop)} is no range of areas: 0 < least <= largest <= 1")
        return self


class MGDSSSOptions(RegionOptions):
    """Labelled and unlabelled images, the two teachers, and the terms."""

    labelled_fraction: Share | None = Field(
        None, description="part of train that is labelled, drawn with the run's seed, such as 1/16; default: 1/8"
    )
    labelled_list: str | None = Field(
        None, description="file with the positions in train of the labelled images, one a line, counted from 0"
    )
    unlabelled_list: str | None = Field(
        None, description="the same of the unlabelled ones; default: all that labelled_list does not name"
    )
    unlabelled_split: str | None = Field(
        None, description="split of the unlabelled images, such as `unlabelled`; all of train is labelled then"
    )
    cutmix: CutMixOptions = Field(CutMixOptions(), description="the boxes that mix two unlabelled images")
    stage1: Literal["auto", "always", "never"] = Field(
        "auto", description="train the teachers by cross pseudo supervision: auto leaves out those that come with a "
        "`checkpoint`, with `train:`, or as a module"
    )  # fmt: skip
    cps_weight: Weight = Field(1.0, description="stage 1: weight of the cross-entropy with the other branch's classes")
    lambda_image: Weight = Field(0.002, description="weight of the image-level term")
    lambda_region: Weight = Field(100.0, description="weight of the region-level term")
    pixel_weight: Weight = Field(1.0, description="weight of each teacher's classes on unlabelled images")
    labelled_pixel_weight: Weight = Field(1.0, description="weight of each teacher's classes on labelled images")
    image_from: Role = Field("deep", description="teacher of the image-level term")
    region_from: Role = Field("wide", description="teacher of the region-level term")
    image_loss_reduction: Literal["sum", "batchmean"] = Field(
        "sum", description="image-level term: sum over the images of a step, as lambda_image is meant, or their mean"
    )
    ohem: bool = Field(False, description="supervised terms by the hardest pixels alone (the paper's for Cityscapes)")
    ohem_threshold: float = Field(
        0.7, gt=0, le=1, description="of ohem: pixels count whose label has at most this probability"
    )
    ohem_min_kept: int = Field(
        50_000, ge=0, description="of ohem: and at least so many of a batch, for each image in it"
    )
    teacher_train_mode: bool = Field(
        False, description="teachers normalise by the statistics of the batch, as in the official code"
    )

    @model_validator(mode="after")
    def _one_way_to_divide(self) -> MGDSSSOptions:
        ways = ("labelled_fraction", "labelled_list", "unlabelled_split")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say which images are labelled: give one of them")
        if self.unlabelled_list is not None and self.labelled_list is None:
            raise ValueError("unlabelled_list needs labelled_list beside it")
        return self

    @property
    def distils(self) -> bool:
        """Whether the teachers have any say."""
        return any((self.lambda_image, self.lambda_region, self.pixel_weight, self.labelled_pixel_weight))
