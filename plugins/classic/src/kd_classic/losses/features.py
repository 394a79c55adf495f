"""Losses on pairs of layers, with their trained adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from kd_classic import functional
from kd_classic.layers import Layers, as_map, embedding, tap_embedding
from kd_classic.losses.logits import need_target
from kd_classic.modules import (
    ABF,
    Connector,
    Exit,
    MaskedGenerator,
    Projector,
    Regressor,
    VariationalRegressor,
    generation_mask,
)
from kd_classic.options import (
    ABOptions,
    ATOptions,
    BYOTOptions,
    FitNetsOptions,
    MGDOptions,
    NSTOptions,
    OFDOptions,
    ReviewKDOptions,
    SimKDOptions,
    VIDOptions,
)
from kdcore import Loss, Model, Outputs
from kdcore.data import derive_seed
from kdcore.errors import ModelError
from kdcore.losses import count_samples
from kdcore.models import Batch, Source

Pairs = list[tuple[Tensor, Tensor]]


class Adapted(Layers):
    """A loss on pairs of layers with one trained adapter per pair, made from the shapes that arrive first."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self.adapters = nn.ModuleList()

    def adapted(self, pairs: Pairs, make: Callable[[Tensor, Tensor], nn.Module]) -> list[tuple[Any, Tensor, Tensor]]:
        """Adapter, student and teacher of each pair."""
        if not self.adapters:
            self.adapters.extend(make(s, t) for s, t in pairs).to(pairs[0][0].device).train(self.training)
        return [(a, s, t) for a, (s, t) in zip(self.adapters, pairs, strict=True)]


class FitNets(Adapted):
    """`functional.fitnet` through a regressor per pair of layers."""

    which = "middle"
    by_position = True

    def __init__(self, options: FitNetsOptions | None = None) -> None:
        super().__init__(options or FitNetsOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean squared error, summed over the pairs."""
        relu = self.options.relu
        losses = []
        for regressor, ours, theirs in self.adapted(
            self.pairs(student, teacher, batch), lambda s, t: Regressor(s.shape, t.shape, relu=relu)
        ):
            losses.append(functional.fitnet(*functional.pool_to_smaller(regressor(ours), theirs)))
        return torch.stack(losses).sum()


class AT(Layers):
    """`functional.at`."""

    def __init__(self, options: ATOptions | None = None) -> None:
        super().__init__(options or ATOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        ours, theirs = zip(*self.pairs(student, teacher, batch), strict=True)
        return functional.at(ours, theirs, mode=self.options.mode, p=self.options.p)


class NST(Layers):
    """`functional.nst`."""

    def __init__(self, options: NSTOptions | None = None) -> None:
        super().__init__(options or NSTOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        return functional.nst(*zip(*self.pairs(student, teacher, batch), strict=True))


class VID(Adapted):
    """`functional.vid` through a regressor and a trained scale per pair of layers."""

    by_position = True

    def __init__(self, options: VIDOptions | None = None) -> None:
        super().__init__(options or VIDOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        variance = self.options.init_variance
        pairs = [functional.pool_to_smaller(s, t) for s, t in self.pairs(student, teacher, batch)]
        losses = []
        for regressor, ours, theirs in self.adapted(
            pairs, lambda s, t: VariationalRegressor(s.shape[1], t.shape[1], init_variance=variance)
        ):
            losses.append(functional.vid(regressor(ours), regressor.log_scale, theirs))
        return torch.stack(losses).sum()


class AB(Adapted):
    """`functional.ab`, before the activations; a connector where the shapes of a pair differ."""

    before = ("student", "teacher")

    def __init__(self, options: ABOptions | None = None) -> None:
        super().__init__(options or ABOptions())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        connected, targets = [], []
        for connector, ours, theirs in self.adapted(self.pairs(student, teacher, batch), _connector):
            ours, theirs = functional.pool_to_smaller(connector(ours), theirs)
            connected.append(ours)
            targets.append(theirs)
        return functional.ab(connected, targets, margin=self.options.margin)


def _connector(student: Tensor, teacher: Tensor) -> nn.Module:
    same = student.shape[1:] == teacher.shape[1:]
    return nn.Identity() if same else Regressor(student.shape, teacher.shape, relu=False)


class OFD(Adapted):
    """`functional.ofd`, before the activations, with a connector per pair and margins from the teacher's norms."""

    before = ("student", "teacher")

    def __init__(self, options: OFDOptions | None = None) -> None:
        super().__init__(options or OFDOptions())
        self.margins = nn.Module()

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the layers and read the margins.

        Raises:
            ModelError: if a teacher layer has no batch norm.
        """
        super().bind(student, teacher)
        assert isinstance(teacher, Model)
        layers = [name.partition(":")[0] for name in self.names["teacher"]]
        norms = self.options.teacher_norms or layers
        if len(norms) != len(layers):
            raise ModelError(f"ofd: teacher_norms names {len(norms)} batch norms for {len(layers)} layers "
                             f"({', '.join(layers)})")  # fmt: skip
        for i, name in enumerate(norms):
            norm = _last_norm(teacher, name)
            self.margins.register_buffer(f"margin{i}", functional.ofd_margin(norm.weight, norm.bias).float())
        if self.options.teacher_batch_statistics:
            for module in teacher.module.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.track_running_stats, module.running_mean, module.running_var = False, None, None

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs."""
        connected, targets = [], []
        for connector, ours, theirs in self.adapted(
            self.pairs(student, teacher, batch), lambda s, t: Connector(s.shape[1], t.shape[1])
        ):
            connected.append(connector(ours))
            targets.append(theirs)
        return functional.ofd(connected, targets, list(self.margins.buffers()))


def _last_norm(teacher: Model, name: str) -> Any:
    """The batch norm that a layer's main path ends with: the last one that is not in a shortcut."""
    side_paths = ("downsample", "shortcut", "proj")
    found = [m for path, m in teacher.module.get_submodule(name).named_modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine
             and not any(word in path for word in side_paths)]  # fmt: skip
    if not found:
        raise ModelError(f"ofd takes its margins from the batch norm that ends a teacher's layer, but {name!r} has "
                         "none; name other layers, or the norms in teacher_norms")  # fmt: skip
    return found[-1]


class ReviewKD(Adapted):
    """`functional.hcl` between the teacher's levels and the student's, which are fused from the deepest down.

    The levels are the named layers and the embedding, as a 1x1 map.
    """

    before = ("teacher",)

    def __init__(self, options: ReviewKDOptions | None = None) -> None:
        super().__init__(options or ReviewKDOptions())

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the layers and what the classifiers read."""
        super().bind(student, teacher)
        assert teacher is not None
        self.heads = {"student": tap_embedding(student), "teacher": tap_embedding(teacher)}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the levels."""
        pairs = self.pairs(student, teacher, batch)
        pooled = [as_map(embedding(o, self.heads[role], False, batch)) for role, o in
                  (("student", student), ("teacher", teacher))]  # fmt: skip
        pairs.append((pooled[0], pooled[1]))
        width = min(self.options.width, pairs[-1][0].shape[1])
        made = self.adapted(pairs, lambda s, t: ABF(s.shape[1], width, t.shape[1], fuse=t is not pooled[1]))
        residual: Tensor | None = None
        ours, theirs = [], []
        for fusion, features, target in reversed(made):
            fused, residual = fusion(features, residual, target.shape[-2:])
            ours.append(fused)
            theirs.append(target)
        return functional.hcl(ours, theirs)


class MGD(Adapted):
    """`functional.mgd`: the last stage of the teacher, generated from the student's with a part masked."""

    which = "last"

    def __init__(self, options: MGDOptions | None = None) -> None:
        super().__init__(options or MGDOptions())
        self.seed = 0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over the batch, summed over the pairs.

        Raises:
            ModelError: if the maps of a pair differ in size.
        """
        o = self.options
        losses = []
        if not self.adapters:
            self.seed = int(torch.randint(2**62, ()))
        made = self.adapted(self.pairs(student, teacher, batch), lambda s, t: MaskedGenerator(s.shape[1], t.shape[1]))
        for number, (generator, ours, theirs) in enumerate(made):
            if ours.shape[-2:] != theirs.shape[-2:]:
                raise ModelError(f"mgd generates the teacher's map position by position, but the student's is "
                                 f"{list(ours.shape[-2:])} and the teacher's {list(theirs.shape[-2:])}; name layers "
                                 "of one size in student_layers and teacher_layers")  # fmt: skip
            shape = (len(theirs), 1, *theirs.shape[-2:]) if o.kind == "dense" else (*theirs.shape[:2], 1, 1)
            seed = derive_seed(self.seed, self.progress.step, number)
            draw = batch_rand(shape, seed, theirs.device, self.progress.shares)
            keep = generation_mask(draw, o.masked, o.kind)
            losses.append(functional.mgd(generator(ours, keep), theirs, alpha=o.alpha))
        return torch.stack(losses).sum()


def batch_rand(shape: Sequence[int], seed: int, device: torch.device, shares: Sequence[int] = ()) -> Tensor:
    """Uniform numbers for this process's part of the batch (first dimension): those that one process alone would draw
    for it among the whole batch, of which the processes hold `shares`."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    first, total = sum(shares[:rank]), sum(shares) or shape[0]
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand((total, *shape[1:]), generator=generator)
    return draw[first : first + shape[0]].to(device, non_blocking=True)


class SimKD(Adapted):
    """Mean squared error of the last map through a projector; the method `simkd` also borrows the classifier."""

    which = "last"

    def __init__(self, options: SimKDOptions | None = None) -> None:
        super().__init__(options or SimKDOptions())
        self.pooled_to: tuple[int, ...] | None = None

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Mean over every element, summed over the pairs."""
        factor = self.options.factor
        given = self.pairs(student, teacher, batch)
        pairs = [functional.pool_to_smaller(s, t) for s, t in given]
        self.pooled_to = tuple(pairs[0][0].shape[-2:]) if pairs[0][0] is not given[0][0] else None
        made = self.adapted(pairs, lambda s, t: Projector(s.shape[1], t.shape[1], factor=factor))
        return torch.stack([functional.fitnet(projector(s), t) for projector, s, t in made]).sum()


class BYOT(Loss):
    """`functional.byot`: exits on the shallow stages learn from the student's own deepest one.

    The exits are trained with the student and left out of what is saved.
    """

    relational = True  # a part of it is a sum over the batch

    def __init__(self, options: BYOTOptions | None = None) -> None:
        super().__init__()
        self.options = options or BYOTOptions()
        self.needs = {"student": ("logits", "features")}
        self.taps = {"student": list(self.options.layers)}
        self.exits = nn.ModuleList()

    def bind(self, student: Source, teacher: Source | None) -> None:
        """Tap the stages and what the classifier reads.

        Raises:
            ModelError: if the student names fewer than two stages.
        """
        if not self.taps["student"]:
            self.taps["student"] = list(student.stages[-4:]) if isinstance(student, Model) else []
        super().bind(student, teacher)
        if len(self.names.get("student", ())) < 2:
            raise ModelError("byot puts exits on the stages before the last one, but this student has fewer than two; "
                             "set `layers`")  # fmt: skip
        self.head = tap_embedding(student)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        """Cross-entropies and soft labels: means over the batch; features: a sum over it."""
        logits = student.need("logits")
        mask = batch.get("attention_mask")
        *shallow, deepest = [as_map(f, mask) for f in student.select(self.names["student"])]
        pooled = embedding(student, self.head, False, batch)
        if not self.exits:
            made = [Exit(f.shape[1], pooled.shape[1], max(f.shape[2] // deepest.shape[2], 1), logits.shape[1])
                    for f in shallow]  # fmt: skip
            self.exits.extend(made).to(logits.device).train(self.training)
        exits = [branch(f) for branch, f in zip(self.exits, shallow, strict=True)]
        target = need_target(logits, batch, "byot")
        o = self.options
        return functional.byot(
            [*(z for z, _ in exits), logits], [*(f for _, f in exits), pooled], target,
            temperature=o.temperature, alpha=o.alpha, beta=o.beta, standardize=o.standardize,
        )  # fmt: skip

    def count(self, batch: Batch) -> Tensor:
        """Samples."""
        return count_samples(batch)
