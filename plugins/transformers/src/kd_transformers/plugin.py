"""Hooks of kd-transformers."""

from __future__ import annotations

from kdcore import Component, hookimpl
from kdcore.components import Kind


@hookimpl
def kd_register_teachers() -> list[Component]:
    return [
        _component("teacher"),
        Component(
            "teacher",
            "transformers-text",
            target="kd_transformers.text:TransformersText",
            options="kd_transformers.options:TextOptions",
            summary="a Hugging Face language model in this process that answers prompts",
            tags=("text", "text-teacher", "language-model"),
        ),
    ]


@hookimpl
def kd_register_students() -> list[Component]:
    return [_component("student")]


def _component(kind: Kind) -> Component:
    return Component(
        kind,
        "transformers",
        target="kd_transformers.build:build_student" if kind == "student" else "kd_transformers.build:build",
        options="kd_transformers.options:TransformersOptions",
        summary="a Hugging Face transformers model, from the Hub, a folder or a config",
        tags=("text", "image", "classification", "segmentation", "language-model", "embedding"),
    )
