"""The method: fit the projector on the teacher's embeddings once, then distil into a widened student.

Source: Loo et al. 2024, "Linear Projections of Teacher Embeddings for Few-Class Distillation" (arXiv 2409.20449).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from kd_lelp.functional import class_logits
from kd_lelp.losses import LELP, make_projector
from kd_lelp.options import LELPOptions
from kd_lelp.projector import SubclassProjector
from kdcore import Distill, FitStage, Method, Outputs, Roles, Run, Stage
from kdcore.data import DataModule, Task, derive_seed, to_device
from kdcore.errors import DataError, ModelError
from kdcore.losses import Weighted

logger = logging.getLogger(__name__)


class LELPMethod(Method):
    """Two stages: `projector`, then `distill`. The ablation, one subclass per class, is plain distillation."""

    roles = Roles(splits=("train",))
    stage_names = ("projector", "distill")
    ablation: Mapping[str, Any] = {"method.subclasses": 1}
    options: LELPOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `DataError` where samples do not have one class each."""
        if run.data.task.kind != "classification":
            raise DataError(f"lelp splits the classes of a classification; this is a {run.data.task.kind!r} task")
        buffers = yield FitProjector(self.options)
        loss = LELP(self.options, make_projector(buffers))
        yield Distill(run.student, [Weighted(loss, name="lelp")], run.teacher, predict=self.predict)

    def student_task(self, task: Task) -> Task:
        """The task with every class split into its subclasses, in class-major order."""
        return replace(task, classes=(), num_classes=task.class_count * self.options.subclasses)

    def predict(self, outputs: Outputs, batch: dict[str, Any]) -> Outputs:
        """Outputs with logits of the classes, `[B, C]`: the logsumexp over each class's subclasses."""
        logits = outputs.need("logits")
        return replace(outputs, logits=class_logits(logits, logits.shape[1] // self.options.subclasses))


class FitProjector(FitStage):
    """The frozen teacher once over the training split without augmentation, then directions inside each class.

    The artifact is the projector's buffers. All S subclasses are kept as configured, since the student's head depends
    on them: where a class has too few samples its directions are filled up at random, and where the embedding has too
    few dimensions left the subclasses beyond get the logit 0; both are logged as warnings.
    """

    name = "projector"

    def __init__(self, options: LELPOptions) -> None:
        self.options = options

    def fit(self, run: Run) -> dict[str, Tensor]:
        """The buffers. Raises `ModelError` if the teacher gives no embedding, or no head of it is found."""
        o = self.options
        seed = derive_seed(run.seed, self.name) % 2**32 if o.seed is None else o.seed
        embedding, logits, labels = teacher_outputs(run, o.max_fit_samples, seed)
        weight = head_weight(run.teacher, logits.shape[-1], embedding.shape[-1]) if o.null_space else None
        shared = o.model_dump(include={"null_space", "directions", "rotation", "scale", "class_source"})
        try:
            projector = SubclassProjector.fit(
                embedding, logits, labels, weight, num_subclasses=o.subclasses, max_fit_samples=o.max_fit_samples,
                seed=seed, **shared,
            )  # fmt: skip
        except ValueError as error:
            raise ModelError(f"stage {self.name!r}: {error}") from error
        return padded(projector, o.subclasses)


def teacher_outputs(run: Run, limit: int, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embedding `[N, D]`, logits `[N, C]` and, where the data has them, labels `[N]` of training samples, on the CPU.

    They are all samples of the split, or `limit` drawn at random; of a stream, the first `limit`.

    Raises:
        ModelError: if the teacher gives no logits or no embedding.
    """
    teacher = run.teacher.freeze().to(run.device)
    train = run.recipe.train
    rows: dict[str, list[Tensor]] = {"embedding": [], "logits": [], "label": []}
    loader = _subset(run.data, limit, seed).eval_loader("train", train.eval_batch_size or train.batch_size)
    left = limit
    with torch.no_grad(), run.accelerator.autocast():
        for batch in loader:
            outputs = teacher(to_device(batch, run.device))
            rows["embedding"].append(_need_embedding(outputs)[:left].float().cpu())
            rows["logits"].append(outputs.need("logits")[:left].float().cpu())
            rows["label"] += [batch["label"][:left]] if "label" in batch else []
            left -= len(batch["index"])
            if left <= 0:
                break
    labels = torch.cat(rows["label"]) if rows["label"] else None
    return torch.cat(rows["embedding"]), torch.cat(rows["logits"]), labels


def head_weight(teacher: nn.Module, outputs: int, dim: int) -> Tensor:
    """The weight `[outputs, dim]` of the teacher's head: its last `nn.Linear` with as many outputs as there are logits
    and the embedding's width as input.

    Raises:
        ModelError: if there is none.
    """
    heads = [m for m in teacher.modules() if isinstance(m, nn.Linear)]
    fitting = [head.weight for head in heads if (head.out_features, head.in_features) == (outputs, dim)]
    if not fitting:
        raise ModelError(
            f"the teacher has no nn.Linear from its embedding ({dim}) to its logits ({outputs}), whose weight the "
            "null-space projection needs; set method.null_space=false"
        )
    return fitting[-1]


def padded(projector: SubclassProjector, subclasses: int) -> dict[str, Tensor]:
    """The projector's buffers with so many subclasses; what it lacks are zero directions, whose logit is always 0."""
    buffers = dict(projector.state_dict())
    found = projector.num_subclasses
    if found < subclasses:
        logger.warning("subclasses %d to %d of every class get a constant share; method.subclasses=%d leaves them out",
                       found + 1, subclasses, found)  # fmt: skip
        classes, _, dim = buffers["directions"].shape
        more = subclasses - found
        buffers["directions"] = torch.cat([buffers["directions"], torch.zeros(classes, more, dim)], 1)
        buffers["scale"] = torch.cat([buffers["scale"], torch.ones(classes, more)], 1)
    return buffers


def _need_embedding(outputs: Outputs) -> Tensor:
    if outputs.embedding is None:
        raise ModelError("lelp reads the teacher's embedding, the input of its last linear layer, which this one does "
                         "not give: return kdcore.Outputs(logits=..., embedding=...) from its `call`")  # fmt: skip
    return outputs.embedding


def _subset(data: DataModule, limit: int, seed: int) -> DataModule:
    """Data with at most so many training samples, drawn at random; a stream as it is."""
    size = data.size("train")
    if size is None or size <= limit:
        return data
    rows = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:limit].tolist()
    return DataModule({"train": Subset(data["train"], rows)}, data.task, collate=data.collate, keys=data.keys)
