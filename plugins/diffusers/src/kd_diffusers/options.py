"""Options of the denoisers, the generated data and the method `denoise`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from kdcore.options import Download, Options

HUB_SECONDS = 5.0
"""How long the Hub may take to tell a size."""
DENOISERS = ("transformer", "unet")
"""What pipelines call their denoiser."""


class DiffusersOptions(Options):
    """A denoiser of diffusers, and the frozen rest of its pipeline: VAE, text encoders, scheduler."""

    model: str | None = Field(None, description="Hub id or folder of a pipeline, or of a denoiser alone")
    checkpoint: str | None = Field(
        None, description="folder of a denoiser saved by kd or by save_pretrained, or a run folder; wins over `model`"
    )
    architecture: str | None = Field(
        None, description="class of diffusers for fresh weights, such as SD3Transformer2DModel, built from `config`"
    )
    config: dict[str, Any] = Field({}, description="arguments of the architecture")
    pretrained: bool = Field(True, description="load the weights of `model`; false: its architecture, fresh weights")
    subfolder: str | None = Field(
        None, description="where the denoiser lies in `model`; default: transformer or unet, whichever the pipeline has"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    variant: str | None = Field(None, description="variant of the weight files, such as fp16")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="type of the weights of denoiser, VAE and text encoders; the half types are for teachers"
    )
    pipeline: str | None = Field(
        None, description="Hub id or folder the VAE, text encoders and scheduler come from; default: `model`"
    )
    scheduler: str | None = Field(
        None,
        description="class of diffusers; default: the pipeline's, without one FlowMatchEulerDiscreteScheduler",
    )
    scheduler_config: dict[str, Any] = Field({}, description="entries of the scheduler's config to change")
    timestep_mean: float = Field(0.0, description="flow matching: mean of the normal behind the logit-normal timesteps")
    timestep_std: float = Field(1.0, gt=0, description="flow matching: its deviation")
    max_sequence_length: int = Field(256, gt=0, description="tokens of a caption, at most (T5-like encoders)")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")

    @model_validator(mode="after")
    def _names_a_model(self) -> DiffusersOptions:
        if self.model is None and self.checkpoint is None and self.architecture is None:
            raise ValueError("give `model` (Hub id or folder), `checkpoint` (folder), or `architecture` with `config`")
        if self.model is not None and self.architecture is not None:
            raise ValueError("`model` already says which architecture it is: leave `architecture` out")
        return self

    @property
    def rest(self) -> str | None:
        """Where the rest of the pipeline comes from."""
        return self.pipeline or self.model

    def downloads(self) -> list[Download]:
        """The files of the denoiser and of the rest of its pipeline, unless they are local or in the Hub's cache."""
        wanted = {self.rest: True}
        if self.checkpoint is None:
            wanted[self.model] = wanted.get(self.model, False)
        return [
            Download(name, "Hugging Face Hub", _hub_size(name, self.revision, self.variant, whole))
            for name, whole in wanted.items()
            if name is not None and not Path(name).expanduser().exists() and not _cached(name, self.revision)
        ]


class ShapesOptions(Options):
    """8x8 pictures of coloured shapes, a caption each, and the caption's embedding by a fixed random table."""

    train: int = Field(512, gt=0, description="training samples")
    val: int = Field(96, gt=0, description="validation samples")
    embedding: int = Field(16, gt=0, description="width of the words' embeddings")
    noise: float = Field(0.02, ge=0, description="deviation of the noise in the pictures")
    seed: int = Field(0, ge=0, description="of the samples and the embeddings")


class MixtureOptions(Options):
    """Points of a mixture of Gaussians around the corners of a polygon, as latents, with the component as label."""

    train: int = Field(512, gt=0, description="training samples")
    val: int = Field(128, gt=0, description="validation samples")
    components: int = Field(4, ge=2, description="components of the mixture")
    spread: float = Field(0.15, gt=0, description="deviation of each component; the polygon's radius is 1")
    seed: int = Field(0, ge=0, description="of the samples")


class DenoiseOptions(Options):
    """The denoiser's own loss, and the distance to a teacher's predictions."""

    task_weight: float = Field(1.0, ge=0, description="weight of the own loss: prediction against noise or velocity")
    output_weight: float = Field(1.0, ge=0, description="weight of the distance to the teacher, where there is one")
    samples: int = Field(
        8, ge=0, description="validation captions that a picture grid is drawn for at the end; 0: none"
    )
    sampling_steps: int = Field(28, gt=0, description="steps of the sampler")
    guidance: float = Field(1.0, ge=0, description="classifier-free guidance of the sampler; up to 1: none")


def _cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        files = [f"{part}/config.json" for part in DENOISERS] + ["config.json"]
        return any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)
    except HFValidationError:
        return False


def _hub_size(name: str, revision: str | None, variant: str | None, whole: bool) -> int | None:
    """Bytes of the safetensors files and configs of a pipeline, or of its denoiser alone; `None` where the Hub does
    not answer in time."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
    except Exception:  # no network, no such name, no right to see it: the run itself will say which
        return None
    files = {f.rfilename: f.size or 0 for f in info.siblings or []}
    parts = {file: size for file, size in files.items() if "/" in file} or files
    if not whole:
        parts = {file: size for file, size in parts.items() if file.partition("/")[0] in DENOISERS} or files
    return sum(size for file, size in parts.items() if _is_read(file, variant))


def _is_read(file: str, variant: str | None) -> bool:
    if not file.endswith(".safetensors"):
        return file.endswith((".json", ".txt", ".model"))
    return f".{variant}." in file if variant else not any(f".{v}." in file for v in ("fp16", "bf16"))
