"""MiniLLM: the reverse KL of whole texts, minimised by policy gradients.

Source: Gu et al. 2024, "MiniLLM: Knowledge Distillation of Large Language Models" (arXiv 2306.08543), section 2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kd_llm_kd_suite import functional
from kd_llm_kd_suite.losses import Divergence, NextToken
from kd_llm_kd_suite.options import SuiteOptions
from kd_llm_kd_suite.stages import StudentStage
from kd_llm_kd_suite.texts import Buffer
from kdcore import Outputs
from kdcore.data import IGNORE
from kdcore.generation import Sampler, join_rows, row_seeds, split_rows
from kdcore.models import Batch, Model


class MiniLLM(StudentStage):
    """Texts are drawn from a mixture of student and teacher, and used for several steps.

    A text's tokens are rewarded by `log p(y_t) - log q(y_t)`. The objective is the clipped policy gradient on the
    returns, the exact reverse KL of every position in their place for the first step of each return, and, on the data's
    texts, language modelling and distillation.

    Args:
        student: the policy `q`.
        teacher: `p`.
        options: of the suite.
        seed: of the run.
        sampler: who writes, where it is not the student in this process.
        name: the stage's name.
    """

    def __init__(self, student: Model, teacher: Model, options: SuiteOptions, seed: int,
                 sampler: Sampler | None = None, name: str = "distill") -> None:  # fmt: skip
        super().__init__(student, options, name, seed, sampler)
        self.frozen = {"teacher": teacher.freeze()}
        self.buffer = Buffer(2**31)
        self.next_token, self.forward_kl, self.reverse_kl = NextToken(), Divergence("fkl"), Divergence("rkl")

    @property
    def teacher(self) -> Model:
        """The frozen teacher."""
        found: Any = self.frozen["teacher"]
        return found  # type: ignore[no-any-return]

    def before_step(self, batches: list[Batch]) -> None:
        """Write texts in the first of every `inner_epochs` steps; in all of them, lay texts beside the data's."""
        if self.progress.step % self.options.inner_epochs == 0:
            self.buffer.rows = []
            self.sampler.follow(self.student, self.progress.step)
            for batch in batches:
                self.buffer.push(self._rollouts(batch))
            self._whiten()
        mine = [row for row in self.buffer.rows if row["rank"] == _rank()]
        for batch in batches:
            size = len(batch["index"])
            batch["rollout"], mine = self._laid_out(mine[:size], batch), mine[size:]

    def _rollouts(self, batch: Batch) -> list[dict[str, Any]]:
        """New texts, with the log-probabilities of their tokens and their returns."""
        o = self.options
        prompts, _ = split_rows(batch)
        seeds = row_seeds(batch, self.run_seed, self.name, self.progress.step)
        mix = (self.teacher, o.mix_alpha) if o.mix_alpha else None
        answers = self.sampler.write(prompts, o.sampling, seeds, mix=mix)
        rows = join_rows(prompts, answers, batch)
        mask = rows["labels"] != IGNORE
        was_training = self.student.training
        self.student.eval()
        with torch.no_grad():
            ours, theirs = (functional.token_logprobs(model(rows).need("logits"), rows["labels"])
                            for model in (self.student, self.teacher))  # fmt: skip
        self.student.train(was_training)
        rewards = functional.rewards(ours, theirs, clip=o.reward_clip, scaling=o.reward_scaling)
        returns = functional.returns(rewards, mask, gamma=o.gamma, length_norm=o.length_norm)
        shares = math.log1p(-o.mix_alpha), math.log(o.mix_alpha or 1)
        drawn = torch.logaddexp(ours + shares[0], theirs + shares[1]) if o.mix_alpha else ours
        columns = {"old": ours, "drawn": drawn, "advantage": returns}
        return [{"rank": _rank(), "prompt": prompt, "answer": answer,
                 **{name: values[i][mask[i]].tolist() for name, values in columns.items()}}
                for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))]  # fmt: skip

    def _whiten(self) -> None:
        """Advantages over all texts with mean 0 and variance 1."""
        flat = torch.tensor([x for row in self.buffer.rows for x in row["advantage"]])
        white = functional.whiten(flat, torch.ones_like(flat, dtype=torch.bool)).tolist()
        for row in self.buffer.rows:
            row["advantage"], white = white[: len(row["answer"])], white[len(row["answer"]) :]

    def _laid_out(self, rows: list[dict[str, Any]], like: Batch) -> Batch:
        """Rows as a batch, with `old`, `drawn` and `advantage` `[B, T]`, aligned with the labels."""
        made = join_rows([row["prompt"] for row in rows], [row["answer"] for row in rows],
                         {"input_ids": like["input_ids"], "index": like["index"]})  # fmt: skip
        mask = made["labels"] != IGNORE
        for column in ("old", "drawn", "advantage"):
            values = torch.tensor([x for row in rows for x in row[column]], device=mask.device)
            made[column] = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, values)
        return made

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The terms `policy`, `single-step`, `lm` and `kd`."""
        o, rows = self.options, batch.get("rollout")
        if rows is None:  # while adapters are made: there are no texts yet
            return {"lm": self.next_token(self.student(batch), Outputs(), batch)}
        mask = rows["labels"] != IGNORE
        with torch.no_grad():
            theirs, told = self.teacher(rows), self.teacher(batch)
        ours = self.student(rows)
        logprobs = functional.token_logprobs(ours.need("logits"), rows["labels"])
        importance = (rows["old"] - rows["drawn"]).exp()
        policy = functional.clipped_policy_loss(logprobs, rows["old"], rows["advantage"], mask, cliprange=o.cliprange,
                                                importance=importance)  # fmt: skip
        single = self.reverse_kl(ours, theirs, rows)
        text = self.student(batch)
        lm, kd = self.next_token(text, told, batch), self.forward_kl(text, told, batch)
        return {"policy": policy, "single-step": single, "lm": (1 - o.kd_ratio) * lm, "kd": o.kd_ratio * kd}

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Tokens of the written texts, and of the data's."""
        text = (batch["labels"] != IGNORE).sum()
        written = (batch["rollout"]["labels"] != IGNORE).sum() if "rollout" in batch else text
        return {"policy": written, "single-step": written, "lm": text, "kd": text}


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
