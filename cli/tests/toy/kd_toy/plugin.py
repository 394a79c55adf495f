"""Hooks of the toy plugin."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

_PAPER = Paper("Toys Teach", "Ada Toy and Bob Toy", "Proceedings of Play", 2024, arxiv="2401.00001")


@hookimpl
def kd_register_data() -> list[Component]:
    return [Component("data", "toy-points", "kd_toy.parts:data", "kd_toy.options:PointsOptions", "points", ("toy",))]


@hookimpl
def kd_register_teachers() -> list[Component]:
    return [Component("teacher", "toy-linear", "kd_toy.parts:model", "kd_toy.options:LinearOptions", "a linear model")]


@hookimpl
def kd_register_students() -> list[Component]:
    return [Component("student", "toy-linear", "kd_toy.parts:model", "kd_toy.options:LinearOptions", "a linear model")]


@hookimpl
def kd_register_methods() -> list[Component]:
    return [
        Component("method", "toy", "kd_toy.parts:Toy", "kd_toy.options:ToyOptions", "match [logits]", ("toy",), _PAPER)
    ]
