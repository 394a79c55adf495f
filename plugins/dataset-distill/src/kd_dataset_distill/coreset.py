"""Selection: a small part of the real data, by chance, by embeddings, by perplexity or by influence.

Sources: Welling 2009 (herding); Xia et al. 2024 (LESS, arXiv 2402.04333). For all kinds of samples and tasks.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_dataset_distill.artifact import WriteData, selection
from kd_dataset_distill.evaluation import groups, select, train_networks
from kd_dataset_distill.less import Influence, WarmUp
from kd_dataset_distill.options import CoresetOptions
from kdcore import FitStage, Method, Roles, Run, Stage
from kdcore.data import IGNORE, derive_seed, to_device
from kdcore.errors import DataError, ModelError, RecipeError
from kdcore.models import Batch


class Coreset(Method):
    """Stages: with `less` first `warm-up` and `influence`; then `select`, `data`, and a stage per network trained on
    each set. The ablation selects at random."""

    roles = Roles(teachers=None, students=None)
    ablation: Mapping[str, Any] = {"method.select": "random", "method.baselines": []}
    cut: Mapping[str, Any] = {"method.eval_networks": 1, "method.baselines": []}
    options: CoresetOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `RecipeError` or `DataError` where the selection lacks a teacher, labels or a split."""
        o = self.options
        if o.select == "perplexity" and "teacher" not in (*run.recipe.teachers, *run.given.get("teachers", {})):
            raise RecipeError("method.select=perplexity: name the language model that reads the samples (`teacher:`)")
        size = run.data.size("train")
        if size is None:
            raise DataError("coreset reads the training data at random, and this is a stream: set `streaming: false`")
        if o.fraction is not None and round(o.fraction * size) < 1:
            raise DataError(f"method.fraction: {o.fraction} of {size} training samples is none at all; raise it")
        scores = None
        if o.select == "less":
            warm = yield WarmUp(run, o)
            scores = (yield Influence(warm, o))["scores"]
        found = yield Select(o, scores)
        rows = yield WriteData(lambda: columns(run, found["index"]), o, run.data.task)
        yield from train_networks(run, o, rows)


class Select(FitStage):
    """The positions of the samples that are kept.

    Args:
        options: of the method.
        scores: of all training samples `[N]`, where a stage before has them.
    """

    name = "select"

    def __init__(self, options: CoresetOptions, scores: Tensor | None = None) -> None:
        self.options, self.scores = options, scores

    def fit(self, run: Run) -> dict[str, Tensor]:
        """`index` `[K]`, and `scores` `[N]` where the selection goes by any: the larger are kept."""
        o = self.options
        rows, count = [torch.arange(run.data.size("train") or 0)], o.ipc
        if o.fraction is not None:
            count = round(o.fraction * len(rows[0]))
        else:
            rows = groups(run.data, "coreset")
        if o.select == "perplexity":
            self.scores = _kept_first(perplexities(run), o.keep)
        if self.scores is None:
            return {"index": select(run, o.select, rows, count, derive_seed(run.seed, self.name))}
        scores = self.scores.cpu()
        return {"index": torch.cat([row[scores[row].argsort(descending=True, stable=True)[:count]] for row in rows]),
                "scores": scores}  # fmt: skip


def perplexities(run: Run) -> Tensor:
    """The perplexity of each training sample to the teacher, a language model, `[N]`.

    Raises:
        ModelError: if the teacher gives no logits over tokens.
        DataError: if the samples have no tokens.
    """
    teacher, found = run.teacher.freeze().to(run.device), []
    with torch.no_grad(), run.accelerator.autocast():
        for batch in run.data.eval_loader("train", run.recipe.train.eval_batch_size or 64):
            batch = to_device(batch, run.device)
            if "input_ids" not in batch:
                raise DataError(f"perplexity needs tokens (`input_ids`); the samples have: {', '.join(batch)}")
            logits = teacher(batch).need("logits").float()
            if logits.ndim != 3:
                raise ModelError(
                    "perplexity needs a teacher that predicts tokens (`head: causal-lm`); this one gives logits "
                    f"of shape {list(logits.shape)}"
                )
            found.append(perplexity(logits, next_tokens(batch)).cpu())
    return torch.cat(found)


def perplexity(logits: Tensor, labels: Tensor) -> Tensor:
    """`exp` of the mean cross-entropy of each sample's tokens `[B]`; logits `[B, T, V]`, labels `[B, T]` aligned."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORE)
    return (losses.sum(1) / (labels != IGNORE).sum(1).clamp(min=1)).exp()


def next_tokens(batch: Batch) -> Tensor:
    """What each position is to predict `[B, T]`: the data's `labels`, or else the token that follows."""
    if "labels" in batch:
        labels: Tensor = batch["labels"]
        return labels
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids))
    following = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
    return F.pad(following, (0, 1), value=IGNORE)


def _kept_first(perplexity: Tensor, keep: str) -> Tensor:
    """Scores by which those to keep are the largest."""
    if keep == "middle":
        return -(perplexity - perplexity.median()).abs()
    return perplexity if keep == "high" else -perplexity


def columns(run: Run, index: Tensor) -> dict[str, Any]:
    """The small data set as columns: positions in the training split, labels, and texts for who opens it."""
    found: dict[str, Any] = dict(selection(run.data, index).to_dict())
    samples = [run.data["train"][i] for i in index[:1].tolist()]
    if isinstance(samples[0], Mapping) and isinstance(samples[0].get("text"), str):
        found["text"] = [run.data["train"][i]["text"] for i in index.tolist()]
    return found
