"""MGSR: texts of the student revised as sequences, by token and by span.

Source: Liu et al. 2024, "Multi-Granularity Semantic Revision for Large Language Model Distillation" (arXiv 2407.10068).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from kd_llm_kd_suite.losses import Divergence, NextToken
from kd_llm_kd_suite.method import answers, check_causal, sampler, warm_up
from kd_mgsr_llm.losses import DACKL, SpanCorrelation
from kd_mgsr_llm.options import MGSROptions, SpanOptions
from kd_mgsr_llm.stages import RevisedDistill
from kdcore import Method, Roles, Run, Stage
from kdcore.errors import ModelError
from kdcore.losses import Weighted


class MGSR(Method):
    """A warm-up if asked for, the distillation, and answers to held-out prompts.

    The ablation is the forward KL, with the language-model loss, on the same schedule of texts.
    """

    roles = Roles(teachers=("teacher",), splits=("train",))
    stage_names = ("warm-up", "distill", "answers")
    ablation = {"method.scrg": "false", "method.dac": "false", "method.span": "false"}
    options: MGSROptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages."""
        o = self.options
        self._check(run)
        yield from warm_up(run, o)
        gold = [Weighted(NextToken(), o.sft_weight, "sft")] if o.sft_weight else []
        yield RevisedDistill(run.student, run.teacher, self.losses(), gold, o, run.seed, sampler(run))
        yield from answers(run, o, run.teacher)

    def losses(self) -> list[Weighted]:
        """The terms on every text."""
        o, found = self.options, []
        if o.dac_weight:
            term = DACKL(o.clipping) if o.dac else Divergence("fkl")
            found.append(Weighted(term, o.dac_weight, "dac-kl" if o.dac else "fkl"))
        if o.span and o.span_weight:
            options = SpanOptions(metric=o.span_metric, chunker=o.chunker)
            found.append(Weighted(SpanCorrelation(options), o.span_weight, "span"))
        return found

    def _check(self, run: Run) -> None:
        """Refuse what would fail late."""
        check_causal(run, "mgsr-llm")
        if self.options.student_data_fraction and not run.student.writes:
            raise ModelError("mgsr-llm lets the student write, and students.student writes no tokens: take a causal "
                             "language model of transformers, or set `method.student_data_fraction: 0`")  # fmt: skip
