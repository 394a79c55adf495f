"""The similarities as losses on trained networks (section 3.4 of the paper)."""

from __future__ import annotations

from torch import Tensor

from kd_diswot.functional import batch_similarity, channel_similarity
from kd_diswot.options import LayersOptions
from kdcore import Loss, Outputs
from kdcore.models import Batch


class Similarity(Loss):
    """One map of each model; what is made of them is left to the two kinds."""

    needs = {"student": ("features",), "teacher": ("features",)}
    relational = True

    def __init__(self, options: LayersOptions | None = None) -> None:
        super().__init__()
        options = options or LayersOptions()
        self.taps = {"student": [options.student_layer], "teacher": [options.teacher_layer]}

    def maps(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        """The two maps, the teacher's without gradient."""
        ours, theirs = (outputs.features[self.names[role][0]].float()
                        for role, outputs in (("student", student), ("teacher", teacher)))  # fmt: skip
        return ours, theirs.detach()


class Relation(Similarity):
    """`functional.batch_similarity` of the two maps; one value for the batch."""

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """A scalar."""
        return batch_similarity(*self.maps(student, teacher))


class Semantic(Similarity):
    """`functional.channel_similarity` of the two maps, which must have as many channels; mean over samples."""

    relational = False

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """A scalar."""
        return channel_similarity(*self.maps(student, teacher))

    def count(self, batch: Batch) -> Tensor:
        """Samples: labels play no part."""
        return batch["index"].new_tensor(len(batch["index"]))
