"""Generative synthesis: a text teacher writes samples of each class, and what a critic doubts is left out.

Source: Fang et al. 2025, "Knowledge Distillation and Dataset Distillation of Large Language Models" (arXiv 2504.14772),
sections on generative distillation and selection.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kd_dataset_distill.artifact import WriteData
from kd_dataset_distill.evaluation import train_networks
from kd_dataset_distill.generator import Text
from kd_dataset_distill.networks import architectures, draw
from kd_dataset_distill.options import SynthesizeOptions
from kd_dataset_distill.real import class_rows
from kd_dataset_distill.texts import Seen, as_columns, learner_batch, nearest, read_text
from kdcore import Method, Roles, Run, Stage
from kdcore.data import derive_seed, to_device
from kdcore.errors import DataError, RecipeError, RunFailed
from kdcore.generate import GenerateStage

Row = dict[str, Any]


class Synthesize(Method):
    """Stages: `write`, `data`, then a stage per network trained on each set. The ablation asks no critic."""

    roles = Roles(teachers=None, students=None)
    ablation: Mapping[str, Any] = {"method.confidence": 0, "method.baselines": []}
    cut: Mapping[str, Any] = {
        "method.ipc": 2,
        "method.confidence": 0.05,
        "method.eval_networks": 1,
        "method.baselines": [],
    }
    options: SynthesizeOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `DataError` for another task than a classification of texts, `RecipeError` where the
        critic is missing, `ModelError` for a teacher that does not write."""
        o = self.options
        rows = questions(run, o)
        if o.confidence and "critic" not in run.recipe.teachers:
            raise RecipeError(
                "method.confidence: name the classifier that judges the texts (`teachers.critic:`), such as one "
                "trained on the real data (`train: true`)"
            )
        seen = Seen(run.data)
        filters = {"in another split": lambda found: [seen.new((row["answer"].strip(), None)) for row in found]}
        if o.confidence:
            filters["doubted"] = lambda found: (confidences(run, found) >= o.confidence).tolist()
        corpus = yield GenerateStage("write", run.text_teacher(), rows, o.prompt, o.sampling, filters=filters)
        small = yield WriteData(lambda: kept(run, corpus, o), o, run.data.task)
        yield from train_networks(run, o, small)


def questions(run: Run, options: SynthesizeOptions) -> list[Row]:
    """A row per prompt: `label` (the class's name), `class` (its number), `examples` (real texts of the class).

    Raises:
        DataError: if the classes have no names, or there are no texts.
    """
    data = run.data
    groups = class_rows(data, "synthesize")
    if not data.task.classes:
        raise DataError("synthesize asks for texts on classes by their names, and the data's have none: set `classes:`")
    read_text(data["train"][0], data.task.tokenizer)
    rows = []
    for number, (name, group) in enumerate(zip(data.task.classes, groups, strict=True)):
        for turn in range(options.ipc * options.over_generate):
            shown = _examples(run, group, options.examples, number, turn)
            rows.append({"label": name, "class": number, "examples": shown})
    return rows


def _examples(run: Run, group: Tensor, count: int, number: int, turn: int) -> list[str]:
    rng = random.Random(derive_seed(run.seed, "examples", number, turn))
    chosen = rng.sample(group.tolist(), min(count, len(group)))
    return [read_text(run.data["train"][i], run.data.task.tokenizer)[0] for i in chosen]


def confidences(run: Run, rows: Sequence[Row]) -> Tensor:
    """The probability `[N]` that the critic gives each answer's class."""
    critic, found = run.model("critic").freeze().to(run.device), []
    for first in range(0, len(rows), 256):
        part = rows[first : first + 256]
        labels = [row["class"] for row in part]
        batch = learner_batch(run.data, [(row["answer"].strip(), None) for row in part], labels)
        with torch.no_grad():
            logits = critic(to_device(batch, run.device)).need("logits")
        found.append(logits.float().softmax(1).cpu()[torch.arange(len(part)), torch.tensor(labels)])
    return torch.cat(found)


def kept(run: Run, corpus: Any, options: SynthesizeOptions) -> Row:
    """The texts of each class that make the small data set, as columns.

    Raises:
        RunFailed: if a class has too few.
    """
    found: list[tuple[Text, int]] = []
    for number, name in enumerate(run.data.task.classes):
        texts: list[Text] = [(row["answer"].strip(), None) for row in corpus if row["class"] == number]
        if len(texts) < options.ipc:
            raise RunFailed(
                f"only {len(texts)} answers for the class {name!r} are left, and method.ipc asks for {options.ipc}; "
                "raise method.over_generate, or lower method.confidence"
            )
        if options.diversity == "k-centers":
            texts = nearest(run, draw(run, architectures(run)[0], "selection"), texts, number, options.ipc)
        found += [(text, number) for text in texts[: options.ipc]]
    return as_columns(found)
