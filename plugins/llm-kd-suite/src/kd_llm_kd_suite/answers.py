"""What the student writes in the end: beside the data's answers and the teacher's, and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.text import rouge_score

from kd_llm_kd_suite.losses import Divergence, NextToken
from kdcore import Outputs, Run, Stage
from kdcore.data import IGNORE, to_device
from kdcore.generation import join_rows, row_seeds, split_rows
from kdcore.models import Batch, Model
from kdcore.options import Sampling

METRICS = {"rouge-l": True, "exact-match": True, "divergence": False, "teacher-logprob": True}
"""Whether more of it is better."""


class Answers(Stage):
    """The student, and the teacher if it writes with the same tokens, answer prompts of a split.

    The artifact holds `samples.jsonl` (prompt, the data's answer, the student's, the teacher's) and `metrics.json`:
    ROUGE-L (F-measure) and exact match of the student's texts with the data's, where the data has a tokenizer that
    decodes; the forward KL of teacher to student on the data's answers, in nats per token; and the mean log-probability
    per token that the teacher gives to the student's answers.

    Args:
        student: who answers.
        teacher: whose distribution it is compared with, or `None`.
        sampling: how they write.
        count: prompts, at most.
        split: where they come from.
    """

    name = "answers"

    def __init__(self, student: Model, teacher: Model | None, sampling: Sampling, count: int, split: str) -> None:
        self.student, self.teacher, self.sampling, self.count, self.split = student, teacher, sampling, count, split

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Write, decode, measure."""
        rows, sums = [], torch.zeros(4, dtype=torch.float64)
        models = {"student": self.student, **({"teacher": self.teacher} if self.teacher else {})}
        for model in models.values():
            model.to(run.device).eval()
        size = min(self.count, run.recipe.train.eval_batch_size or run.recipe.train.batch_size)
        for batch in run.data.eval_loader(self.split, size):
            batch = to_device(batch, run.device)
            prompts, answers = split_rows(batch)
            seeds = row_seeds(batch, run.seed, self.name)
            said = {name: m.write(prompts, self.sampling, seeds) for name, m in models.items() if m.writes}
            rows += _told(run.data.task.tokenizer, prompts, {"reference": answers, **said})
            if self.teacher:
                with torch.no_grad(), run.accelerator.autocast():
                    sums += self._compared(self.teacher, batch, join_rows(prompts, said["student"], batch))
            if len(rows) >= self.count:
                break
        divergence, tokens, logprob, written = sums.tolist()
        found = _texts_alike(rows)
        if self.teacher:
            found |= {"divergence": divergence / max(tokens, 1), "teacher-logprob": logprob / max(written, 1)}
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (artifact / "samples.jsonl").write_text(lines, encoding="utf-8")
        (artifact / "metrics.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _compared(self, teacher: Model, batch: Batch, written: Batch) -> Tensor:
        """Sums over tokens, and how many: of the divergence on the data's answers, of the teacher's log-probabilities
        of what the student wrote."""
        count = (batch["labels"] != IGNORE).sum()
        value = Divergence("fkl")(self.student(batch), teacher(batch), batch)
        more = (written["labels"] != IGNORE).sum()
        nll = NextToken()(teacher(written), Outputs(), written)
        return torch.stack([value * count, count, -nll * more, more]).double().cpu()

    def load(self, run: Run, artifact: Path) -> dict[str, float]:
        """The metrics; they become the run's."""
        found: dict[str, float] = json.loads((artifact / "metrics.json").read_text(encoding="utf-8"))
        for name, value in found.items():
            run.add_metric(f"{self.split}/{name}", value, METRICS[name])
        return found


def _texts_alike(rows: list[dict[str, Any]]) -> dict[str, float]:
    """ROUGE-L and exact match of what the student wrote with the data's answers."""
    if not rows or "student" not in rows[0]:
        return {}
    ours, theirs = ([str(row[key]).strip() for row in rows] for key in ("student", "reference"))
    rouge = rouge_score(ours, theirs, rouge_keys="rougeL")["rougeL_fmeasure"]
    return {"rouge-l": float(rouge), "exact-match": sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(rows)}


def _told(tokenizer: Any, prompts: list[list[int]], texts: dict[str, list[list[int]]]) -> list[dict[str, Any]]:
    """Rows of the prompt and the texts after it, decoded."""
    decode = _decoder(tokenizer)
    return [{"prompt": decode(prompt), **{name: decode(each[i]) for name, each in texts.items()}}
            for i, prompt in enumerate(prompts)]  # fmt: skip


def _decoder(tokenizer: Any) -> Any:
    """`tokens -> text`, without special tokens where the tokenizer can leave them out; without one, the numbers."""
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    if callable(tokenizer):
        return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    return lambda ids: tokenizer.decode(ids)
