"""A teacher that reads with another tokenizer than the student.

Sources: Boizard et al. 2024, "Towards Cross-Tokenizer Distillation" (arXiv 2402.12030); the alignment by pieces of text
follows the idea of general on-policy logit distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_llm_kd_suite import functional
from kd_llm_kd_suite.chunked import mean_over_tokens
from kd_llm_kd_suite.losses import ULD, next_token
from kd_llm_kd_suite.options import SuiteOptions, ULDOptions
from kd_llm_kd_suite.stages import StudentStage
from kdcore import Outputs
from kdcore.data import IGNORE, DataModule
from kdcore.errors import ModelError
from kdcore.generation import join_rows, split_rows
from kdcore.models import Batch, Model

Spans = list[tuple[int, int]]
"""Where each token of a text begins and ends, in characters."""


class TwoTokenizers(StudentStage):
    """Language modelling on the student's tokens, and sorted probabilities against the teacher's on the same text.

    Args:
        student: its tokens are the data's.
        teacher: with a tokenizer of its own.
        options: of the suite; the algorithm is `uld` or `span-uld`.
        data: what is drawn from.
        name: the stage's name.

    Raises:
        ModelError: if a model comes without its tokenizer.
    """

    def __init__(self, student: Model, teacher: Model, options: SuiteOptions, data: DataModule,
                 name: str = "distill") -> None:  # fmt: skip
        super().__init__(student, options, name)
        self.data = data
        self.frozen = {"teacher": teacher.freeze()}
        self.uld = ULD(ULDOptions(top=options.top))
        self.ours, self.theirs = student.tokenizer or data.task.tokenizer, teacher.tokenizer
        for role, tokenizer in (("student", self.ours), ("teacher", self.theirs)):
            if not callable(tokenizer):
                raise ModelError(f"{options.algorithm} reads texts with both tokenizers, and the {role} has none of "
                                 "transformers: save it into the model's folder")  # fmt: skip
        pairs = _common(self.ours, self.theirs) if options.algorithm == "span-uld" else []
        self.register_buffer("common", torch.tensor(pairs, dtype=torch.long).view(-1, 2), persistent=False)

    def before_step(self, batches: list[Batch]) -> None:
        """Lay the teacher's tokens of the same texts beside the student's."""
        for batch in batches:
            batch["teacher"], batch["groups"] = self._translated(batch)

    def prepare(self, batch: Batch) -> None:
        """As in a step."""
        self.before_step([batch])
        super().prepare(batch)

    def _translated(self, batch: Batch) -> tuple[Batch, list[Any]]:
        """The teacher's batch, and for each row which tokens of both sides cover the same pieces of text."""
        prompts, answers, groups = [], [], []
        for prompt, answer in zip(*split_rows(batch), strict=True):
            ended = answer[-1] == self.ours.eos_token_id
            said = answer[:-1] if ended else answer
            text = _decode(self.ours, said)
            encoded = self.theirs(text, add_special_tokens=False)["input_ids"]
            pairs = functional.align(_spans(self.ours, said), _spans(self.theirs, encoded))
            if ended and self.theirs.eos_token_id is not None:
                pairs = [*pairs, ((len(said), len(said) + 1), (len(encoded), len(encoded) + 1))]
                encoded = [*encoded, self.theirs.eos_token_id]
            before = self.theirs(_decode(self.ours, prompt))["input_ids"] or [self.theirs.bos_token_id or 0]
            prompts.append(before)
            answers.append(encoded)
            groups.append(pairs)
        return join_rows(prompts, answers, {"input_ids": batch["input_ids"], "index": batch["index"]}), groups

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The terms `sft` and `uld`."""
        student: Outputs = self.student(batch)
        with torch.no_grad():
            teacher: Outputs = self.frozen["teacher"](batch["teacher"])
        sft = mean_over_tokens(next_token, student, None, batch["labels"])
        terms = {"sft": (self.options.sft_weight or 1.0) * sft}
        if self.options.algorithm == "uld":
            return {**terms, "uld": self.uld(student, teacher, {**batch, "teacher_labels": batch["teacher"]["labels"]})}
        return {**terms, "uld": self._spanned(student.need("logits"), teacher.need("logits"), batch)}

    def _spanned(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Mean over the pieces of text of the batch."""
        ours, theirs = batch["labels"], batch["teacher"]["labels"]
        values, common = [], self.get_buffer("common")
        for row, groups in enumerate(batch["groups"]):
            mine, his = ours[row] != IGNORE, theirs[row] != IGNORE
            pair = (student[row][mine], teacher[row][his], ours[row][mine], theirs[row][his])
            values.append(functional.span_uld(*pair, groups, common=common, top=self.options.top))
        rows = torch.cat(values)
        return rows.sum() / max(len(rows), 1)

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Tokens for language modelling; pairs of tokens, or pieces of text, for the teacher."""
        ours, theirs = batch["labels"] != IGNORE, batch["teacher"]["labels"] != IGNORE
        pairs = torch.minimum(ours.sum(1), theirs.sum(1)).sum()
        pieces = torch.tensor(sum(map(len, batch["groups"])), device=pairs.device)
        return {"sft": ours.sum(), "uld": pairs if self.options.algorithm == "uld" else pieces}


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def _spans(tokenizer: Any, ids: list[int]) -> Spans:
    ends = functional.token_ends(lambda some: _decode(tokenizer, some), ids)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _common(ours: Any, theirs: Any) -> list[tuple[int, int]]:
    """The tokens that both vocabularies hold as the same string, by their numbers."""
    other = theirs.get_vocab()
    return [(index, other[token]) for token, index in sorted(ours.get_vocab().items()) if token in other]
