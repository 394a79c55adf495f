"""The loss: pseudo-subclass targets from the teacher's outputs, and the cross-entropy with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_lelp.functional import grouped_log_probs, lelp
from kd_lelp.options import LossOptions
from kd_lelp.projector import SubclassProjector
from kdcore import Loss, Outputs
from kdcore.errors import ModelError, RecipeError


class LELP(Loss):
    """Loo et al. 2024: the student's C * S outputs against the pseudo-subclass probabilities of the teacher.

    The targets are computed in every step from the teacher's logits `[B, C]` and embedding `[B, D]`, so they belong
    to exactly the input that the student sees, augmented or not. The projector is in the loss as buffers.

    Args:
        options: temperatures and weights.
        projector: fitted; by default read from the file that the options name.

    Raises:
        RecipeError: if there is no projector, or its file cannot be read.
    """

    needs = {"student": ("logits",), "teacher": ("logits", "embedding")}
    same_labels = False

    def __init__(self, options: LossOptions | None = None, projector: SubclassProjector | None = None) -> None:
        super().__init__()
        self.options = options or LossOptions()
        self.projector = projector or read_projector(getattr(self.options, "projector", None))

    def forward(self, student: Outputs, teacher: Outputs, batch: dict[str, Any]) -> dict[str, Tensor]:
        """`distill`, and with alpha > 0 `ce`: already weighted, both means over all samples of the batch. A sample
        without a label (-100) adds nothing to `ce`.

        Raises:
            ModelError: if the student's outputs are not C * S, or alpha > 0 and the data has no labels.
        """
        o, logits = self.options, student.need("logits")
        classes, subclasses = self.projector.directions.shape[:2]
        if logits.ndim != 2 or logits.shape[1] != classes * subclasses:
            raise ModelError(
                f"the student must have {classes} classes x {subclasses} subclasses = {classes * subclasses} outputs, "
                f"but its logits have shape {list(logits.shape)}"
            )
        targets = self.projector(teacher.need("embedding"), teacher.need("logits"), o.tau, o.beta)
        terms = {"distill": (1 - o.alpha) * lelp(logits, targets, num_classes=classes, tau=o.tau)}
        if o.alpha > 0:
            if "label" not in batch:
                raise ModelError("alpha > 0 weighs the labels in, but the data has none; set alpha to 0")
            hard = F.nll_loss(grouped_log_probs(logits, classes), batch["label"], reduction="none")
            terms["ce"] = o.alpha * hard.mean()
        return terms

    def count(self, batch: dict[str, Any]) -> Tensor:
        """Samples, labelled or not."""
        return torch.full((), batch["index"].shape[0], device=batch["index"].device)


def make_projector(tensors: dict[str, Tensor]) -> SubclassProjector:
    """The projector of these buffers.

    Raises:
        KeyError, RuntimeError: if they are not the buffers of a projector.
    """
    classes, subclasses, dim = tensors["directions"].shape
    projector = SubclassProjector(classes, dim, subclasses)
    projector.load_state_dict(tensors)
    return projector.to(tensors["directions"].device)


def read_projector(path: str | None) -> SubclassProjector:
    """The projector in the artifact of a `projector` stage. Raises `RecipeError` where there is none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path is None:
        raise RecipeError("the loss 'lelp' needs a fitted projector: use the method 'lelp', which fits one, or set "
                          "`projector` to the file of an earlier run")  # fmt: skip
    try:
        return make_projector(load_file(path))
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise RecipeError(f"losses: projector {path} cannot be loaded: {type(error).__name__}: {error}") from None
