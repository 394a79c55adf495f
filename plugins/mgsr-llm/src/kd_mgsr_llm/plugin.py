"""Hooks of kd-mgsr-llm."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper(
    "Multi-Granularity Semantic Revision for Large Language Model Distillation",
    "Xiaoyu Liu, Yun Zhang, Wei Li, Simiao Li, Xudong Huang, Hanting Chen, Yehui Tang, Jie Hu, Zhiwei Xiong, "
    "Yunhe Wang",
    "arXiv preprint",
    2024,
    "2407.10068",
)
TAGS = ("text", "causal-lm", "language-model", "logits")


@hookimpl
def kd_register_losses() -> list[Component]:
    """The divergence with a clipped teacher, and the agreement inside phrases."""
    return [
        Component("loss", "dac-kl", "kd_mgsr_llm.losses:DACKL", "kd_mgsr_llm.options:DACOptions",
                  "forward KL from a teacher clipped between two levels that a small network sets", TAGS, PAPER),
        Component("loss", "span-correlation", "kd_mgsr_llm.losses:SpanCorrelation", "kd_mgsr_llm.options:SpanOptions",
                  "products of neighbouring next-token distributions inside phrases", TAGS, PAPER),
    ]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """Revision of sequences, tokens and spans."""
    return [Component("method", "mgsr-llm", "kd_mgsr_llm.method:MGSR", "kd_mgsr_llm.options:MGSROptions",
                      "a language model distilled on its own texts, corrected, with clipped tokens and spans",
                      (*TAGS, "on-policy"), PAPER)]  # fmt: skip
