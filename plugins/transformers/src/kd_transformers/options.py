"""Options of the components `transformers` and `transformers-text`, and what they would download."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from kdcore.options import Download, Options

HeadName = Literal[
    "auto", "sequence-classification", "token-classification", "masked-lm", "causal-lm", "seq2seq", "encoder",
    "image-classification", "semantic-segmentation",
]  # fmt: skip

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
HUB_SECONDS = 5.0
"""How long the Hub may take to tell a model's size."""


class CheckpointOptions(Options):
    """Where a model comes from, and how it is loaded."""

    model: str | None = Field(None, description="Hub id or local folder")
    checkpoint: str | None = Field(
        None, description="local folder saved by kd or by save_pretrained, or a run folder; wins over `model`"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the Hub")
    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="type of the weights; the half types are for teachers, and for a student under `lora`"
    )
    quantization: Literal["int8", "int4"] | None = Field(
        None, description="hold the weights in 8 bits, or in 4 (NF4), by bitsandbytes; a student needs `lora` then"
    )
    device_map: Literal["auto", "balanced", "sequential"] | dict[str, int | str] | None = Field(
        None,
        description="divide a teacher over the devices of one process: by what fits, or by names of modules",
    )
    offload_folder: str | None = Field(None, description="where weights lie that `device_map` leaves on the disk")
    attn_implementation: str | None = Field(
        None, description="attention kernel, such as eager, sdpa or flash_attention_2; default: the library's choice"
    )
    trust_remote_code: bool = Field(False, description="run model code that comes with the checkpoint")

    @property
    def wants_weights(self) -> bool:
        """Whether the weights of `model` are read, and not only its architecture."""
        return True

    @model_validator(mode="after")
    def _has_room(self) -> CheckpointOptions:
        if isinstance(self.device_map, dict) and "disk" in self.device_map.values() and self.offload_folder is None:
            raise ValueError("`device_map` leaves weights on the disk: name an `offload_folder` for them")
        return self

    def downloads(self) -> list[Download]:
        """The model's files on the Hub, unless they are local or in the Hub's cache."""
        if self.checkpoint is not None or self.model is None or Path(self.model).is_dir():
            return []
        if _cached(self.model, WEIGHTS if self.wants_weights else ("config.json",), self.revision):
            return []
        return [Download(self.model, "Hugging Face Hub", _hub_size(self.model, self.revision, self.wants_weights))]


class LoraOptions(Options):
    """Low-rank adapters beside frozen weights, by peft."""

    r: int = Field(16, gt=0, description="rank of an adapter")
    alpha: float = Field(64.0, gt=0, description="an adapter's output is scaled by alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout in front of an adapter")
    target_modules: tuple[str, ...] | Literal["all-linear"] | None = Field(
        None, description="names, or ends of names, of the layers that get one; default: peft's for the type of model"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(r) instead")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained too")
    modules_to_save: tuple[str, ...] = Field(
        (), description="modules trained whole, besides the classification head and what the checkpoint does not hold"
    )
    merge: bool = Field(
        True, description="save a plain model with the adapters added in; false: save the adapters alone"
    )


class TransformersOptions(CheckpointOptions):
    """A model of the transformers library: from the Hub, from a local folder, or from a config alone."""

    model: str | None = Field(None, description="Hub id or local folder; needed unless `config` names a `model_type`")
    head: HeadName = Field("auto", description="what the model predicts; auto: what the task asks for")
    pretrained: bool = Field(True, description="load the weights of `model`; false: its architecture, fresh weights")
    config: dict[str, Any] = Field(
        {}, description="entries of the model's config to change; with `model_type`, a whole model with fresh weights"
    )
    new_head: bool = Field(
        False, description="use the task's classes: a classification head of another size is replaced by a fresh one"
    )
    pooling: Literal["mean", "cls"] = Field(
        "mean", description="embedding of the head `encoder`: mean over the tokens, or the first token"
    )
    lora: LoraOptions | None = Field(None, description="train low-rank adapters instead of the weights")
    attentions: bool = Field(
        False, description="give the attention maps too, `[B, H, T, T]` of each layer; sets the kernel `eager`"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each block again in the backward pass: less memory, a third more time"
    )

    @property
    def wants_weights(self) -> bool:
        """Whether the weights of `model` are read, and not only its architecture."""
        return self.pretrained

    @field_validator("config")
    @classmethod
    def _is_a_whole_model(cls, config: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        named = info.data.get("model") or info.data.get("checkpoint")
        if config and not named and "model_type" not in config:
            raise ValueError("give `model` (Hub id or folder), `checkpoint` (folder), or a `model_type` in here, "
                             f"beside {', '.join(map(str, config))}")  # fmt: skip
        return config

    @model_validator(mode="after")
    def _names_a_model(self) -> TransformersOptions:
        if self.model is None and self.checkpoint is None and "model_type" not in self.config:
            raise ValueError("give `model` (Hub id or folder), `checkpoint` (folder), or `config` with a `model_type`")
        if self.model is not None and "model_type" in self.config:
            raise ValueError("`model` already says which type of model it is: leave `config.model_type` out")
        return self

    @model_validator(mode="after")
    def _has_a_base(self) -> TransformersOptions:
        fresh = self.checkpoint is None and (self.model is None or not self.pretrained)
        alone = self.lora is not None and not self.lora.merge
        if fresh and self.device_map:
            raise ValueError("`device_map` is for weights that are loaded: give `model` or `checkpoint`")
        if fresh and self.quantization:
            raise ValueError("`quantization` is for weights that are loaded: give `model` or `checkpoint`")
        if fresh and alone:
            raise ValueError("`lora.merge: false` saves no weights but the adapters', and fresh weights lie nowhere "
                             "else: give `model` or `checkpoint`, or set `lora.merge: true`")  # fmt: skip
        if self.quantization and self.lora is not None and self.lora.merge:
            raise ValueError("adapters cannot be added into quantised weights without loss: set `lora.merge: false`")
        return self


class TextOptions(CheckpointOptions):
    """A language model in this process that answers prompts."""

    mode: Literal["chat", "completion"] = Field(
        "completion", description="completion: a prompt that is plain text is gone on with; chat: the user said it"
    )
    batch_size: int = Field(8, gt=0, description="answers written at a time")
    retries: int = Field(4, ge=0, description="how often an answer that does not fit a JSON schema is drawn again")

    @model_validator(mode="after")
    def _names_a_model(self) -> TextOptions:
        if self.model is None and self.checkpoint is None:
            raise ValueError("give `model` (Hub id or folder) or `checkpoint` (folder)")
        return self


def _cached(model: str, names: tuple[str, ...], revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(model, name, revision=revision), str) for name in names)
    except HFValidationError:
        return False


def _hub_size(model: str, revision: str | None, weights: bool) -> int | None:
    """Bytes of the config, tokenizer and (if asked for) safetensors files at the top of a repository; `None` where
    the Hub does not answer in time."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=HUB_SECONDS)
    except Exception:  # no network, no such name, no right to see it: the run itself will say which
        return None
    ends = (".json", ".txt", ".model", *((".safetensors",) if weights else ()))
    files = [f for f in info.siblings or [] if f.rfilename.endswith(ends) and "/" not in f.rfilename]
    return sum(f.size or 0 for f in files)
