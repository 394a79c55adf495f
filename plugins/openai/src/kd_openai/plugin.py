"""Hooks of kd-openai."""

from __future__ import annotations

from kdcore import Component, hookimpl


@hookimpl
def kd_register_teachers() -> list[Component]:
    return [
        Component(
            "teacher",
            "openai",
            target="kd_openai.teacher:OpenAITeacher",
            options="kd_openai.options:OpenAIOptions",
            summary="a language model behind an OpenAI-compatible server: vLLM, `transformers serve`, hosted services",
            tags=("text", "text-teacher", "language-model", "black-box"),
        )
    ]
