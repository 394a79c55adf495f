"""Options of the timm models."""

from __future__ import annotations

from pydantic import Field

from kdcore.options import Download, Options


class TimmOptions(Options):
    """A timm model as student: untrained unless it is told where its weights come from."""

    model: str = Field(description="timm name (`resnet18.a1_in1k`), `hf-hub:owner/name`, or `local-dir:folder`")
    pretrained: bool = Field(False, description="start from the published weights of `model`")
    checkpoint: str | None = Field(
        None, description="local weights instead: a saved student, a run folder, or a .safetensors or .pth file"
    )
    image_size: int | None = Field(
        None, gt=0, description="side in pixels to which the model resizes its input; default: as the data gives it"
    )
    drop_rate: float | None = Field(None, ge=0, lt=1, description="dropout before the classifier; default: the model's")
    drop_path_rate: float | None = Field(None, ge=0, lt=1, description="stochastic depth; default: the model's")

    def downloads(self) -> list[Download]:
        """The published weights, unless they are not asked for or already in the cache."""
        if not self.pretrained or self.checkpoint:
            return []
        from kd_timm.models import published_weights

        return published_weights(self.model)


class TimmTeacherOptions(TimmOptions):
    """A timm model as teacher: with its published weights, unless a checkpoint is given."""

    pretrained: bool = Field(True, description="take the published weights of `model`; a `checkpoint` comes first")
    new_head: bool = Field(False, description="allow an untrained classifier where the published one has other classes")
