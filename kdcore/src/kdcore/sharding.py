"""Weights divided over the processes by PyTorch's FSDP2, for what no single device holds with its optimizer."""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from kdcore.errors import RecipeError
from kdcore.models import Model
from kdcore.processes import world_size
from kdcore.stages import TrainStage

if TYPE_CHECKING:
    from kdcore.runner import Run

FILE = "sharded.pt"
HOOKS = ("before_step", "after_step", "evaluate")
"""Of a stage, that work with whole parameters."""


def shard(run: Run, stage: TrainStage, teachers: bool) -> TrainStage:
    """A copy of a prepared stage in which every process holds its part of each parameter, and puts a block together
    when it is called. The stage itself waits on the CPU; see `collect`.

    Args:
        run: the run; of one process it is the stage itself.
        stage: the stage, whole and on the device.
        teachers: whether its frozen models are divided, too; what is around their blocks, which losses may use, stays
            whole once it was called.

    Raises:
        RecipeError: if the stage, or a parameter of it, cannot be divided.
    """
    if not stage.shardable:
        raise RecipeError(f"stage {stage.name!r} works with parts of its models by themselves and cannot be divided: "
                          f"leave `train.shard` out, or set `stages.{stage.name}.train.shard: none`")  # fmt: skip
    if run.accelerator.scaler is not None:
        raise RecipeError("train.shard does not go with train.precision=fp16: take bf16")
    if run.accelerator.num_processes == 1:
        return stage
    stay = [m for m in stage.frozen.values() if not (teachers and isinstance(m, Model) and not m.placed)]
    for model in (stage, *(m for m in stage.frozen.values() if m not in stay)):
        model.to("cpu")
    kept = [run, run.accelerator, run.method, run.data, run.manager, stage.data]
    kept += [part for model in stay for part in model.modules()]
    divided = copy.deepcopy(stage, {id(x): x for x in kept})
    held = {*stay, *divided.modules()}
    frozen = [model for model in dict.fromkeys(divided.frozen.values()) if model not in held]
    mesh = _mesh(run.device.type, run.accelerator.num_processes)
    try:
        for root in (divided, *frozen):
            models = [part for part in root.modules() if isinstance(part, Model)]  # parts of losses may be read alone
            for module in (*dict.fromkeys(block for model in models for block in _blocks(model)), root):
                fully_shard(module, mesh=mesh)
    except ValueError as error:  # of a scalar, say
        raise RecipeError(f"train.shard: stage {stage.name!r} cannot be divided: {error}") from error
    for hook in HOOKS:
        if has(stage, hook):
            register_fsdp_forward_method(divided, hook)
    for model in frozen:  # the whole must have been called before a part of it is, by what writes texts
        register_fsdp_forward_method(model, "freeze")
        model.freeze()
    return divided


@functools.cache
def _mesh(device: str, size: int) -> DeviceMesh:
    """All processes. PyTorch's caches keep it to the end of the program, but the group's threads must end before Python
    does: one that is still at work then ends the process by a signal."""
    mesh = init_device_mesh(device, (size,))
    atexit.register(mesh._pg_registry.clear)
    return mesh


def has(stage: TrainStage, hook: str) -> bool:
    """Whether a stage does anything in a hook."""
    return getattr(type(stage), hook) is not getattr(TrainStage, hook)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a network, outermost first: lists of at least two modules of one class, with children."""
    for child in module.children():
        inner = list(child.children())
        alike = len(inner) > 1 and len({type(part) for part in inner}) == 1 and any(inner[0].children())
        if isinstance(child, nn.ModuleList | nn.Sequential) and alike:
            yield from inner
        else:
            yield from _blocks(child)


@contextlib.contextmanager
def whole(stage: TrainStage) -> Iterator[None]:
    """Inside, every process holds all parameters of a divided stage: what they compute there may differ in length.
    Changes of the stage's parameters, alike in all processes, are kept."""
    roots = [m for m in (stage, *stage.frozen.values()) if isinstance(m, FSDPModule)]
    parts = [part for root in roots for part in root.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.reshard()
    divided = dict(stage.named_parameters()) if isinstance(stage, FSDPModule) else {}
    for root in roots:
        root.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    try:
        yield
        for name, shard in divided.items():
            _write(stage.get_parameter(name), cast(DTensor, shard))
    finally:
        for part in parts:
            part.reshard()
        for root in roots:
            root.set_reshard_after_forward(True)
            root.set_reshard_after_forward(False, recurse=False)


@torch.no_grad()
def _write(parameter: Tensor, divided: DTensor) -> None:
    """Put this process's part of a whole parameter where it is kept."""
    parts = distribute_tensor(parameter.detach(), divided.device_mesh, divided.placements, src_data_rank=None)
    divided.to_local().copy_(parts.to_local())


def check_reached(stage: TrainStage) -> None:
    """Refuse a stage whose first step left parameters without gradient: its forward has called the original of what was
    copied.

    Raises:
        RecipeError: naming a parameter.
    """
    trained = {name: p.grad is not None for name, p in stage.named_parameters() if p.requires_grad}
    unused = stage.find_unused_parameters or len(stage.objectives) > 1
    if not (any(trained.values()) if unused else all(trained.values())):
        name = next(name for name, reached in trained.items() if not reached)
        raise RecipeError(f"stage {stage.name!r}: no gradient reached {name!r} of its copy, which works on with the "
                          "original model and cannot be divided: leave `train.shard` out")  # fmt: skip


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def agreed(found: str | None) -> str | None:
    """What the first process found that found anything."""
    return next((one for one in gather_object([found]) if one), None)


def alike(module: nn.Module) -> Iterator[str]:
    """Buffers of modules with `same_everywhere`: large ones, say, that every process updates alike."""
    for path, part in module.named_modules():
        if getattr(part, "same_everywhere", False):
            yield from (f"{path}.{name}" for name, _ in part.named_buffers())


def send_buffers(stage: TrainStage) -> None:
    """Give all processes the buffers of the first, as DistributedDataParallel does before each forward."""
    left = set(alike(stage))
    for name, buffer in stage.named_buffers():
        if world_size() > 1 and name not in left:
            torch.distributed.broadcast(buffer, 0)


def collect(divided: TrainStage, stage: TrainStage, main: bool) -> None:
    """Give the stage what its divided copy has learnt: the weights on the main process, the metrics on all."""
    weights = _put_together(divided)["stage"]
    stage.metrics = divided.metrics
    if main:
        stage.load_state_dict(weights)


def save(stage: TrainStage, optimizers: Iterable[Optimizer], folder: Path, main: bool) -> None:
    """Write weights and moments, put together, so that any number of processes can go on from them."""
    held = _put_together(stage, optimizers)
    if main:
        torch.save(held, folder / FILE)


def restore(stage: TrainStage, optimizers: Iterable[Optimizer], folder: Path) -> None:
    """Read what `save` wrote; every process keeps its part."""
    from torch.distributed.checkpoint import state_dict

    held = torch.load(folder / FILE, map_location="cpu", weights_only=True, mmap=True)
    parts = state_dict.StateDictOptions(full_state_dict=True)
    state_dict.set_model_state_dict(stage, held["stage"], options=parts)
    for one, state in zip(optimizers, held["optimizers"], strict=True):
        state_dict.set_optimizer_state_dict(stage, one, state, options=parts)


def _put_together(stage: TrainStage, optimizers: Iterable[Optimizer] = ()) -> dict[str, Any]:
    """Whole weights and moments, in the memory of the main process's CPU; empty elsewhere."""
    from torch.distributed.checkpoint import state_dict

    whole = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = state_dict.get_model_state_dict(stage, options=whole)
    moments = [state_dict.get_optimizer_state_dict(stage, one, options=whole) for one in optimizers]
    return {"stage": weights, "optimizers": moments}
