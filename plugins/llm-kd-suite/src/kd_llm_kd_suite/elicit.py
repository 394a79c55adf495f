"""What a model in this process is asked for before the training: answers, several of them, and which are better.

Source: Xu et al. 2024, "A Survey on Knowledge Distillation of Large Language Models" (arXiv 2402.13116), section 3:
labeling, feedback, self-knowledge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from kd_llm_kd_suite import functional
from kdcore import FitStage, Run
from kdcore.data import IGNORE, DataModule, derive_seed, to_device
from kdcore.errors import DataError
from kdcore.generate import GenerateStage
from kdcore.generation import join_rows, split_rows
from kdcore.models import Batch, Model
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt, TextTeacher

AT_ONCE = 32
"""Rows that are read or scored together."""
RANKED = {"ranked_input_ids": 0, "ranked_attention_mask": 0, "ranked_labels": IGNORE}
"""Batch keys of ranked answers, and what shorter ones are filled up with."""

Group = dict[str, Any]
"""`prompt`: tokens; `answers`: lists of tokens."""


class Tokens(TextTeacher):
    """A language model that is asked in tokens: prompts and answers are JSON lists of them."""

    def __init__(self, model: Model, name: str) -> None:
        self.model, self.name = model, name

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Answer]]:
        """`sampling.n` answers to each prompt."""
        contexts = [json.loads(str(prompt)) for prompt in prompts for _ in range(sampling.n)]
        each = [derive_seed(seed, j) for seed in seeds for j in range(sampling.n)]
        written: list[list[int]] = []
        for first in range(0, len(contexts), AT_ONCE):
            part = slice(first, first + AT_ONCE)
            written += self.model.write(contexts[part], sampling, each[part])
        answers = [Answer(json.dumps(tokens), tokens=len(tokens)) for tokens in written]
        return [answers[i : i + sampling.n] for i in range(0, len(answers), sampling.n)]

    def to(self, device: Any) -> Tokens:
        """Move the model; returns itself."""
        self.model.to(device)
        return self


def ask(name: str, run: Run, role: str, sampling: Sampling) -> GenerateStage:
    """A stage in which the model of a role answers the training prompts; its artifact goes into `groups`.

    Raises:
        DataError: if the training data is a stream, or a row has no answer.
    """
    if run.data.size("train") is None:
        raise DataError(f"stage {name!r} asks about every training prompt, and the data is a stream: set streaming to "
                        "false")  # fmt: skip
    rows = [{"number": i, "tokens": prompt} for i, prompt in enumerate(_prompts(run))]
    return GenerateStage(name, Tokens(run.model(role), role), rows, lambda row: json.dumps(row["tokens"]), sampling)


def _prompts(run: Run) -> list[list[int]]:
    return [prompt for batch in run.data.eval_loader("train", AT_ONCE) for prompt in split_rows(batch)[0]]


def groups(corpus: Any) -> list[Group]:
    """The answers of a corpus by prompt, in the order of the prompts."""
    found: dict[int, Group] = {}
    for row in corpus:
        group = found.setdefault(row["number"], {"prompt": row["tokens"], "answers": []})
        group["answers"].append(json.loads(row["answer"]))
    return [found[number] for number in sorted(found)]


class Feedback(FitStage):
    """The teacher scores answers by their mean log-probability per token.

    Args:
        teacher: the model.
        found: prompts and answers.
        name: the stage's name.
    """

    def __init__(self, teacher: Model, found: Sequence[Group], name: str = "feedback") -> None:
        self.teacher, self.found, self.name = teacher, found, name

    def fit(self, run: Run) -> dict[str, Tensor]:
        """`scores`: one for each answer, group after group."""
        self.teacher.to(run.device).eval()
        rows = [(group["prompt"], answer) for group in self.found for answer in group["answers"]]
        scores = []
        with torch.no_grad(), run.accelerator.autocast():
            for first in range(0, len(rows), AT_ONCE):
                prompts, answers = zip(*rows[first : first + AT_ONCE], strict=True)
                batch = to_device(join_rows(prompts, answers), run.device)
                sums, counts = functional.sequence_logprobs(self.teacher(batch).need("logits"), batch["labels"])
                scores.append(sums / counts.clamp(min=1))
        return {"scores": torch.cat(scores)}


def ranked(found: Sequence[Group], scores: Tensor) -> list[Group]:
    """The groups with their answers from the best to the worst; those of equal answers are left out."""
    values = scores.tolist()
    result = []
    for group in found:
        mine = [values.pop(0) for _ in group["answers"]]
        order = sorted(range(len(mine)), key=lambda i: -mine[i])
        answers = [group["answers"][i] for i in order]
        if answers[0] != answers[-1]:
            result.append({"prompt": group["prompt"], "answers": answers})
    if not result:
        raise DataError("feedback: to every prompt the student writes the same answer each time: raise "
                        "`sampling_temperature`")  # fmt: skip
    return result


class Written(Dataset[dict[str, Tensor]]):
    """Rows of prompt and answer as samples of a language model; with `several`, all answers of each prompt, ranked."""

    def __init__(self, found: Sequence[Group], several: bool) -> None:
        self.found, self.several = found, several

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        group = self.found[index]
        answers = group["answers"] if self.several else group["answers"][:1]
        batch = join_rows([group["prompt"]] * len(answers), answers)
        return {f"ranked_{k}": v for k, v in batch.items()} if self.several else {k: v[0] for k, v in batch.items()}


@dataclass(frozen=True)
class Collate:
    """Ranked answers padded to the longest of the batch; all else as the data's own collate has it."""

    data: DataModule

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        """A batch of these samples."""
        if "ranked_input_ids" not in samples[0]:
            return self.data.collate(samples)
        padded = {key: _stacked([sample.pop(key) for sample in samples], value) for key, value in RANKED.items()}
        return {**padded, **(default_collate(samples) if samples[0] else {})}


def _stacked(values: Sequence[Tensor], fill: int) -> Tensor:
    """`[K, T]` each, padded to `[B, K, T]`."""
    flat = pad_sequence([value.T for value in values], batch_first=True, padding_value=fill)
    return flat.transpose(1, 2).contiguous()


def with_train(data: DataModule, found: Sequence[Group], several: bool = False) -> DataModule:
    """The data with these rows as its training split."""
    splits: Mapping[str, Any] = {**data.splits, "train": Written(found, several)}
    return DataModule(splits, data.task, collate=Collate(data), keys=data.keys)
