"""The component `diffusers`: from options to a denoiser."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from kd_diffusers.denoiser import FACTS, Denoiser
from kd_diffusers.options import DiffusersOptions
from kd_diffusers.pipeline import Rest
from kd_diffusers.process import make_process, make_scheduler
from kd_diffusers.source import NetworkConfig, denoiser_name, explained, pipeline_index, read_json
from kdcore.api import student_folder
from kdcore.data import Task
from kdcore.errors import ModelError, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks", "down_blocks", "up_blocks")
"""Where models of diffusers keep their blocks, in the order they are run."""


def build(options: DiffusersOptions, task: Task) -> Denoiser:
    """A teacher or student.

    Raises:
        ModelError: if the denoiser or the rest of its pipeline cannot be had, or an architecture or entry is unknown.
    """
    folder = student_folder(Path(options.checkpoint)) if options.checkpoint is not None else None
    if folder is not None and not (folder / "config.json").is_file():
        raise ModelError(f"checkpoint: {options.checkpoint!r} holds no denoiser that diffusers loads (no config.json); "
                         "give a run folder, or a folder made by save_pretrained")  # fmt: skip
    facts = read_json(folder / FACTS) if folder is not None else {}
    where = options.rest or facts.get("pipeline")
    index = pipeline_index(where, options.revision) if where else {}
    name = denoiser_name(index, options)
    own = index if where == options.model or options.model is None else pipeline_index(options.model, options.revision)
    module = _module(options, folder, denoiser_name(own, options))
    if options.gradient_checkpointing:
        with explained(f"a {type(module).__name__}", ""):
            module.enable_gradient_checkpointing()
    scheduler = _scheduler(options, index, where, folder)
    given = options.model_fields_set
    mean, std = (getattr(options, key) if key in given else facts.get(key[9:], getattr(options, key))
                 for key in ("timestep_mean", "timestep_std"))  # fmt: skip
    rest = None
    if where and index:
        dtype = {"dtype": DTYPES[options.dtype], "variant": options.variant, "revision": options.revision}
        rest = Rest(where, name, dtype, options.max_sequence_length)
    return Denoiser(module, make_process(scheduler, mean, std), rest=rest, stages=stages_of(module))


def load_denoiser(folder: Path, module: nn.Module | None = None) -> Denoiser:
    """A saved denoiser, with its process and the rest of its pipeline; `module` is its network where diffusers
    alone cannot load it.

    Raises:
        ModelError: if it cannot be loaded.
    """
    if module is None:
        return build(DiffusersOptions(checkpoint=str(folder)), Task("unlabelled"))
    facts = read_json(folder / FACTS)
    with explained(f"the scheduler in {folder}", ""):
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        scheduler = make_scheduler(config["_class_name"], config)
    rest = None
    if "pipeline" in facts:
        rest = Rest(facts["pipeline"], facts["denoiser"], {}, facts["max_sequence_length"])
    process = make_process(scheduler, facts.get("mean", 0.0), facts.get("std", 1.0))
    return Denoiser(module, process, rest=rest, stages=stages_of(module))


def _module(options: DiffusersOptions, folder: Path | None, subfolder: str) -> Any:
    """The network with loaded or fresh weights, in the options' type."""
    if folder is None and options.architecture is not None:
        return in_dtype(fresh(options.architecture, options.config), options.dtype)
    where = str(folder) if folder is not None else str(options.model)
    inside = {} if folder is not None or not subfolder else {"subfolder": subfolder}
    with explained(f"the denoiser of {where!r}", where):
        if not options.pretrained and folder is None:
            config = NetworkConfig.load_config(where, revision=options.revision, **inside)
            made = getattr(diffusers, config["_class_name"])
            return in_dtype(made.from_config({**config, **options.config}), options.dtype)
        return diffusers.AutoModel.from_pretrained(
            where, dtype=DTYPES[options.dtype], use_safetensors=True, variant=None if folder else options.variant,
            revision=None if folder else options.revision, **inside,
        )  # fmt: skip


def in_dtype(module: Any, dtype: str) -> Any:
    """The network in a type of weights by its short name."""
    return module if dtype == "fp32" else module.to(DTYPES[dtype])


def fresh(architecture: str, config: dict[str, Any]) -> Any:
    """A network of diffusers with fresh weights.

    Raises:
        ModelError: if there is no such architecture, it has no such argument, or the arguments do not fit together.
    """
    names = [name for name in dir(diffusers) if name.endswith("Model") and "Pipeline" not in name]
    if architecture not in names:
        raise ModelError(
            f"architecture: diffusers has no model {architecture!r}; {did_you_mean(architecture, names, 'models')}"
        )
    made = getattr(diffusers, architecture)
    known = [p for p in inspect.signature(made.__init__).parameters if p not in ("self", "kwargs")]
    for key in config:
        if key not in known:
            hint = did_you_mean(key, known, "arguments")
            raise ModelError(f"config.{key}: {architecture} has no such argument; {hint}")
    with explained(f"a {architecture}", ""):
        return made(**config)


def _scheduler(options: DiffusersOptions, index: dict[str, Any], where: str | None, folder: Path | None) -> Any:
    """The scheduler that the options name, or that of the saved denoiser or the pipeline, with the options' changes."""
    config: dict[str, Any] = {}
    if folder is not None and (folder / "scheduler" / "scheduler_config.json").is_file():
        config = read_json(folder / "scheduler" / "scheduler_config.json")
    elif index.get("scheduler", [None])[0] and where is not None:
        with explained(f"the scheduler of {where!r}", where):
            made = getattr(diffusers, index["scheduler"][1])
            config = made.load_config(where, subfolder="scheduler", revision=options.revision)
    name = options.scheduler or config.get("_class_name") or "FlowMatchEulerDiscreteScheduler"
    return make_scheduler(name, config, options.scheduler_config)


def stages_of(module: nn.Module) -> list[str]:
    """Names of a network's blocks, in the order they are run."""
    return [f"{name}.{i}" for name in BLOCK_LISTS for i in range(len(getattr(module, name, None) or ()))]
