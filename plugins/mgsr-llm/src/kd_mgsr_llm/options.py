"""Options of the losses and of the method."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from kd_llm_kd_suite.options import WritingOptions
from kdcore.options import Options

ChunkerName = Literal["rules", "nltk", "spacy"]
Metric = Literal["l2", "squared", "cosine"]


class DACOptions(Options):
    """Forward KL from the teacher's distribution clipped between two levels, which a small network sets."""

    topk: int | None = Field(
        64, gt=0, description="probabilities of each side that the network sees, the teacher's largest; null: all"
    )
    hidden: int = Field(128, gt=0, description="width of the network's hidden layer")
    tau: float = Field(0.02, gt=0, description="softness of the levels in the gradient, as a share of the vocabulary")
    keep_target: bool = Field(
        True, description="never clip the teacher's likeliest token, nor, on texts of the data, the text's own"
    )
    upper_start: float | None = Field(
        None,
        description="logit of the upper level at the start; default: 4, or log V where that is more, "
        "so that the level is above all tokens but the likeliest",
    )


class SpanOptions(Options):
    """Products of neighbouring next-token distributions of student and teacher, inside phrases of the text."""

    metric: Metric = Field("l2", description="distance of the products: L2 norm, its square, or 1 - cosine")
    chunker: ChunkerName = Field("rules", description="finds the phrases: rules for English, or a tagger of a library")


class MGSROptions(WritingOptions):
    """A language model distilled on texts that are revised by sequence, by token and by span."""

    scrg: bool = Field(True, description="correct the student's texts: the teacher replaces the worst token")
    scrg_rounds: int = Field(1, gt=0, description="corrections of each text, at most")
    policy: Literal["off", "on", "mixed"] = Field(
        "off",
        description="texts of the student: drawn from a buffer that is filled less and less (off), written anew at "
        "each such step (on), or either with equal chance (mixed)",
    )
    student_data_fraction: float = Field(0.5, ge=0, le=1, description="fraction of steps on texts of the student")
    buffer_capacity: int = Field(1000, gt=0, description="texts that the buffer holds")
    dac: bool = Field(True, description="clip the teacher's distribution (DAC-KL); false: the plain forward KL")
    dac_topk: int | None = Field(
        64, gt=0, description="probabilities of each side that the clipping network sees; null: all"
    )
    dac_hidden: int = Field(128, gt=0, description="width of its hidden layer")
    dac_tau: float = Field(0.02, gt=0, description="softness of the levels, as a share of the vocabulary")
    dac_keep_target: bool = Field(
        True, description="never clip the teacher's likeliest token, nor, on texts of the data, the text's own"
    )
    dac_upper_start: float | None = Field(
        None, description="logit of the upper level at the start; default: 4, or log V where that is more"
    )
    dac_lr_mult: float = Field(0.1, gt=0, description="learning rate of the clipping network, times the student's")
    span: bool = Field(True, description="let products of neighbouring distributions inside phrases agree")
    span_metric: Metric = Field("l2", description="distance of the products: L2 norm, its square, or 1 - cosine")
    span_weight: float = Field(1.0, ge=0, description="weight of the span term")
    sft_weight: float = Field(1.0, ge=0, description="weight of the language-model loss, on the data's texts only")
    dac_weight: float = Field(1.0, ge=0, description="weight of the divergence, clipped or plain")
    chunker: ChunkerName = Field("rules", description="finds the phrases: rules for English, or a tagger of a library")

    @field_validator("policy", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """YAML reads `on` and `off` as true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value

    @property
    def clipping(self) -> DACOptions:
        """Options of the clipped divergence."""
        return DACOptions(topk=self.dac_topk, hidden=self.dac_hidden, tau=self.dac_tau,
                          keep_target=self.dac_keep_target, upper_start=self.dac_upper_start)  # fmt: skip
