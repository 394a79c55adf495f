"""Options of the method."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kdcore.options import Options

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LADOptions(Options):
    """A teacher that sees noised labels beside the image, and its logits for a student that sees the image alone."""

    codes: Literal["random", "fixed"] | None = Field(
        None,
        description="values of the classes in the label channel: drawn for each image and step, or the same for all; "
        "default: random while the teacher is trained, fixed while it teaches",
    )
    code_std: Amount = Field(1.0, description="standard deviation of the codes (fixed ones lie within 1.1 of it)")
    noise_std_teacher: Amount = Field(
        0.03, description="standard deviation of the noise on each pixel of the channel while the teacher is trained"
    )
    noise_std_student: Amount = Field(0.02, description="the same while the teacher teaches the student")
    scale: Amount = Field(
        1.75, description="factor of the channel: 1.75 beside normalised images, 100 beside those in 0 to 255"
    )
    stem: str | None = Field(
        None, description="module name of the convolution that gets the further input plane; default: the first one "
        "with as many input channels as the images"
    )  # fmt: skip
    plane_std: Amount = Field(1e-4, description="standard deviation of the new plane's weights at the start")
    train_teacher: bool = Field(
        True, description="train the teacher with labels first; false: the recipe's teacher reads the channel already"
    )
    consistency_weight: Amount = Field(
        5.0, description="weight of the distance between the teacher's logits under two noisings of the same labels"
    )
    kd_weight: Amount = Field(
        3.0, description="weight of the distance to the teacher's logits; 0: the student alone, without a teacher"
    )
    distance: Literal["cwd", "kl", "dist"] = Field(
        "cwd", description="of logits: KL divergence over the positions of each channel, or over the classes of each "
        "pixel, or correlation"
    )  # fmt: skip
    temperature: float = Field(4.0, gt=0, description="softmax temperature of `cwd` and `kl`")
    aux_tap: str | None = Field(
        None, description="tap of the map that an auxiliary head reads while it is trained, such as `layer3`; default: "
        "the model's own auxiliary head, if it has one"
    )  # fmt: skip
    teacher_aux_tap: str | None = Field(None, description="the same of the teacher; default: what `aux_tap` names")
    aux_weight_teacher: Amount = Field(0.4, description="weight of the auxiliary cross-entropy of the teacher")
    aux_weight_student: Amount = Field(
        0.4, description="weight of the auxiliary cross-entropy of the student (0.02 where its training is continued)"
    )
    student_input: Literal["rgb", "zero_channel"] = Field(
        "rgb", description="the student reads the image, or in training also a channel of zeros in the labels' place"
    )
    align_corners: bool = Field(
        True, description="of the resizing of logits to the size of the labels, in cross-entropies and evaluation"
    )
