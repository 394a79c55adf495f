"""What is checked before anything is trained: that each model finds its modality, and that all say the same classes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch

from kd_mst_distill.masking import find_layers, layer_shapes
from kd_mst_distill.modules import mask_net
from kd_mst_distill.options import MSTDistillOptions
from kdcore import Model, Outputs, Run
from kdcore.data import to_device
from kdcore.errors import DataError, ModelError
from kdcore.models import Batch, Labels, call_by_name, check_pair

TEACHERS = ("teacher", "cross")
ROLES = (*TEACHERS, "student")
TASKS = ("classification", "segmentation")


def check_models(run: Run) -> None:
    """Call every role's model on a sample of train and val.

    Raises:
        DataError: if the task is another one, or a modality that a model reads is not in the data.
        ModelError: if a teacher is not live, or the models' logits do not have the same shape and classes.
    """
    if run.data.task.kind not in TASKS:
        raise DataError(f"mst-distill is for classification and segmentation; this is a {run.data.task.kind!r} task")
    for role in ROLES:
        model = run.model(role)
        if not isinstance(model, Model):
            raise ModelError(f"mst-distill trains the role {role!r} and hooks its layers: it needs a live model, not "
                             "columns of outputs")  # fmt: skip
        model.to(run.device)
    for split in ("train", "val"):
        batch = to_device(run.data.sample(split), run.device)
        _check_logits({role: ask(role, run.model(role), batch, split) for role in ROLES})
    for role in TEACHERS:
        check_pair(run.model(role).labels, run.student.labels, (role, "student"))


def ask(role: str, model: Model, batch: Batch, split: str) -> Outputs:
    """The model's outputs, in evaluation mode and without gradient; an input that the batch lacks is named.

    A network that is called by the names of its `forward` must name entries of the batch: with several modalities
    there is no first one to fall back on.

    Raises:
        DataError: naming the input, the role and what the batch has.
        ModelError: if the model does not take the inputs as they are.
    """
    missing = _unknown_inputs(model, batch)
    was_training = model.training
    try:
        if not missing:
            with torch.no_grad():
                outputs: Outputs = model.eval()(batch)
            return outputs
    except KeyError as error:
        if (key := error.args[0] if error.args else None) in batch or not isinstance(key, str):
            raise
        missing = [key]
    except (ValueError, RuntimeError) as error:  # how networks refuse shapes
        raise ModelError(
            f"the role {role!r} ({type(model.module).__name__}) cannot take the samples of split {split!r}: {error}"
        ) from error
    finally:
        model.train(was_training)
    have = ", ".join(key for key in batch if key != "index")
    wanted = " and ".join(map(repr, missing))
    raise DataError(f"the role {role!r} ({type(model.module).__name__}) reads {wanted}, which the samples of split "
                    f"{split!r} do not have; they have: {have}")  # fmt: skip


def _unknown_inputs(model: Model, batch: Batch) -> list[str]:
    """The inputs that a network called by name requires and the batch lacks."""
    if model._call is not call_by_name:
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    inputs = inspect.signature(model.module.forward).parameters.values()
    return [p.name for p in inputs if p.kind in named and p.default is p.empty and p.name not in batch]


def _check_logits(outputs: Mapping[str, Outputs]) -> None:
    shapes = {role: o.need("logits").shape for role, o in outputs.items()}
    ours = shapes["student"]
    for role in TEACHERS:
        theirs = shapes[role]
        if len(theirs) > 1 and len(ours) > 1:
            check_pair(Labels(theirs[1]), Labels(ours[1]), (role, "student"))
        if theirs != ours or len(ours) not in (2, 4):
            raise ModelError(f"mst-distill compares logits of one shape, [B, C] or [B, C, H, W]: {role}'s have "
                             f"{list(theirs)}, the student's {list(ours)}")  # fmt: skip


def masked_layers(run: Run, options: MSTDistillOptions) -> dict[str, list[str]]:
    """The layers that get a mask, by teacher.

    Raises:
        ModelError: if there are fewer than `mask_layer_num`, one is not there, or gives what cannot be masked.
    """
    batch = to_device(run.data.sample("train"), run.device)
    found = {}
    for role in TEACHERS:
        model, key = run.model(role), f"method.mask_layers.{role}"
        training = model.training
        try:
            layers = find_layers(model, getattr(options.mask_layers, role))
            if len(layers) < options.mask_layer_num:
                raise ModelError(f"method.mask_layer_num is {options.mask_layer_num}, but these are only {len(layers)} "
                                 f"layers of {type(model.module).__name__}: {', '.join(layers)}")  # fmt: skip
            found[role] = layers[: options.mask_layer_num]
            for layer, shape in zip(found[role], layer_shapes(model.eval(), found[role], batch), strict=True):
                _check_mask(layer, shape, options)
        except ModelError as error:
            raise ModelError(f"{key}: {error}") from None
        finally:
            model.train(training)
    return found


def _check_mask(layer: str, shape: torch.Size, options: MSTDistillOptions) -> None:
    try:
        with torch.device("meta"):
            mask_net(shape, heads=options.mask_heads, hidden_dim_factor=options.hidden_dim_factor)
    except ValueError as error:
        raise ModelError(f"layer {layer!r} {error}") from None
