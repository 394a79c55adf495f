"""SimKD: the student borrows the teacher's classifier."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_classic import losses
from kd_classic.layers import as_map
from kd_classic.methods.baselines import Stages
from kd_classic.modules import Projector
from kdcore import Distill, Method, Model, Outputs, Run
from kdcore.errors import ModelError
from kdcore.losses import Weighted
from kdcore.models import Batch

BORROWED = "simkd.safetensors"
"""The projector and the teacher's classifier, beside the files of the student itself."""


class SimKD(Method):
    """Chen et al. 2022: the student learns the teacher's last map through a projector and nothing else; what it
    predicts is what the teacher's classifier reads from that.

    What is saved is the student in its native format and, beside it, `simkd.safetensors` with projector and
    classifier, which `restore` puts together again.
    """

    stage_names = ("distill",)

    def stages(self, run: Run) -> Stages:
        """One stage; then the student is what it was, with projector and classifier on top."""
        stage = Reuse(run.student, run.teacher, self.options)
        yield stage
        run.adopt("student", stage.assembled())

    def restore(self, student: Model, folder: Path) -> Model:
        """The student of a finished run, with projector and classifier on top.

        Raises:
            ModelError: if the file of the two is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not (folder / BORROWED).is_file():
            raise ModelError(f"{folder}: no {BORROWED} beside the student, so it was not made by simkd")
        try:
            state = load_file(folder / BORROWED)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{folder / BORROWED} cannot be read: {error}") from error
        parts = {name: {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
                 for name in ("projector", "head")}  # fmt: skip
        weight = parts["head"]["weight"]
        first, last = (parts["projector"][f"transfer.{i}.weight"] for i in (0, 6))
        projector = Projector(first.shape[1], last.shape[0], factor=last.shape[0] // first.shape[0])
        head = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in parts["head"])
        projector.load_state_dict(parts["projector"])
        head.load_state_dict(parts["head"])
        size = tuple(state["size"].tolist()) or None
        return Borrowing(student, projector, head, bytes(state["layer"].tolist()).decode(), size).as_model()


class Reuse(Distill):
    """`losses.SimKD` alone, measured through the teacher's classifier."""

    def __init__(self, student: Model, teacher: Model, options: Any) -> None:
        loss = losses.SimKD(options)
        super().__init__(student, [Weighted(loss, name="simkd")], teacher)
        self.find_unused_parameters = True  # the student's own classifier
        self.loss = [loss]  # in a list, lest it be registered twice
        name, head = teacher.head
        if not isinstance(head, nn.Linear):
            raise ModelError(f"simkd reuses a linear classifier, but the teacher's {name} is a {type(head).__name__}")
        self.head = [head]
        if len(loss.names["student"]) != 1:
            raise ModelError("simkd projects one layer: name one in student_layers and teacher_layers")

    def prepare(self, batch: Batch) -> None:
        """Also check that the teacher's classifier reads the mean of the layer that is learned.

        Raises:
            ModelError: if it reads something else.
        """
        teacher = self.teachers["teacher"](batch)
        (loss,), (head,) = self.loss, self.head
        (features,) = loss.maps("teacher", teacher, batch)
        if features.shape[1] != head.in_features or not torch.allclose(
            head(features.mean((2, 3))), teacher.need("logits"), rtol=1e-3, atol=1e-3
        ):
            raise ModelError("simkd reuses a classifier that reads the mean of a feature map, but the teacher's does "
                             f"not read that of {loss.names['teacher'][0]!r} (a class token, say, or something in "
                             "between); name another layer in teacher_layers, or take another teacher")  # fmt: skip
        super().prepare(batch)

    def assembled(self) -> Model:
        """The student with projector and classifier."""
        (loss,), (head,) = self.loss, self.head
        projector = loss.adapters[0]
        assert isinstance(projector, Projector)
        layer = loss.names["student"][0]
        return Borrowing(self.student, projector, copy.deepcopy(head), layer, loss.pooled_to).as_model()

    def evaluate(self, batch: Batch) -> Outputs:
        """What the assembled student says."""
        outputs: Outputs = self.assembled().eval()(batch)
        return outputs


class Borrowing(nn.Module):
    """A student, a projector of one of its layers, and a classifier of the projected, pooled map.

    Args:
        student, projector, head: the three.
        layer: the student's layer, as a tap.
        size: what the layer's map is pooled to first, if at all.
    """

    def __init__(
        self, student: Model, projector: Projector, head: nn.Linear, layer: str, size: tuple[int, ...] | None
    ) -> None:
        super().__init__()
        self.student, self.projector, self.head, self.layer, self.size = student, projector, head, layer, size
        student.tap(layer)

    def as_model(self) -> Model:
        """Behind the uniform call."""
        labels, stages = self.student.labels, [f"student.module.{name}" for name in self.student.stages]
        return Model(self, Borrowing.read, save=self.save, labels=labels, stages=stages)

    def read(self, batch: Batch) -> Outputs:
        """Logits of the borrowed classifier; the embedding is what it reads."""
        inside = self.student(batch)
        features = as_map(inside.features[self.layer], batch.get("attention_mask"))
        if self.size:
            features = F.adaptive_avg_pool2d(features, self.size)
        embedding: Tensor = self.projector(features).mean((2, 3))
        return Outputs(self.head(embedding), embedding)

    def save(self, folder: Path) -> None:
        """The student's own files, and `simkd.safetensors`."""
        from safetensors.torch import save_file

        self.student.save(folder)
        parts = {"projector": self.projector.state_dict(), "head": self.head.state_dict()}
        state = {
            f"{part}.{k}": v.detach().cpu().contiguous() for part, found in parts.items() for k, v in found.items()
        }
        state["layer"] = torch.tensor(list(self.layer.encode()), dtype=torch.uint8)
        state["size"] = torch.tensor(self.size or (), dtype=torch.int64)
        save_file(state, folder / BORROWED)
