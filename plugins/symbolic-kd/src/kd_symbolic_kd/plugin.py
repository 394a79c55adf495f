"""Hooks of kd-symbolic-kd."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdcore import Component, Paper, hookimpl

PAPER = Paper(
    "Symbolic Knowledge Distillation: from General Language Models to Commonsense Models",
    "Peter West, Chandra Bhagavatula, Jack Hessel, Jena Hwang, Liwei Jiang, Ronan Le Bras, Ximing Lu, Sean Welleck, "
    "Yejin Choi",
    "NAACL",
    2022,
    "2110.07178",
    "https://github.com/peterwestai2/symbolic-knowledge-distillation",
)
TAGS = ("text", "causal-lm", "knowledge-graph", "black-box", "text-teacher", "generated-data")


@hookimpl
def kd_register_data() -> list[Component]:
    summary = "triples of head, relation and tail from files, labelled ones for a critic among them"
    return [Component("data", "triples", "kd_symbolic_kd.data:triples", "kd_symbolic_kd.options:TriplesOptions",
                      summary, ("text", "causal-lm", "knowledge-graph")),
            Component("data", "toy-world", "kd_symbolic_kd.world:world", "kd_symbolic_kd.options:WorldOptions",
                      "triples of a world whose truth is known", ("text", "causal-lm", "knowledge-graph"))]  # fmt: skip


@hookimpl
def kd_register_teachers() -> list[Component]:
    return [Component("teacher", "scripted-world", "kd_symbolic_kd.world:ScriptedWorld",
                      "kd_symbolic_kd.options:ScriptedWorldOptions", "a script that tells of the toy world",
                      ("text", "text-teacher"))]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    summary = "a teacher writes a knowledge graph from few-shot prompts, a critic filters it, a student learns it"
    return [Component("method", "symbolic-kd", "kd_symbolic_kd.method:SymbolicKD",
                      "kd_symbolic_kd.options:SymbolicKDOptions", summary, TAGS, PAPER)]  # fmt: skip


@hookimpl
def kd_evaluated(run: Any, stage: Any, metrics: Mapping[str, float]) -> None:
    if judge := getattr(stage, "judge_evaluation", None):  # a critic keeps its best weights and stops early
        judge(run, metrics)
