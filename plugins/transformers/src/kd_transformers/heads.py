"""What a transformers model can predict, and which of it a task asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from kdcore.data import Task
from kdcore.errors import ModelError


@dataclass(frozen=True)
class Head:
    """One kind of prediction.

    Args:
        name: as in the options.
        auto: the class of transformers that makes such models.
        mapping: the table of transformers that tells for which configs there is one.
        classes: whether the logits are scores of the task's classes.
        tokens: whether the logits are scores of the vocabulary.
        pooled: whether there is one row of logits per sample, so that the last linear layer's input is an embedding.
    """

    name: str
    auto: str
    mapping: str
    classes: bool = False
    tokens: bool = False
    pooled: bool = False

    def classes_for(self, config: Any) -> tuple[str, ...]:
        """The names of the model classes for a config, the usual one first; empty if there is none."""
        remote = getattr(config, "auto_map", None) or {}
        if self.auto in remote:
            return (str(remote[self.auto]).rpartition(".")[2],)
        found = getattr(transformers, self.mapping).get(type(config), ())
        return tuple(made.__name__ for made in (found if isinstance(found, tuple) else (found,)))

    def made(self, config: Any) -> bool:
        """Whether the checkpoint of this config was saved with this head."""
        return any(name in (config.architectures or ()) for name in self.classes_for(config))


ENCODER = Head("encoder", "AutoModel", "MODEL_MAPPING")
ENCODER_HALF = Head("encoder", "AutoModelForTextEncoding", "MODEL_FOR_TEXT_ENCODING_MAPPING")
"""The encoder of an encoder-decoder model."""

HEADS = {head.name: head for head in (
    Head("sequence-classification", "AutoModelForSequenceClassification",
         "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", classes=True, pooled=True),
    Head("token-classification", "AutoModelForTokenClassification",
         "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING", classes=True),
    Head("masked-lm", "AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING", tokens=True),
    Head("causal-lm", "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING", tokens=True),
    Head("seq2seq", "AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING", tokens=True),
    Head("image-classification", "AutoModelForImageClassification",
         "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", classes=True, pooled=True),
    Head("semantic-segmentation", "AutoModelForSemanticSegmentation",
         "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING", classes=True),
    ENCODER,
)}  # fmt: skip

BY_TASK = {
    "segmentation": "semantic-segmentation",
    "token-classification": "token-classification",
    "causal-lm": "causal-lm",
    "masked-lm": "masked-lm",
    "seq2seq": "seq2seq",
}


def choose_head(name: str, task: Task, config: Any) -> Head:
    """The head asked for, or (`auto`) the one that the task asks for.

    A task without targets gets the head that the checkpoint was saved with, or else the bare encoder.

    Raises:
        ModelError: if transformers has no such head for this type of model; those that it has are listed.
    """
    fitting = [head.name for head in HEADS.values() if _variant(head, config).classes_for(config)]
    chosen = _automatic(task, config, fitting) if name == "auto" else name
    if chosen not in fitting:
        raise ModelError(f"transformers has no model of type {config.model_type!r} with the head {chosen!r}; "
                         f"heads that fit it: {', '.join(fitting) or 'none'}")  # fmt: skip
    return _variant(HEADS[chosen], config)


def _automatic(task: Task, config: Any, fitting: list[str]) -> str:
    if task.kind in BY_TASK:
        return BY_TASK[task.kind]
    if task.kind == "unlabelled":
        saved = [n for n in fitting if HEADS[n].made(config)]
        return (saved or ["encoder"])[0]
    order = ["sequence-classification", "image-classification"]
    if task.image is not None:
        order.reverse()
    return next((n for n in order if n in fitting), order[0])


def _variant(head: Head, config: Any) -> Head:
    half = head is ENCODER and getattr(config, "is_encoder_decoder", False) and ENCODER_HALF.classes_for(config)
    return ENCODER_HALF if half else head


def is_decoder_only(config: Any) -> bool:
    """Whether models of this config read left to right only, such as GPT-2 and Llama."""
    kind = type(config)
    return (kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and kind not in transformers.MODEL_FOR_MASKED_LM_MAPPING
            and not getattr(config, "is_encoder_decoder", False))  # fmt: skip
