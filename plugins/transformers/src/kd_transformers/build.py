"""The component `transformers`: from options and a task to a `kdcore.Model`."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from kd_transformers.adapters import adapt, find_adapter, with_adapter
from kd_transformers.call import Call
from kd_transformers.configs import fit_config, has_weights, labels_of, load_config
from kd_transformers.heads import Head, choose_head
from kd_transformers.images import default_settings, normaliser
from kd_transformers.options import CheckpointOptions, TransformersOptions
from kd_transformers.quantized import is_quantized, quantization, settle
from kd_transformers.source import Source, explained, find_source
from kd_transformers.writing import Writer
from kdcore.data import Task, vocabulary_fingerprint
from kdcore.errors import ModelError
from kdcore.models import Model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build(options: TransformersOptions, task: Task) -> Model:
    """A teacher or student.

    The embedding `[B, D]` is the classifier's input for heads with one row of logits per sample, the pooled tokens
    for the head `encoder`, and not given otherwise. Stages are the blocks, or stages of blocks, of the network.

    Raises:
        ModelError: if the model cannot be had, has no such head, or does not fit the task.
    """
    source = find_source(options)
    adapter = find_adapter(source)
    places = [adapter.source, adapter.base] if adapter else [source] if source else []
    config = load_config(options, adapter.described if adapter else source, task)
    head = choose_head(options.head, task, config)
    tokenizer = next((found for place in places if (found := place.tokenizer()) is not None), None)
    vocabulary = _vocabulary(tokenizer, task, head, source)
    tokenizer = tokenizer or task.tokenizer
    fit_config(config, head, task, source, options, tokenizer)
    module, fresh = _load(options, source, config, head)
    saved: Any = module
    if options.lora:
        base = adapter.base if adapter else source
        saved = adapt(module, head, options.lora, fresh, base, adapter)
    elif is_quantized(module):
        module.requires_grad_(False)
    if options.gradient_checkpointing:
        _compute_again(module, inputs=options.lora is not None)
    settings: dict[str, Any] | None = None
    if module.main_input_name == "pixel_values":
        settings = next(filter(None, (place.image_settings() for place in places)), None) or default_settings(config)
    if head.name == "encoder" and getattr(module, "pooler", None) is not None:
        module.pooler.requires_grad_(False)  # the embedding comes from the tokens: the pooler would get no gradient
    placed = stands_apart(module)
    call = Call(module, head, options.pooling, normaliser(settings or {}), options.attentions, whole=placed)
    labels = labels_of(config, head, task, vocabulary)
    writer = Writer(module, tokenizer) if head.name == "causal-lm" else None
    return Model(module, call, save=Saver(saved, tokenizer, settings).save, labels=labels, stages=stages_of(module),
                 writer=writer, tokenizer=tokenizer, placed=placed)  # fmt: skip


def _vocabulary(tokenizer: Any, task: Task, head: Head, source: Source | None) -> str | None:
    """The fingerprint of the model's vocabulary: the data's own for a model from a config alone.

    Raises:
        ModelError: if the data numbers its tokens otherwise and no logits over tokens could tell later.
    """
    if source is None:
        return task.vocabulary
    if tokenizer is None:
        return None
    found = vocabulary_fingerprint(tokenizer)
    if task.vocabulary and found != task.vocabulary and not head.tokens:
        raise ModelError(f"the tokenizer of {source.where!r} numbers its tokens otherwise than the data's "
                         f"({found}, {task.vocabulary}): tokenise the data with the model's tokenizer")  # fmt: skip
    return found


def build_student(options: TransformersOptions, task: Task) -> Model:
    """As `build`, of a model that is trained.

    Raises:
        ModelError: as `build`, and if nothing of it could be trained.
    """
    if options.device_map:
        raise ModelError("device_map: a student is on one device, or divided by `train.shard`; leave it out")
    model = build(options, task)
    if options.lora is None and is_quantized(model.module):
        raise ModelError("quantization: quantised weights cannot be trained; add `lora: {merge: false}` to train "
                         "adapters beside them, or give a model that is not quantised")  # fmt: skip
    return model


def _load(options: TransformersOptions, source: Source | None, config: Any, head: Head) -> tuple[Any, list[str]]:
    """The network, with loaded or fresh weights; and the names of those that are fresh where others were loaded."""
    if not has_weights(source, options) or source is None:
        config.architectures = list(head.classes_for(config)[:1])  # a few types have several classes for a head
        with explained(f"a {config.model_type!r} model"):
            return getattr(transformers, head.auto).from_config(config, **_arguments(options)), []
    module, info = load_weights(options, source, config, head)
    for key, saved, wanted in info["mismatched_keys"]:
        if not options.new_head or saved[1:] != wanted[1:] or wanted[0] != config.num_labels:
            raise ModelError(
                f"{source.where}: the weights {key!r} have the shape {list(saved)}, the config asks for "
                f"{list(wanted)}: leave `config` as it is there, or set `pretrained: false`"
            )
    return module, [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]


def load_weights(options: CheckpointOptions, source: Source, config: Any, head: Head) -> tuple[Any, dict[str, Any]]:
    """The network with the weights of a source, and what did not fit. Adapters that lie there are added in, unless
    they are to be trained on. Raises `ModelError` if it cannot be had."""
    adapter = find_adapter(source)
    base = adapter.base if adapter else source
    with explained(f"the model {base.where!r}"):
        module, info = getattr(transformers, head.auto).from_pretrained(
            base.where, config=config, revision=base.revision, use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, device_map=options.device_map, offload_folder=options.offload_folder,
            **_arguments(options), **quantization(options.quantization, DTYPES[options.dtype]),
        )  # fmt: skip
    if is_quantized(module):
        settle(module)
    if adapter:
        info["missing_keys"] = {key for key in info["missing_keys"] if not adapter.holds(key)}
        info["mismatched_keys"] = {entry for entry in info["mismatched_keys"] if not adapter.holds(entry[0])}
        if getattr(options, "lora", None) is None:
            module = with_adapter(module, adapter)
    return module, info


def stands_apart(module: Any) -> bool:
    """Whether a network is divided over several devices, and moves what it is given from one to the next."""
    return len(set((getattr(module, "hf_device_map", None) or {}).values())) > 1


def _compute_again(module: Any, inputs: bool) -> None:
    """Have each block computed again in the backward pass; the embeddings' `inputs` must require a gradient where
    the weights before the first adapter do not. Raises `ModelError` if the type of model cannot."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # its other name is not in all versions
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise ModelError(f"gradient_checkpointing: {type(module).__name__} does not support it; leave it "
                         "out") from error  # fmt: skip
    if inputs:
        module.enable_input_require_grads()


def _arguments(options: CheckpointOptions) -> dict[str, Any]:
    name = options.attn_implementation or ("eager" if getattr(options, "attentions", False) else None)
    kernel = {"attn_implementation": name} if name else {}
    return {"dtype": DTYPES[options.dtype], "trust_remote_code": options.trust_remote_code, **kernel}


@dataclass
class Saver:
    """Writes a model with what stood beside it, so that `from_pretrained(folder)` alone loads it.

    Args:
        module: the network, or what is saved in its place.
        tokenizer: its tokenizer, where there is one.
        settings: of its image processor, where it reads images.
    """

    module: Any
    tokenizer: Any
    settings: dict[str, Any] | None

    def save(self, folder: Path) -> None:
        """Write config, safetensors weights, tokenizer and image settings."""
        with _without_bars():
            self.module.save_pretrained(folder)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)
        if self.settings is not None:
            text = json.dumps(self.settings, indent=2, sort_keys=True)
            (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Inside, the library draws no progress of its own."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


def stages_of(module: nn.Module) -> list[str]:
    """Names of a network's blocks, or of its stages of blocks, shallow to deep.

    They are the entries of the outermost `nn.ModuleList` with the most parameters; of an encoder and a decoder, both.
    A stage that is itself a list is named by its last block, whose output is the stage's.
    """
    lists = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.ModuleList)]
    outer = {name: m for name, m in lists if not any(name.startswith(f"{other}.") for other, _ in lists)}
    if not outer:
        return []
    largest = max(outer, key=lambda name: sum(p.numel() for p in outer[name].parameters()))
    chosen = [name for name in outer if _side(name) == _side(largest)]
    return [_last_block(f"{name}.{i}", block) for name in chosen for i, block in enumerate(outer[name])]


def _side(name: str) -> str:
    """A path without regard to whether it lies in an encoder or a decoder."""
    return name.replace("decoder", "encoder")


def _last_block(name: str, block: nn.Module) -> str:
    return f"{name}.{len(block) - 1}" if isinstance(block, nn.ModuleList) else name
