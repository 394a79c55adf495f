"""Networks that data is matched on: drawn afresh from a seed, held without gradient, called with explicit
parameters."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from kd_dataset_distill.functional import Parameters
from kdcore import Model, Run
from kdcore.data import derive_seed, seeded
from kdcore.errors import ModelError, RecipeError
from kdcore.models import Batch


def architectures(run: Run) -> list[str]:
    """The roles of the students. Raises `RecipeError` where the recipe names none."""
    if not run.student_roles:
        raise RecipeError(
            "the recipe names no student: fresh networks of the students' architectures are what a data set is "
            "matched on and measured with (`student:`)"
        )
    return run.student_roles


def draw(run: Run, role: str, *key: object) -> Model:
    """A network of a student's architecture with fresh weights, which depend on the run's seed and the key alone.

    Raises:
        ModelError: if the student was handed over as a module, and a part of it does not say how it is drawn afresh.
    """
    name = "-".join(map(str, ("fresh", role, *key)))
    if role in run.given.get("students", {}):
        return _redrawn(run.model(role), derive_seed(run.seed, name))
    model = run.model(role, key=name)
    del run.models[name]
    return model


def _redrawn(model: Model, seed: int) -> Model:
    fresh = copy.deepcopy(model)
    known: set[int] = set()
    with seeded(seed):
        for module in fresh.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
                known |= {id(parameter) for parameter in module.parameters(recurse=False)}
    if wrong := [name for name, p in fresh.module.named_parameters() if id(p) not in known]:
        raise ModelError(f"the student's parameter {wrong[0]!r} cannot be drawn afresh: give its module a method "
                         "`reset_parameters()`, or name a student component in a recipe")  # fmt: skip
    return fresh


class Held(nn.Module):
    """A network without gradient, in the state of a stage; what needs gradients takes the parameters as an argument.

    Args:
        model: the first network; `refresh` puts the weights of another one in its place.
    """

    same_everywhere = True

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]

    def refresh(self, model: Model) -> None:
        """Take over the weights of a network of the same architecture."""
        self.model.load_state_dict(model.state_dict())

    def leaves(self, prefix: str = "") -> Parameters:
        """The parameters whose names begin so, by name; each a copy that asks for gradient."""
        named = self.model.named_parameters()
        return {name: p.detach().clone().requires_grad_() for name, p in named if name.startswith(prefix)}

    def take(self, parameters: Parameters) -> None:
        """Keep these values."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(parameters[name])

    def forward(self, parameters: Parameters, batch: Batch, signal: str = "logits") -> Tensor:
        """`logits` or `embedding` of a batch under these parameters; those not given are the network's own."""
        return cast(Any, functional_call(self.model, parameters, (batch,))).need(signal)

    def calibrate(self, images: Tensor) -> None:
        """Set the statistics of batch norms to those of these images, by which evaluation mode then normalises."""
        for norm in self.norms:
            norm.reset_running_stats()
            norm.momentum = None
            nn.Module.train(norm, True)
        with torch.no_grad():
            self.model({"image": images})
        self.model.eval()
