"""The suite: what is elicited, then what the student learns of it by, then what it writes.

Source: Xu et al. 2024, "A Survey on Knowledge Distillation of Large Language Models" (arXiv 2402.13116).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from kd_llm_kd_suite.answers import Answers
from kd_llm_kd_suite.elicit import Feedback, ask, groups, ranked, with_train
from kd_llm_kd_suite.losses import Divergence, HiddenStates, NextToken
from kd_llm_kd_suite.minillm import MiniLLM
from kd_llm_kd_suite.options import PREFERENCES, HiddenOptions, SuiteOptions, WritingOptions
from kd_llm_kd_suite.preferences import Policy, Preferences, RewardModel
from kd_llm_kd_suite.stages import SequenceDistill
from kd_llm_kd_suite.texts import Schedule
from kd_llm_kd_suite.twotokens import TwoTokenizers
from kdcore import Distill, Method, Roles, Run, Stage
from kdcore.data import DataModule
from kdcore.errors import ModelError, RecipeError
from kdcore.generation import Sampler
from kdcore.losses import Weighted
from kdcore.models import Model

Stages = Generator[Stage, Any, None]

PLAIN = {"fkl": (), "rkl": (), "sym": ("lam",), "jsd": ("beta",), "tvd": (), "sfkl": ("alpha",), "srkl": ("alpha",)}
"""Divergences, and which options they have beside the temperature."""
BEHIND = {"gkd": "jsd", "distillm": "srkl", "hidden": "fkl"}
"""The divergence of algorithms that are more than one."""


class Suite(Method):
    """A language model distilled into a smaller one.

    The ablation is language modelling on the same texts: the student without its teacher.
    """

    roles = Roles(teachers=("teacher",), splits=("train",))
    stage_names = ("warm-up", "labeling", "samples", "feedback", "reward", "distill", "answers")
    ablation = {"method.algorithm": "sft"}
    cut = {"method.lmbda": 0.5, "method.answers": 4}
    options: SuiteOptions

    @property
    def own_tokens(self) -> bool:  # type: ignore[override]
        """Whether the teacher may have another tokenizer than the data."""
        return self.options.algorithm in ("uld", "span-uld")

    def stages(self, run: Run) -> Stages:
        """Fine-tuning if asked for, eliciting if asked for, the algorithm, and answers to held-out prompts."""
        o = self.options
        self._check(run)
        yield from warm_up(run, o)
        data = yield from self._elicited(run)
        if o.algorithm == "rm_rl":
            reward = yield RewardModel(run.student, data)
            yield Policy(run.student, reward, o, run.seed, sampler(run))
        else:
            yield self._distill(run, data)
        yield from answers(run, o, None if self.own_tokens else run.teacher)

    def _check(self, run: Run) -> None:
        """Refuse what would fail late."""
        o = self.options
        check_causal(run, "llm-kd-suite")
        writers = {"student": o.fraction or o.elicit in ("feedback", "self") or o.algorithm in
                   ("distillm", "minillm", "rm_rl"), "teacher": o.elicit == "labeling" or o.algorithm == "seqkd"
                   or o.seq_kd}  # fmt: skip
        for role, needed in writers.items():
            if needed and not run.model(role).writes:
                raise ModelError(f"{o.algorithm} lets the {role} write, and {role}s.{role} writes no tokens: take a "
                                 "causal language model of transformers")  # fmt: skip
        if o.algorithm == "distillm" and "perplexity" not in run.metric_names:
            raise RecipeError("eval.metrics: distillm watches the validation loss: leave perplexity among them")

    def _elicited(self, run: Run) -> Generator[Stage, Any, DataModule]:
        """The data, its training texts written anew where that is asked for."""
        o = self.options
        if o.elicit == "labeling" or o.algorithm == "seqkd":
            return with_train(run.data, groups((yield ask("labeling", run, "teacher", o.sampling))))
        if o.elicit == "none":
            return run.data
        several = o.sampling.model_copy(update={"n": o.candidates})
        found = groups((yield ask("samples", run, "student", several)))
        scores = (yield Feedback(run.teacher, found))["scores"]
        return with_train(run.data, ranked(found, scores), several=o.elicit == "feedback")

    def _distill(self, run: Run, data: DataModule) -> Stage:
        o = self.options
        if o.algorithm in PREFERENCES:
            return Preferences(run.student, o, data)
        if o.algorithm == "minillm":
            return MiniLLM(run.student, run.teacher, o, run.seed, sampler(run))
        if self.own_tokens:
            return TwoTokenizers(run.student, run.teacher, o, data)
        losses = self.losses()
        gold = (1 - o.kd_ratio if losses else 1.0) + o.sft_weight
        stage = SequenceDistill(
            run.student, losses, {"teacher": run.teacher} if losses else None, sampling=o.sampling,
            schedule=self.schedule(), capacity=o.buffer_capacity, seed=run.seed, sampler=sampler(run),
            gold=[Weighted(NextToken(), gold, "sft")] if gold else (),
        )  # fmt: skip
        stage.data = None if data is run.data else data
        return stage

    def losses(self) -> list[Weighted]:
        """The terms that compare student and teacher."""
        o = self.options
        name = BEHIND.get(o.algorithm, o.algorithm)
        if name not in PLAIN:
            return []
        values = {"lam": o.lam, "beta": o.beta, "alpha": o.skew_alpha}
        term = Divergence(name, temperature=o.temperature, **{key: values[key] for key in PLAIN[name]})
        found = [Weighted(term, o.kd_ratio, name)] if o.kd_ratio else []
        if o.algorithm == "hidden":
            found.append(Weighted(HiddenStates(HiddenOptions()), o.hidden_weight, "hidden"))
        return found

    def schedule(self) -> Schedule:
        """Which texts each step is on."""
        o = self.options
        adaptive = o.algorithm == "distillm"
        return Schedule(o.fraction, teacher=o.seq_kd, replay=adaptive or o.policy == "replay", adaptive=adaptive,
                        eps=o.loss_eps)  # fmt: skip


def check_causal(run: Run, method: str) -> None:
    """Refuse data of another kind. Raises `RecipeError`."""
    if run.data.task.kind != "causal-lm":
        raise RecipeError(f"{method} distils language models; the data poses a task of kind {run.data.task.kind!r}: "
                          "set `data.task: causal-lm`")  # fmt: skip


def warm_up(run: Run, options: WritingOptions) -> Stages:
    """Language modelling of the student on the data's texts, if asked for."""
    if options.sft_epochs:
        stage = Distill(run.student, [Weighted(NextToken(), name="sft")], name="warm-up")
        stage.overrides = {"epochs": options.sft_epochs}
        yield stage


def answers(run: Run, options: WritingOptions, teacher: Model | None) -> Stages:
    """The student's answers to held-out prompts, if asked for and if it writes."""
    split = run.recipe.eval.on[0]
    if options.answers and run.student.writes and split in run.data:
        yield Answers(run.student, teacher, options.sampling, options.answers, split)


def sampler(run: Run) -> Sampler | None:
    """The teacher with the role `sampler`, a server say, that writes in the student's place; `None` without one."""
    if "sampler" not in run.recipe.teachers:
        return None
    found: Any = run.model("sampler")
    if not hasattr(found, "write") or not hasattr(found, "follow"):
        raise ModelError("teachers.sampler: it writes no tokens, so it cannot write in the student's place")
    made: Sampler = found
    return made
