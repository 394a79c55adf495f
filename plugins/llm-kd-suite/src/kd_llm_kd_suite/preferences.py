"""Training on ranked answers: DPO, RRHF, PRO; a reward model, and the policy that it rewards.

Sources: Rafailov et al. 2023 (DPO, arXiv 2305.18290), Yuan et al. 2023 (RRHF, arXiv 2304.05302), Song et al. 2023 (PRO,
arXiv 2306.17492), Ouyang et al. 2022 (reward models, arXiv 2203.02155).
"""

from __future__ import annotations

import copy
import math

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from kd_llm_kd_suite import functional
from kd_llm_kd_suite.options import SuiteOptions
from kd_llm_kd_suite.stages import StudentStage
from kdcore import Outputs, TrainStage
from kdcore.data import IGNORE, DataModule
from kdcore.errors import DataError
from kdcore.generation import Sampler, respond
from kdcore.models import Batch, Model
from kdcore.processes import world_size


def ranked_rows(batch: Batch) -> tuple[Batch, int]:
    """The answers `[B * K, T]` of ranked ones `[B, K, T]`, as a batch of a language model, and K.

    Raises:
        DataError: if the data holds no ranked answers.
    """
    if "ranked_input_ids" not in batch:
        raise DataError("there are no ranked answers in the data: give columns `chosen` and `rejected`, or let the "
                        "teacher rank the student's own (`elicit: feedback`)")  # fmt: skip
    rows = {key: batch[f"ranked_{key}"].flatten(0, 1) for key in ("input_ids", "attention_mask", "labels")}
    return rows, batch["ranked_input_ids"].shape[1]


class Preferences(StudentStage):
    """A student learns which of several answers is better.

    Args:
        student: the policy; DPO holds it against a frozen copy of how it began.
        options: of the suite.
        data: with ranked answers.
        name: the stage's name.
    """

    def __init__(self, student: Model, options: SuiteOptions, data: DataModule, name: str = "distill") -> None:
        super().__init__(student, options, name)
        self.data = data
        if options.algorithm == "dpo":
            self.frozen = {"reference": copy.deepcopy(student).freeze()}

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The terms of the algorithm."""
        rows, several = ranked_rows(batch)
        sums, counts = self._logprobs(self.student, rows)
        if self.options.algorithm == "dpo":
            with torch.no_grad():
                theirs = self._logprobs(self.frozen["reference"], rows)[0].view(-1, several)
            ours = sums.view(-1, several)
            return {"dpo": functional.dpo(ours[:, 0], ours[:, -1], theirs[:, 0], theirs[:, -1],
                                          beta=self.options.dpo_beta)}  # fmt: skip
        means = (sums / counts.clamp(min=1)).view(-1, several)
        rank = functional.rrhf if self.options.algorithm == "rrhf" else functional.pro
        best = functional.best_nll(sums.view(-1, several), counts.view(-1, several))
        return {self.options.algorithm: rank(means), "sft": best}

    def _logprobs(self, model: nn.Module, rows: Batch) -> tuple[Tensor, Tensor]:
        """Sums over the answers' tokens, and how many there are: `[B * K]` each."""
        outputs: Outputs = model(rows)
        found: tuple[Tensor, Tensor] = functional.sequence_logprobs(outputs.need("logits"), rows["labels"])
        return found

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Ranks count prompts; the language-model loss counts the tokens of the best answers."""
        return {"sft": (batch["ranked_labels"][:, 0] != IGNORE).sum()}


class RewardModel(TrainStage):
    """A language model's body and a linear layer on the last token, trained to prefer the better answer.

    Args:
        model: whose body it takes, copied; it must give hidden states.
        data: with ranked answers.
    """

    find_unused_parameters = True  # the head of the body

    def __init__(self, model: Model, data: DataModule, name: str = "reward") -> None:
        super().__init__(name)
        self.body, self.data = copy.deepcopy(model), data
        self.score = nn.LazyLinear(1)

    def rewards(self, rows: Batch) -> Tensor:
        """`[N]` for rows of prompt and answer."""
        hidden = self.body(rows).need("embedding")
        last = rows["attention_mask"].sum(1) - 1
        value: Tensor = self.score(hidden[torch.arange(len(hidden), device=hidden.device), last].float())
        return value.squeeze(1)

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """How far the best answer is above the worst."""
        rows, several = ranked_rows(batch)
        values = self.rewards(rows).view(-1, several)
        return {"reward": functional.reward_model_loss(values[:, 0], values[:, -1])}


class Policy(StudentStage):
    """REINFORCE on a reward model, with the mean over the whole batch as baseline, and a KL to where the student began.

    Args:
        student: the policy.
        reward: the trained reward model.
        options: of the suite.
        seed: of the run.
        sampler: who writes, where it is not the student in this process.
    """

    def __init__(self, student: Model, reward: RewardModel, options: SuiteOptions, seed: int,
                 sampler: Sampler | None = None, name: str = "distill") -> None:  # fmt: skip
        super().__init__(student, options, name, seed, sampler)
        reward.requires_grad_(False)
        self.judge = [reward]  # in a list, so that it is not registered
        self.frozen = {"reference": copy.deepcopy(student).freeze()}

    def before_step(self, batches: list[Batch]) -> None:
        """Put answers of the student in the place of the data's, with their rewards and the mean of these."""
        self.sampler.follow(self.student, self.progress.step)
        was_training = self.student.training
        self.student.eval()
        for batch in batches:
            made = respond(self.sampler, batch, self.options.sampling, self.run_seed, self.name, self.progress.step)
            batch.update(made)
            batch["reward"] = self._rewards(batch)
        self.student.train(was_training)
        rewards = [value for batch in batches for value in batch["reward"].tolist()]
        rewards = gather_object(rewards) if world_size() > 1 else rewards
        for batch in batches:
            batch["baseline"] = torch.tensor(math.fsum(rewards) / len(rewards), device=batch["reward"].device)

    @torch.no_grad()
    def _rewards(self, batch: Batch) -> Tensor:
        """Of each answer `[B]`, less the KL."""
        labels = batch["labels"]
        reward = self.judge[0].to(labels.device).eval().rewards(batch)
        ours, theirs = (functional.token_logprobs(model(batch).need("logits"), labels)
                        for model in (self.student, self.frozen["reference"]))  # fmt: skip
        return functional.penalised_reward(ours, theirs, reward, labels != IGNORE, beta=self.options.kl_beta)

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The term `policy`: the KL is part of the reward."""
        labels = batch["labels"]
        logprobs = functional.token_logprobs(self.student(batch).need("logits"), labels)
        reward = batch.get("reward", torch.zeros(len(labels), device=labels.device))  # none while adapters are made
        return {"policy": functional.reinforce(logprobs, logprobs.detach(), reward, labels != IGNORE, beta=0.0,
                                               baseline=batch.get("baseline"))}  # fmt: skip
