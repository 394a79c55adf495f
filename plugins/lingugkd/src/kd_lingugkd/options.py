"""Options of the loss and the method."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from kdcore.options import Download, Options

TEMPLATE = """### Instruction: Classify the node into one of: {{ classes | join(', ') }}.
### Input: {{ text }}
{%- for near in neighbours %}
{{ near.hop }}-hop neighbour: {{ near.text }}{% if near.label %} ({{ near.label }}){% endif %}
{%- endfor %}
### Response:"""

LINK_TEMPLATE = """### Instruction: Are the two nodes linked? Answer yes or no.
### Input: {{ text }}
Other node: {{ other }}
### Response:"""


class LossOptions(Options):
    """Cross-entropy, and for each hop the contrast of the student's state with the teacher's projected one."""

    tau: float = Field(0.07, gt=0, description="temperature of the contrast")
    symmetric: bool = Field(False, description="the teacher's states are contrasted with the student's, too")
    layer_weighting: Literal["learned", "uniform"] = Field(
        "learned", description="weights of the hops: a softmax of trained numbers, or all alike"
    )
    task_weighting: Literal["learned", "fixed"] = Field(
        "learned", description="weights of cross-entropy and contrast: a softmax of two trained numbers, or half each"
    )
    filter_layer: int = Field(1, ge=0, description="hidden layers of each hop's projector")
    projector_layer: int = Field(1, ge=0, description="linear layers of the transform that all hops share")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout in the projectors")
    nce_nodes: int | None = Field(
        None, gt=1, description="nodes of a batch that are contrasted, drawn in each step; default: all"
    )


class LoraOptions(Options):
    """Low-rank adapters of the language model."""

    rank: int = Field(64, gt=0, description="rank of the adapters")
    alpha: float = Field(32.0, gt=0, description="the adapters are scaled by alpha / rank")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before the adapters")
    targets: list[str] | Literal["all-linear"] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"], description="linear layers that get one, by name"
    )
    saved: list[str] = Field([], description="modules trained in full beside the adapters, such as embed_tokens")


class LinguGKDOptions(LossOptions):
    """A language model is tuned on prompts about nodes; a graph network learns from its states."""

    hops: int = Field(2, ge=0, description="hops that prompts tell of and states are aligned for (0 to this one)")
    distillation: bool = Field(True, description="false: the student alone on cross-entropy, without any teacher")
    tuning: Literal["lora", "full", "none"] = Field(
        "lora", description="what of the teacher is tuned: low-rank adapters, everything, or nothing"
    )
    lora: LoraOptions = Field(LoraOptions(), description="the adapters")
    quantize: Literal["none", "nf4"] = Field(
        "none", description="hold the teacher's linear layers in 4 bits (NF4; needs bitsandbytes), for tuning by LoRA"
    )
    neftune: float = Field(5.0, ge=0, description="noise on the token embeddings in tuning (NEFTune's alpha); 0: none")
    tokenizer: str | None = Field(
        None, description="tokenizer: folder or Hub id; default: the teacher's, or words of the texts for a fresh model"
    )
    template: str = Field(
        TEMPLATE, description="Jinja2 template of a prompt, with `text`, `neighbours`, `classes`, `hop` and `node`"
    )
    link_template: str = Field(
        LINK_TEMPLATE, description="Jinja2 template of a prompt about an edge, with `text`, `other` and both nodes"
    )
    link_prompts: float = Field(
        0.1, ge=0, lt=1, description="share of the tuning prompts that ask whether two nodes are linked"
    )
    prompts: int = Field(1, ge=1, description="prompts per node and hop, which differ in the neighbours drawn for them")
    neighbours: int = Field(5, ge=1, description="neighbours of each hop that a prompt tells of, drawn at random")
    neighbour_labels: bool = Field(True, description="prompts give the labels of neighbours that are training nodes")
    max_length: int = Field(520, gt=8, description="tokens of a prompt with its answer; neighbours beyond are left out")
    feature_mode: Literal["full", "correct"] = Field(
        "full", description="average the states of all prompts, or of those that the teacher answers rightly"
    )
    feature_batch: int = Field(8, gt=0, description="prompts per batch when features are computed")
    shard_size: int = Field(256, gt=0, description="prompts per file of features: what is lost if the run is killed")
    measure_teacher: bool = Field(
        False, description="the teacher also answers for the nodes of `eval.on`; adds its accuracy to the result"
    )
    features: str | None = Field(
        None, description="run folder whose features are used; the teacher is then neither needed nor tuned"
    )
    selection: Literal["best", "last"] = Field(
        "best", description="the student with the best first metric on val during training, or the last one"
    )

    @model_validator(mode="after")
    def _only_adapters_beside_four_bits(self) -> Self:
        if self.quantize == "nf4" and self.tuning != "lora":
            raise ValueError(f"quantize=nf4 is for tuning=lora: weights in 4 bits are not trained, but tuning is "
                             f"{self.tuning}")  # fmt: skip
        return self

    @property
    def asks_for_answers(self) -> bool:
        """Whether the teacher's answers are read, besides its states."""
        return self.measure_teacher or self.feature_mode == "correct"

    def downloads(self) -> list[Download]:
        """The tokenizer, where it is named and on the Hub."""
        named = self.tokenizer is not None and not Path(self.tokenizer).expanduser().exists()
        return [Download(str(self.tokenizer), "Hugging Face Hub")] if named else []
