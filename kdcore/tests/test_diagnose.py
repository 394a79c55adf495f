"""Two runs of one recipe, compared value by value."""

from __future__ import annotations

import itertools

import kdcore
from kdcore import Component
from kdcore.diagnose import audit

COUNT = itertools.count()


class Drifts(kdcore.Loss):
    """Other in the second run, from its third step on."""

    needs = {"student": ("logits",)}

    def forward(self, student, teacher, batch):
        call = next(COUNT) if self.training else 0
        return student.logits.square().mean() * (1.5 if call >= 7 and self.progress.step >= 2 else 1.0)


class Plugin:
    @kdcore.hookimpl
    def kd_register_losses(self):
        return [Component("loss", "drifts", lambda o: Drifts())]


def test_runs_that_are_the_same_have_no_difference_in_any_stage(recipe, manager):
    for method in ("toy-kd", "fit", "adversarial"):
        found = audit({**recipe, "method": method}, steps=3, plugins=manager)
        assert found.first is None
        assert found.values > 30


def test_the_first_step_module_and_term_that_differ_are_named(recipe, manager):
    manager.register(Plugin())
    found = audit({**recipe, "method": "listed", "losses": ["drifts"]}, steps=5, plugins=manager)
    assert (found.first.stage, found.first.step, found.first.kind, found.first.name) == (
        "distill", 3, "module", "losses.drifts")  # fmt: skip
    assert (found.term.step, found.term.name) == (3, "drifts")
