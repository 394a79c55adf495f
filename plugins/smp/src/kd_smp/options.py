"""Options of the segmentation networks."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from kdcore.options import Download, Options

Architecture = Literal[
    "deeplabv3plus", "deeplabv3", "pspnet", "fpn", "upernet", "segformer", "pan", "linknet", "manet", "unet",
    "unetplusplus",
]  # fmt: skip


class SMPOptions(Options):
    """A segmentation network as student: untrained unless it is told where its weights come from."""

    arch: Architecture = Field("deeplabv3plus", description="what reads the backbone's maps")
    encoder: str = Field(
        "resnet18", description="backbone: a name of segmentation_models_pytorch (`resnet18`, `mit_b0`) or of timm"
    )
    pretrained: bool = Field(False, description="start from the backbone's published ImageNet weights")
    checkpoint: str | None = Field(
        None, description="local weights of the whole network instead: a saved student, a run folder"
    )
    settings: dict[str, Any] = Field(
        {}, description="further arguments of the network in the library, such as `decoder_channels: 128`"
    )

    def downloads(self) -> list[Download]:
        """The backbone's weights, unless they are not asked for or already in the cache."""
        if not self.pretrained or self.checkpoint:
            return []
        from kd_smp.models import published_weights

        return published_weights(self.encoder)


class SMPTeacherOptions(SMPOptions):
    """A segmentation network as teacher. Its decoder has no published weights: give a `checkpoint:`, or `train:`."""

    pretrained: bool = Field(True, description="start from the backbone's published ImageNet weights")
