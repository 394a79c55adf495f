"""Options of the losses and of the method."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcore.options import Options, Sampling

DivergenceName = Literal["fkl", "rkl", "sym", "jsd", "tvd", "sfkl", "srkl"]
Algorithm = Literal[
    "sft", "seqkd", "fkl", "rkl", "sym", "jsd", "gkd", "tvd", "sfkl", "srkl", "minillm", "distillm", "hidden", "uld",
    "span-uld", "rm_rl", "dpo", "rrhf", "pro",
]  # fmt: skip
PREFERENCES = ("dpo", "rrhf", "pro")


class TemperatureOptions(Options):
    """A divergence between next-token distributions."""

    temperature: float = Field(1.0, gt=0, description="both logits are divided by it (there is no factor T²)")


class SymmetricOptions(TemperatureOptions):
    """(1 - lam) forward KL + lam reverse KL."""

    lam: float = Field(0.9, ge=0, lt=1, description="share of the reverse KL")


class JSDOptions(TemperatureOptions):
    """The generalised Jensen-Shannon divergence."""

    beta: float = Field(0.5, ge=0, le=1, description="0: forward KL; 1: reverse KL; between: share of the teacher")


class SkewOptions(TemperatureOptions):
    """A skewed KL: against a mixture of both distributions."""

    alpha: float = Field(0.1, ge=0, lt=1, description="share of its own distribution in what each is compared with")


class HiddenOptions(Options):
    """Hidden states of the student, projected, against those of the teacher."""

    student: list[str] = Field(["@all"], description="taps of the student, shallow to deep")
    teacher: list[str] = Field(["@all"], description="taps of the teacher; of more of them, evenly spread ones")
    kind: Literal["l2", "l1", "ce", "mmd"] = Field("l2", description="squared or absolute difference, CE, or MMD")


class AttentionOptions(Options):
    """Attention maps of the student against those of the teacher (models with `attn_implementation: eager`)."""

    kind: Literal["mse", "kl"] = Field("kl", description="mean squared difference, or KL of each position's row")


class ULDOptions(Options):
    """Sorted probabilities of two vocabularies."""

    top: int | None = Field(None, gt=0, description="only this many of the largest; default: all")


class WritingOptions(Options):
    """What methods have in common in which language models write."""

    max_new_tokens: int = Field(128, gt=0, description="tokens of a text that is written, at most")
    sampling_temperature: float = Field(1.0, ge=0, description="of texts that are written; 0 takes the likeliest token")
    sft_epochs: float = Field(0.0, ge=0, description="epochs on the data's texts before the algorithm begins")
    answers: int = Field(64, ge=0, description="validation prompts that are answered at the end and measured")

    @property
    def sampling(self) -> Sampling:
        """How texts are written in training."""
        return Sampling(max_tokens=self.max_new_tokens, temperature=self.sampling_temperature)


class SuiteOptions(WritingOptions):
    """A language model distilled: where its texts come from, and by which algorithm it learns of them."""

    algorithm: Algorithm = Field("gkd", description="what the student learns by")
    elicit: Literal["none", "labeling", "feedback", "self"] = Field(
        "none",
        description="texts to learn from: the data's; answers of the teacher (labeling); the student's own, ranked by "
        "the teacher (feedback), or the best of them (self)",
    )
    temperature: float = Field(1.0, gt=0, description="of the divergence: both logits are divided by it")
    beta: float = Field(0.5, ge=0, le=1, description="jsd, gkd: 0 is the forward KL, 1 the reverse KL")
    lam: float = Field(0.9, ge=0, lt=1, description="sym: share of the reverse KL")
    skew_alpha: float = Field(0.1, ge=0, lt=1, description="sfkl, srkl, distillm: how far the KL is skewed")
    lmbda: float | None = Field(
        None, ge=0, le=1, description="fraction of steps on texts of the student; default: 0.5 for gkd, else 0"
    )
    seq_kd: bool = Field(False, description="gkd: the other steps are on texts of the teacher, not on the data's")
    kd_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="share of the divergence in the sum with the language-model loss (minillm: of text)",
    )
    sft_weight: float = Field(0.0, ge=0, description="weight of the language-model loss on the data's texts, besides")
    policy: Literal["on", "replay"] = Field(
        "on", description="texts of the student: written anew at each such step, or half of them drawn from a buffer"
    )
    buffer_capacity: int = Field(1000, gt=0, description="texts that the buffer holds")
    loss_eps: float = Field(0.1, ge=0, description="distillm: growth of the validation loss that raises the fraction")
    gamma: float = Field(0.95, ge=0, le=1, description="minillm: discount of rewards to come")
    length_norm: bool = Field(True, description="minillm: returns are divided by the length that is left")
    mix_alpha: float = Field(0.2, ge=0, lt=1, description="minillm: share of the teacher in what texts are drawn from")
    cliprange: float = Field(0.2, gt=0, description="minillm: how far the ratio of probabilities may count")
    inner_epochs: int = Field(4, gt=0, description="minillm: steps on each batch of texts")
    reward_scaling: float = Field(0.5, gt=0, description="minillm: rewards are divided by it")
    reward_clip: float = Field(100.0, gt=0, description="minillm: largest reward")
    dpo_beta: float = Field(0.1, gt=0, description="dpo: strength of the preference")
    kl_beta: float = Field(0.1, ge=0, description="rm_rl: weight of the KL to where the student began")
    candidates: int = Field(4, gt=1, description="feedback, self: texts of the student for each prompt")
    hidden_weight: float = Field(1.0, ge=0, description="hidden: weight of the hidden states, beside the forward KL")
    top: int | None = Field(None, gt=0, description="uld, span-uld: largest probabilities that are compared")

    @field_validator("policy", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        """YAML reads `on` as true."""
        return "on" if value is True else value

    @property
    def fraction(self) -> float:
        """Of steps on texts of the student; none, where nothing holds them against the teacher's."""
        if self.algorithm in ("sft", "seqkd") or not self.kd_ratio:
            return 0.0
        return self.lmbda if self.lmbda is not None else 0.5 if self.algorithm == "gkd" else 0.0

    @model_validator(mode="after")
    def _fits(self) -> SuiteOptions:
        if self.algorithm in ("uld", "span-uld") and self.fraction:
            raise ValueError("lmbda: texts of the student are for algorithms with one tokenizer; leave it at 0")
        if self.elicit == "feedback" and self.algorithm not in (*PREFERENCES, "rm_rl"):
            raise ValueError(f"elicit: feedback gives ranked texts, which {self.algorithm} does not learn from; "
                             f"algorithms that do: {', '.join(PREFERENCES)}, rm_rl")  # fmt: skip
        if self.elicit in ("labeling", "self") and self.algorithm in (*PREFERENCES, "rm_rl"):
            raise ValueError(f"elicit: {self.algorithm} learns from ranked texts: set feedback, or none for the data's")
        return self
