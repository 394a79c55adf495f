"""A student made from a teacher: blocks and components taken out, parts frozen, and saved so that it loads again.

A transformer of diffusers that lost whole blocks is an ordinary one with fewer layers. One that lost components is not:
its weights lie in `pruned.safetensors`, its architecture and what was removed in `pruned.json`, and `load` puts it
together.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from kd_diffusers.build import load_denoiser, stages_of
from kd_diffusers.denoiser import Denoiser
from kd_diffusers.source import explained, read_json
from kd_hierarchical_prune import nf4
from kd_hierarchical_prune.blocks import Block, Replacement, find_blocks, joined, keep_blocks
from kd_hierarchical_prune.functional import Part
from kdcore.errors import ModelError

LAYERS = {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"}
"""The entry of a diffusers config that says how long a list is."""
PRUNED, WEIGHTS = "pruned.json", "pruned.safetensors"


@dataclass
class Cut:
    """A student, and how it came out of its teacher.

    Args:
        model: the student.
        blocks: its blocks, by the number each has in the teacher.
        names: names of the teacher's parameters that are left -> their names in the student, in the teacher's order.
        before: the teacher's parameters before the first removed one.
        removed: components taken out of blocks that are left, as (module name of the block, component).
        how: what took their place.
    """

    model: Denoiser
    blocks: dict[int, Block]
    names: dict[str, str]
    before: set[str]
    removed: list[tuple[str, str]]
    how: Replacement


def cut(teacher: Denoiser, parts: Collection[Part], lists: Sequence[str] = (), how: Replacement | None = None) -> Cut:
    """A copy of the teacher, in float32 at least, without these parts.

    Raises:
        ModelError: if nothing would be left, or the blocks of this architecture differ by their position.
    """
    how = how or Replacement()
    blocks = find_blocks(teacher.module, lists)
    parts = joined(parts, blocks)
    gone = {blocks[i].path for i, component in parts if component is None}
    if len(gone) == len(blocks):
        raise ModelError("every block would be removed: leave some")
    moved = renumbered(blocks, gone)
    module, names = shrunk(teacher.module, blocks, gone, moved)
    kept = {b.index: Block(b.index, moved[b.path], b.components) for b in blocks if b.path in moved}
    removed = [(kept[i].path, component) for i, component in parts if component is not None]
    for i, component in parts:
        if component is not None:
            how.put(module, kept[i], component)
    lost = tuple(f"{path}." for i, component in parts for path in blocks[i].paths(component))
    names = {old: new for old, new in names.items() if not old.startswith(lost)}
    order = [name for name, _ in teacher.module.named_parameters()]
    start = next((i for i, name in enumerate(order) if name.startswith(lost)), 0)
    return Cut(with_module(teacher, module, removed, how), kept, names, set(order[:start]), removed, how)


def with_module(
    model: Denoiser, module: nn.Module, removed: Sequence[tuple[str, str]] = (), how: Replacement | None = None
) -> Denoiser:
    """The denoiser with another network, which saves itself natively unless components are removed from it."""
    own = functools.partial(save, model, module, removed, how) if removed and hasattr(module, "config") else None
    return model.like(module, save=own, stages=stages_of(module))


def renumbered(blocks: Sequence[Block], gone: Collection[str]) -> dict[str, str]:
    """The module names of the blocks that are left -> their names once the others are gone."""
    found: dict[str, str] = {}
    lengths: dict[str, int] = {}
    for block in blocks:
        where = block.path.rpartition(".")[0]
        if block.path not in gone:
            found[block.path] = f"{where}.{lengths.get(where, 0)}"
            lengths[where] = lengths.get(where, 0) + 1
    return found


def shrunk(
    module: nn.Module, blocks: Sequence[Block], gone: Collection[str], moved: Mapping[str, str]
) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a network without these blocks, and the names of the parameters left, old -> new."""
    lists = {b.path.rpartition(".")[0] for b in blocks}
    if gone and hasattr(module, "from_config") and lists <= set(LAYERS):
        made = fewer_layers(module, blocks, moved)
    else:
        made = copy.deepcopy(module)
        keep_blocks(made, gone)
    for parameter in made.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    made.train().requires_grad_(True)
    there = dict(made.named_parameters())
    names = {name: moved_name(name, moved) for name, _ in module.named_parameters()}
    outside = tuple(f"{path}." for path in gone)
    return made, {old: new for old, new in names.items() if new in there and not old.startswith(outside)}


def fewer_layers(module: Any, blocks: Sequence[Block], moved: Mapping[str, str]) -> nn.Module:
    """A model of diffusers of the same class with fewer layers, holding copies of the weights.

    Raises:
        ModelError: if its config does not say how many layers there are, or its blocks differ by position.
    """
    config = dict(module.config)
    for where, key in LAYERS.items():
        if any(block.path.startswith(f"{where}.") for block in blocks):
            if key not in config:
                raise ModelError(f"the config of {type(module).__name__} has no {key}, so its blocks cannot be removed")
            config[key] = sum(path.startswith(f"{where}.") for path in moved)
    if config.get("dual_attention_layers"):
        old = {i: int(moved[f"transformer_blocks.{i}"].rpartition(".")[2])
               for i in config["dual_attention_layers"] if f"transformer_blocks.{i}" in moved}  # fmt: skip
        config["dual_attention_layers"] = tuple(old.values())
    with init_empty_weights(include_buffers=False):
        made = type(module).from_config(config)
    state = {moved_name(name, moved): value for name, value in module.state_dict().items()
             if not (block := block_of(name, blocks)) or block in moved}  # fmt: skip
    wanted = made.state_dict()
    state = {name: fitted(name, value, wanted[name]).clone() for name, value in state.items() if name in wanted}
    if missing := [name for name in wanted if name not in state]:
        raise ModelError(f"the blocks of {type(module).__name__} differ by their position ({missing[0]}): they cannot "
                         "be removed one by one")  # fmt: skip
    made.load_state_dict(state, assign=True)
    if getattr(module, "is_gradient_checkpointing", False):
        made.enable_gradient_checkpointing()
    return made


def fitted(name: str, value: Tensor, wanted: Tensor) -> Tensor:
    """A weight as the shorter network wants it. In SD3's last block the text stream ends: of the six parts of its
    adaptive norm, shift and scale before the attention are left, in the other order.

    Raises:
        ModelError: if it does not fit.
    """
    if value.shape == wanted.shape:
        return value
    if ".norm1_context.linear." in name and 3 * len(wanted) == len(value):
        shift, scale = value.chunk(6)[:2]
        return torch.cat([scale, shift])
    raise ModelError(f"the blocks differ by their position: {name} is {list(value.shape)} and would have to be "
                     f"{list(wanted.shape)}")  # fmt: skip


def moved_name(name: str, moved: Mapping[str, str]) -> str:
    """The name of a weight once its block has another number."""
    for old, new in moved.items():
        if name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def block_of(name: str, blocks: Sequence[Block]) -> str:
    """The module name of the block that a weight belongs to; empty for one outside."""
    return next((block.path for block in blocks if name.startswith(f"{block.path}.")), "")


def freeze(found: Cut, pwp: bool, only: Collection[int] | None = None) -> None:
    """Let a student train after its first cut only (`pwp`), or in these blocks only, counted as in the teacher.

    By the order in which modules are defined: embeddings before the blocks stay as they are, the final norm and
    projection after them train.
    """
    parameters = dict(found.model.module.named_parameters())
    for old, new in found.names.items():
        if only is not None:
            trains = any(new.startswith(f"{found.blocks[i].path}.") for i in only if i in found.blocks)
        else:
            trains = not pwp or old not in found.before
        parameters[new].requires_grad_(trains)


def monitored(found: Cut) -> dict[int, Block]:
    """The blocks that have something to train, by their number in the teacher."""
    module = found.model.module
    return {i: block for i, block in found.blocks.items()
            if any(p.requires_grad for p in module.get_submodule(block.path).parameters())}  # fmt: skip


def save(model: Denoiser, module: Any, removed: Sequence[tuple[str, str]], how: Replacement, folder: Path) -> None:
    """Write a network that lacks components, with the process and pipeline of `model`. Diffusers alone would load it
    with new weights in their place, so the files have other names."""
    from safetensors.torch import save_model

    facts = {"config": json.loads(module.to_json_string()), "removed": removed, "how": asdict(how)}
    (folder / PRUNED).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    save_model(module, str(folder / WEIGHTS))
    model.save_facts(folder)


def load(folder: Path) -> Denoiser:
    """The student in a folder, whatever was removed and whether its weights are quantised.

    Raises:
        ModelError: if it cannot be loaded.
    """
    import diffusers

    pruned = folder / PRUNED
    if not pruned.is_file() and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no student that diffusers knows; build the network in Python and load "
                         "model.safetensors into it")  # fmt: skip
    facts = {"removed": [], "how": {}, **read_json(pruned)}
    config = facts.get("config") or read_json(folder / "config.json")
    if not facts["removed"] and "quantization_config" not in config:
        return load_denoiser(folder)
    quantization = config.pop("quantization_config", None)
    with explained(f"the student in {folder}", ""):
        module = getattr(diffusers, config["_class_name"]).from_config(config)
        how = Replacement(**facts["how"])
        blocks = {block.path: block for block in find_blocks(module)}
        for path, component in facts["removed"]:
            how.put(module, blocks[path], component)
    files = [folder / WEIGHTS] if facts["removed"] else sorted(folder.glob("*.safetensors"))
    nf4.load_weights(module, files, quantization)
    return with_module(load_denoiser(folder, module), module, facts["removed"], how)
