"""Adapters from the arrays of golden vectors to this plugin's functions."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.func import functional_call

from kd_classic import functional
from kd_classic.modules import Regressor

Tensors = dict[str, Tensor]


def kd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.kd(inputs["logits_s"], inputs["logits_t"], **options)}


def logitstd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    student = functional.logit_standardize(inputs["logits_s"], eps=options["eps"])
    teacher = functional.logit_standardize(inputs["logits_t"], eps=options["eps"])
    return {"loss": functional.kd(student, teacher, temperature=options["temperature"])}


def dkd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.dkd(inputs["logits_s"], inputs["logits_t"], inputs["target"], **options)}


def dist(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.dist(inputs["logits_s"], inputs["logits_t"], **options)}


def fitnet(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    student, teacher = inputs["feat_s"], inputs["feat_t"]
    regressor = Regressor(student.shape, teacher.shape, relu=options.get("use_relu", True))
    # Training mode updates the running statistics in place, hence the copies.
    state = {name: value.clone() for name, value in params.items()}
    return {"loss": functional.fitnet(functional_call(regressor, state, (student,)), teacher)}


def at(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    students, teachers = _layers(inputs, "feat_s"), _layers(inputs, "feat_t")
    return {"loss": functional.at(students, teachers, p=options.get("p", 2))}


def at_paper(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    students, teachers = _layers(inputs, "feat_s"), _layers(inputs, "feat_t")
    return {"loss": functional.at(students, teachers, mode="paper", p=options.get("p", 2))}


def _layers(inputs: Tensors, prefix: str) -> list[Tensor]:
    """`prefix` alone, or `prefix` 0, 1, ... in order."""
    names = sorted((name for name in inputs if name.startswith(prefix)), key=lambda name: int(name[len(prefix) :] or 0))
    return [inputs[name] for name in names]


ADAPTERS: dict[str, Callable[[Tensors, Tensors, dict[str, Any]], Tensors]] = {
    "kd": kd,
    "logitstd": logitstd,
    "dkd": dkd,
    "dist": dist,
    "fitnet": fitnet,
    "at": at,
    "at_paper": at_paper,
}
