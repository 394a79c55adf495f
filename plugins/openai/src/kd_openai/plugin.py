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
        ),
        Component(
            "teacher",
            "openai-logprobs",
            target="kd_openai.scoring:served",
            options="kd_openai.options:LogprobsOptions",
            summary="the likeliest tokens of each position, from a language model behind vLLM",
            tags=("text", "language-model"),
        ),
    ]
