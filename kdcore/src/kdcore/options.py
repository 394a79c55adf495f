"""The base of every component's options, and what they may say about downloads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


@dataclass(frozen=True)
class Download:
    """Something a recipe would fetch from the network.

    Args:
        name: what, such as `microsoft/resnet-50`.
        source: where from, such as `Hugging Face Hub`.
        size: bytes, or `None` if it cannot be told without the network.
    """

    name: str
    source: str
    size: int | None = None


class Options(BaseModel):
    """Options of a component: every field has a type, a description and, unless it is required, a default.

    Unknown keys are errors. A module of options imports neither torch nor anything heavy.

    Attributes:
        passing: fields that do not change a run's result, such as a budget: a run goes on when they have changed.
    """

    passing: ClassVar[frozenset[str]] = frozenset()

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    def downloads(self) -> list[Download]:
        """What building the component would fetch, without fetching it. Called by `kd run --dry-run`."""
        return []


class CacheOptions(Options):
    """What a teacher cache holds, and how."""

    logits: Literal["all", "top-k", "sampled", "hidden", "none"] = Field(
        "all",
        description="all of them; the k largest with the mass of the rest; k draws, an unbiased estimate for forward "
        "KL; what goes into the last layer, with that layer once; none",
    )
    k: int | None = Field(None, gt=0, description="of top-k (default 32) or sampled (default 12)")
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = Field("float16", description="of what is held")
    embedding: bool = Field(False, description="hold the embedding, too")
    taps: list[str] = Field([], description="modules whose activations are held, too, as a loss taps them")
    splits: list[str] = Field(["train"], min_length=1, description="splits that are held")
    views: int = Field(
        0, ge=0, description="augmented views of each sample that are held, and seen again epoch after epoch"
    )
    folder: str | None = Field(None, description="where caches lie; default: the user's folder for caches")
    filled: str | None = Field(
        None, description="a filled cache, taken as it is: the teacher is not loaded, unless for more than it holds"
    )

    @model_validator(mode="after")
    def _fits(self) -> CacheOptions:
        if self.k is not None and self.logits not in ("top-k", "sampled"):
            raise ValueError(f"k: it belongs to `logits: top-k` and `logits: sampled`, not {self.logits!r}")
        if self.logits == "none" and not (self.embedding or self.taps):
            raise ValueError("logits: with none of them, and neither `embedding` nor `taps`, nothing would be held")
        return self

    @property
    def kept(self) -> int:
        """`k`, or its default."""
        return self.k or {"top-k": 32, "sampled": 12}[self.logits]


class Sampling(Options):
    """How a text teacher draws its answers."""

    max_tokens: int = Field(128, gt=0, description="tokens of an answer, at most")
    temperature: float = Field(1.0, ge=0, description="temperature; 0 takes the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus: the likeliest tokens with this probability together")
    n: int = Field(1, gt=0, description="answers to each prompt")
    stop: tuple[str, ...] = Field((), description="texts at which an answer ends; they are not part of it")
    presence_penalty: float = Field(0.0, description="taken from the logit of a token that is there already")
    frequency_penalty: float = Field(0.0, description="the same for each time that it is there")
    logprobs: bool = Field(False, description="ask for the log-probability of each answer")
    json_schema: dict[str, Any] | None = Field(None, description="JSON Schema that every answer has to fit")

    @field_validator("json_schema")
    @classmethod
    def _is_one(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None:
            from jsonschema.exceptions import SchemaError
            from jsonschema.validators import validator_for

            try:
                validator_for(schema).check_schema(schema)
            except SchemaError as error:
                raise ValueError(f"not a valid JSON Schema: {error.json_path}: {error.message}") from None
        return schema
