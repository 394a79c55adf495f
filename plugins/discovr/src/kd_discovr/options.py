"""Options of the method, the encoders and the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kdcore.options import Download, Options

ProbeName = Literal["knn", "linear"]


class DISCOVROptions(Options):
    """Self-distillation of a video branch and an image branch, and clusters of image tokens for video tokens."""

    video_weight: float = Field(1.0, ge=0, description="weight of the video branch's own loss")
    image_weight: float = Field(1.0, ge=0, description="weight of the image branch's own loss")
    scd_weight: float = Field(1.0, ge=0, description="weight of semantic cluster distillation, image to video")
    local_views: int = Field(4, ge=1, description="masked views of each clip, and of each frame, for the class tokens")
    mask_ratio: float = Field(0.9, ge=0, lt=1, description="share masked of the clip that the decoder completes")
    local_mask_ratio: float = Field(0.9, ge=0, lt=1, description="share masked of each local view of a clip")
    image_mask_ratio: float = Field(0.9, ge=0, lt=1, description="share masked of each view of a frame")
    prototypes: int = Field(3000, ge=2, description="clusters; no more than a batch of clips has tokens")
    sinkhorn_eps: float = Field(0.05, ge=0.02, description="entropy of the assignments; smaller is harder")
    sinkhorn_iterations: int = Field(10, ge=1, description="rounds of balancing the assignments")
    scd_temperature: float = Field(0.1, gt=0, description="temperature of the scores in the cluster cross-entropies")
    soft_targets: bool = Field(False, description="whole assignments as targets instead of their largest entry")
    prototype_grad_from_image: bool = Field(False, description="let the image tokens' scores train the prototypes")
    token_alignment: Literal["aligned", "code"] = Field(
        "aligned", description="pair tokens of the same place, or those that the official code pairs"
    )
    head_outputs: int = Field(16384, ge=2, description="output dimensions of the projection heads")
    head_hidden: int = Field(2048, ge=1, description="width of the heads' hidden layers")
    head_bottleneck: int = Field(256, ge=1, description="width before the heads' last layer")
    decoder_width: int | None = Field(None, ge=1, description="width of the decoder; default: half the encoder's")
    decoder_layers: int = Field(4, ge=1, description="blocks of the decoder")
    decoder_heads: int | None = Field(None, ge=1, description="its attention heads; default: half the encoder's")
    teacher_temperature_start: float = Field(0.04, gt=0, description="temperature of the teachers in the first epoch")
    teacher_temperature: float = Field(0.07, gt=0, description="temperature of the teachers after the warm-up")
    teacher_temperature_epochs: int = Field(30, ge=1, description="epochs of that warm-up")
    student_temperature: float = Field(0.1, gt=0, description="temperature of the students")
    ema_momentum: float = Field(0.996, ge=0, le=1, description="what a teacher keeps of itself in each step")
    center_momentum: float = Field(0.9, ge=0, le=1, description="what a centre keeps of itself in each step")
    center_on: Literal["logits", "probs"] = Field(
        "logits", description="the centre follows the teacher's logits, or its probabilities, as in the official code"
    )
    image_loss_scale: Literal["none", "code"] = Field(
        "none", description="`code`: the image loss times 256 over the frames of a batch, which count up to 1024"
    )
    keep: Literal["teacher", "student"] = Field("teacher", description="which video encoder the run saves as student")
    probes: tuple[ProbeName, ...] = Field((), description="how the labels of a split are predicted at the end")
    probe_reference: str = Field("train", description="split with the labels that the probes know")
    probe_query: str = Field("val", description="split with the labels that the probes predict")
    probe_neighbours: int = Field(20, ge=1, description="neighbours that vote")
    probe_temperature: float = Field(0.07, gt=0, description="temperature of their votes")

    @model_validator(mode="after")
    def _trains_something(self) -> DISCOVROptions:
        if not self.video_weight and not self.scd_weight:
            raise ValueError("video_weight and scd_weight are both 0: nothing would train the video encoder")
        return self


class EncoderOptions(Options):
    """What both video encoders have in common."""

    checkpoint: str | None = Field(None, description="folder of a saved encoder or of a run; it decides the geometry")


class VideoViTOptions(EncoderOptions):
    """A vision transformer over tubelets of a clip; the default is ViT-B."""

    channels: int = Field(3, ge=1, description="channels of the frames")
    width: int = Field(768, ge=1, description="size of the hidden states")
    layers: int = Field(12, ge=1, description="transformer blocks")
    heads: int = Field(12, ge=1, description="attention heads; they divide the width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of a block's perceptron over `width`")
    qkv_bias: bool = Field(True, description="biases of queries, keys and values")
    patch: int = Field(16, ge=1, description="side of a patch in pixels; it divides the frames' height and width")
    tubelet: int = Field(2, ge=1, description="frames that a patch spans; it divides the clips' length")
    mean: tuple[float, ...] = Field((0.485, 0.456, 0.406), description="of each channel, for frames in [0, 1]")
    std: tuple[float, ...] = Field((0.229, 0.224, 0.225), description="of each channel")

    @model_validator(mode="after")
    def _fits_together(self) -> VideoViTOptions:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} cannot be divided into {self.heads} heads")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.channels:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


class VideoMAEOptions(EncoderOptions):
    """A `VideoMAEModel` of the transformers library with a class token in front."""

    model: str = Field("MCG-NJU/videomae-base", description="Hub id or local folder")
    pretrained: bool = Field(True, description="start from the weights of `model`; false: its geometry alone")
    frames: int | None = Field(None, ge=1, description="length of the clips; default: as the model has it")
    size: int | None = Field(None, ge=1, description="height and width of the frames; default: as the model has it")

    def downloads(self) -> list[Download]:
        """The model's files on the Hub, unless they are local or in the Hub's cache."""
        if self.checkpoint is not None or Path(self.model).is_dir():
            return []
        from huggingface_hub import try_to_load_from_cache

        name = "model.safetensors" if self.pretrained else "config.json"
        if isinstance(try_to_load_from_cache(self.model, name), str):
            return []
        return [Download(self.model, "Hugging Face Hub")]


class ClipsOptions(Options):
    """Video files in a folder, or listed in CSV files."""

    path: str = Field(description="folder that holds, for each split, a `<split>.csv` or a folder `<split>`")
    splits: tuple[str, ...] = Field((), description="splits to use; default: those of train, val, test that are there")
    frames: int = Field(64, ge=1, description="frames of a clip; shorter videos are repeated")
    stride: int = Field(3, ge=1, description="every which frame of a video is taken")
    size: int = Field(112, ge=1, description="height and width of the frames in pixels")
    scales: tuple[float, ...] = Field(
        (1.0, 0.875, 0.75, 0.66), description="sides of training crops over the shorter side of the video; () for none"
    )

    @model_validator(mode="after")
    def _scales_are_shares(self) -> ClipsOptions:
        if any(not 0 < scale <= 1 for scale in self.scales):
            raise ValueError("scales must lie in (0, 1]")
        return self


def geometry(options: VideoViTOptions) -> dict[str, Any]:
    """The arguments of the encoder."""
    return options.model_dump(exclude={"checkpoint"})
