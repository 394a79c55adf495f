"""A model's config: found, changed as the options say, fitted to the task."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from kd_transformers.heads import Head, is_decoder_only
from kd_transformers.options import CheckpointOptions, TransformersOptions
from kd_transformers.source import Source, explained
from kdcore.data import Task
from kdcore.errors import ModelError, did_you_mean
from kdcore.models import Labels

FROM_THE_TASK = ("num_labels", "id2label", "label2id")


def load_config(options: TransformersOptions, source: Source | None, task: Task) -> Any:
    """The config of a source, or of a `model_type`, with the changes of the options.

    A model from a `model_type` alone takes the vocabulary's size, the special tokens and the image's shape from the
    task, where the options do not give them.

    Raises:
        ModelError: if it cannot be had, or a change names no entry of it.
    """
    changes = dict(options.config)
    kind = changes.pop("model_type", None)
    if wrong := [key for key in FROM_THE_TASK if key in changes]:
        raise ModelError(f"config.{wrong[0]}: the classes come from the data; leave it out")
    if source is None and kind not in CONFIG_MAPPING:
        raise ModelError(f"config.model_type: transformers knows no {kind!r}; "
                         f"{did_you_mean(str(kind), CONFIG_MAPPING.keys(), 'model types')}")  # fmt: skip
    with explained(repr(source.where) if source else f"a config of type {kind!r}"):
        config = _load(source, kind, {})
        if kind is not None and config.model_type != kind:
            raise ModelError(f"checkpoint: holds a model of type {config.model_type!r}, the config asks for {kind!r}")
        _check_keys(config, changes)
        config = _load(source, kind, changes) if changes else config
        check_kernel(config, options)
    if source is None:
        _take_shapes(config, task, changes)
    return config


def _load(source: Source | None, kind: str | None, changes: Mapping[str, Any]) -> Any:
    if source is None:
        return AutoConfig.for_model(kind, **changes)
    return AutoConfig.from_pretrained(source.where, **source.arguments, **changes)


def check_kernel(config: Any, options: CheckpointOptions) -> None:
    """Refuse an attention kernel that is fetched from the Hub: it is code too, whoever asks for it, options or config.
    Raises `ModelError`."""
    kernel = options.attn_implementation or getattr(config, "_attn_implementation", None)
    if not options.trust_remote_code and "/" in str(kernel or ""):
        raise ModelError(f"the attention kernel {kernel!r} is code of the Hub: set `attn_implementation: sdpa`, "
                         "or `trust_remote_code: true` if you trust it")  # fmt: skip


def _check_keys(config: Any, changes: Mapping[str, Any]) -> None:
    for key in changes:
        if not hasattr(config, key) or callable(getattr(config, key)):
            raise ModelError(f"config.{key}: models of type {config.model_type!r} have no such entry; "
                             f"{did_you_mean(key, [*config.to_dict(), *config.attribute_map], 'entries')}")  # fmt: skip


def _take_shapes(config: Any, task: Task, changes: Mapping[str, Any]) -> None:
    found: dict[str, Any] = {}
    if isinstance(task.tokenizer, Sized):
        found["vocab_size"] = len(task.tokenizer)
    if task.kind in ("causal-lm", "masked-lm", "seq2seq") and task.num_classes is not None:
        found["vocab_size"] = task.num_classes
    if task.image is not None:
        channels, height, width = task.image
        found |= {"num_channels": channels, "image_size": height if height == width else [height, width]}
    for key, value in found.items():
        if hasattr(config, key) and key not in changes:
            setattr(config, key, value)
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value, default = getattr(task.tokenizer, key, None), getattr(config, key, None)
        outside = isinstance(default, int) and default >= getattr(config, "vocab_size", default + 1)
        if hasattr(config, key) and key not in changes and (value is not None or outside):
            setattr(config, key, value)


def fit_config(config: Any, head: Head, task: Task, source: Source | None, options: TransformersOptions,
               tokenizer: Any) -> None:  # fmt: skip
    """Give the config what its head needs: the task's classes, a padding token, a start token, a causal mask.

    Raises:
        ModelError: if the trained head of a checkpoint has other classes than the task, or a token is missing.
    """
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is None and getattr(tokenizer, "pad_token_id", None) is not None:
        text.pad_token_id = tokenizer.pad_token_id
    if head.classes:
        _fit_classes(config, task, _trained_source(config, head, source, options))
    if head.name == "sequence-classification" and is_decoder_only(config) and text.pad_token_id is None:
        raise ModelError(
            f"a {config.model_type!r} model classifies the last token that is no padding, and has no padding token: "
            "set `config: {pad_token_id: …}`, or save its tokenizer with a pad_token"
        )
    if head.name == "causal-lm" and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    if head.name == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        if getattr(text, "pad_token_id", None) is None:
            raise ModelError("a seq2seq model needs `config: {decoder_start_token_id: …, pad_token_id: …}`")
        config.decoder_start_token_id = text.pad_token_id


def has_weights(source: Source | None, options: TransformersOptions) -> bool:
    """Whether weights are loaded, or all are fresh."""
    return source is not None and (options.pretrained or options.checkpoint is not None)


def _trained_source(config: Any, head: Head, source: Source | None, options: TransformersOptions) -> str | None:
    """Where the head's own weights come from; `None` for a fresh head."""
    return (
        source.where if source and head.made(config) and has_weights(source, options) and not options.new_head else None
    )


def _fit_classes(config: Any, task: Task, trained: str | None) -> None:
    count = task.num_classes or (1 if task.kind == "regression" else None)
    if count is None:
        return
    if trained and config.num_labels != count:
        raise ModelError(f"{trained} predicts {config.num_labels} classes ({_listed(class_names(config))}), the data "
                         f"has {count} ({_listed(task.classes)}): use the data it was trained for, or "
                         "`new_head: true` for a fresh head, which must then be trained")  # fmt: skip
    if trained:
        return
    if task.classes:
        config.id2label = dict(enumerate(task.classes))
        config.label2id = {name: index for index, name in enumerate(task.classes)}
    else:
        config.num_labels = count
    kinds = {"multilabel": "multi_label_classification", "regression": "regression"}
    config.problem_type = kinds.get(task.kind, config.problem_type)


def class_names(config: Any) -> tuple[str, ...]:
    """The class names of a config in the order of the logits; nothing where they are just `LABEL_0`, `LABEL_1`, …"""
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    return () if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "") or "without names"


def labels_of(config: Any, head: Head, task: Task, vocabulary: str | None) -> Labels:
    """What the logits mean: the config's classes, or the vocabulary."""
    if head.tokens:
        return Labels(config.get_text_config().vocab_size, None, vocabulary)
    return Labels(config.num_labels, class_names(config) or None) if head.classes else Labels()
