"""The method: one stage in which everything is learned online, without labels or pretrained weights.

Source: Mishra et al. 2025, "Self-supervised Learning of Echocardiographic Video Representations via Online Cluster
Distillation" (arXiv 2506.11777).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_discovr import functional as f
from kd_discovr.models import video_of
from kd_discovr.modules import Branch, MAEDecoder, Prototypes
from kd_discovr.options import DISCOVROptions
from kdcore import Method, Roles, Run, Stage, TrainStage
from kdcore.data import DataModule, derive_seed
from kdcore.errors import DataError, ModelError
from kdcore.models import Batch
from kdcore.probes import probe

logger = logging.getLogger(__name__)

MOST_FRAMES, SCALED_FRAMES = 1024, 256
"""Of `image_loss_scale: code`: frames that the official code takes at once, and those for which its factor is 1."""


class DISCOVR(Method):
    """One stage, `discovr`. The ablation is the video branch alone: self-distillation of masked clips."""

    roles = Roles(teachers=(), splits=("train",))
    stage_names = ("discovr",)
    ablation: Mapping[str, Any] = {"method.image_weight": 0, "method.scd_weight": 0}
    cut: Mapping[str, Any] = {"data.train": 64, "data.val": 32, "data.test": 32}
    options: DISCOVROptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stage, then the probes.

        Raises:
            DataError: if the data asks for predictions, or the labels that the probes need are not there.
            ModelError: if the student is no video encoder.
        """
        o = self.options
        check_task(run.data)
        if o.probes:
            check_probes(run.data, o)
        stage = yield Discovr(run, o)
        if o.keep == "teacher":
            run.student.module.load_state_dict(stage.video.teacher["encoder"].state_dict())
        if o.probes:
            found = probe(run, run.student, o.probe_reference, o.probe_query, kinds=o.probes, k=o.probe_neighbours,
                          temperature=o.probe_temperature)  # fmt: skip
            for name, value in found.items():
                run.add_metric(name, value)


class Discovr(TrainStage):
    """Both branches, decoder and prototypes; `forward` gives the terms of Mishra et al., section 3.

    The teachers see whole clips and frames before each step (`before_step`): there they move, and what they say of all
    micro-batches becomes targets, so that centres and clusters are those of the whole batch. Centres follow once the
    step is taken (`after_step`).
    """

    def __init__(self, run: Run, options: DISCOVROptions) -> None:
        super().__init__("discovr")
        o = self.options = options
        encoder: Any = check_encoder(run.student.module)
        self.accelerator, self.run_seed = run.accelerator, run.seed
        self.batch_size = run.recipe.train_for(self.name).batch_size
        head = {"outputs": o.head_outputs, "hidden": o.head_hidden, "bottleneck": o.head_bottleneck}
        self.video = Branch(encoder, **head)
        self.image = Branch(encoder.frame_encoder(), **head) if o.image_weight or o.scd_weight else None
        if o.scd_weight:
            width, heads = o.decoder_width or encoder.width // 2, o.decoder_heads or max(encoder.heads // 2, 1)
            if width % heads:
                raise ModelError(f"the decoder's width {width} cannot be divided into {heads} heads; set "
                                 "method.decoder_heads")  # fmt: skip
            self.decoder = MAEDecoder(encoder.width, width, o.decoder_layers, heads)
            self.prototypes = Prototypes(o.prototypes, encoder.width)
        self.outputs: dict[str, Tensor] = {}  # what the centres follow, of the step under way
        self.find_unused_parameters = not (o.video_weight and o.image_weight)  # what stands idle has no gradient

    @property
    def branches(self) -> dict[str, Branch]:
        """Those there are, by the name of their loss."""
        return {"video": self.video} | ({} if self.image is None else {"image": self.image})

    def prepare(self, batch: Batch) -> None:
        """As always; clips and encoder are found not to fit here. Warns of more prototypes than a batch has tokens."""
        super().prepare(batch)
        frames, size = self._grid(video_of(batch))
        tokens = self.batch_size * frames * size
        if self.options.scd_weight and tokens < self.options.prototypes:
            logger.warning("%d prototypes for the %d tokens of a batch: they cannot all be used; lower "
                           "method.prototypes or take larger batches", self.options.prototypes, tokens)  # fmt: skip

    def _grid(self, video: Tensor) -> tuple[int, int]:
        """Tubelets along a clip, and tokens of each."""
        encoder = self.video.encoder
        return video.shape[1] // encoder.tubelet, (video.shape[3] // encoder.patch) * (video.shape[4] // encoder.patch)

    # -- teachers ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def before_step(self, batches: list[Batch]) -> None:
        """Move the teachers, bring the prototypes to length 1, and make the targets of every micro-batch."""
        o = self.options
        for branch in self.branches.values():
            branch.move_teacher(o.ema_momentum)
        if o.scd_weight:
            self.prototypes.normalise()
        targets = self.teach(batches)
        self.outputs = {name: torch.cat([target[f"{name}_{o.center_on}"] for target in targets])
                        for name in self.branches}  # fmt: skip
        for batch, target in zip(batches, targets, strict=True):
            batch["targets"] = target

    def after_step(self) -> None:
        """Move the centres, which the targets of this step did not know yet."""
        for name, branch in self.branches.items():
            branch.move_center(self.outputs[name], self.options.center_momentum)

    @torch.no_grad()
    def teach(self, batches: list[Batch]) -> list[dict[str, Tensor]]:
        """What the teachers say of each micro-batch: logits and probabilities of both branches, and the image tokens
        `[B, N, D]` with their clusters."""
        o = self.options
        with self.accelerator.autocast():
            targets = [self._see(video_of(batch)) for batch in batches]
        for name, branch in self.branches.items():
            temperature = self._temperatures(name)[0]
            for target in targets:
                logits = target[f"{name}_logits"]
                target[f"{name}_probs"] = f.teacher_probabilities(logits, branch.center, temperature)
        if o.scd_weight:
            scores = [f.prototype_scores(target["tokens"], self.prototypes.weight) for target in targets]
            clusters = f.assignments(torch.cat(scores), o.sinkhorn_eps, o.sinkhorn_iterations, o.soft_targets)
            for target, part in zip(targets, clusters.split([len(s) for s in scores]), strict=True):
                target["clusters"] = part
        return targets

    def _see(self, video: Tensor) -> dict[str, Tensor]:
        logits, _ = self.video.see(video)
        if self.image is None:
            return {"video_logits": logits}
        image_logits, tokens = self.image.see(frames_of(video))
        tokens = f.standardise_tokens(tokens).unflatten(0, video.shape[:2])
        tokens = f.paired_tokens(tokens, self.video.encoder.tubelet, self.options.token_alignment)
        return {"video_logits": logits, "image_logits": image_logits, "tokens": tokens}

    def _temperatures(self, branch: str) -> tuple[float, float]:
        """Of a branch's teacher in this epoch, and of its student."""
        o = self.options
        now = f.teacher_temperature(self.progress.epoch, o.teacher_temperature_start, o.teacher_temperature,
                                    o.teacher_temperature_epochs)  # fmt: skip
        return (now, o.student_temperature) if branch == "video" else f.image_temperatures(now, o.student_temperature)

    # -- students ------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """`video`, `image`, and `scd/video` and `scd/image` for the two directions of the clusters, all weighted. The
        last has a gradient only with `prototype_grad_from_image`."""
        o, video = self.options, video_of(batch)
        targets = batch["targets"] if "targets" in batch else self.teach([batch])[0]
        draws = self._draws(batch["index"], video)
        tokens = self.video.encoder.embed(video)
        terms: dict[str, Tensor] = {}
        if o.video_weight:
            terms["video"] = o.video_weight * self._video_loss(tokens, draws["local"], targets["video_probs"])
        if o.image_weight:
            terms["image"] = o.image_weight * self._image_loss(video, draws["image"], targets["image_probs"])
        if o.scd_weight:
            loss = self._cluster_loss(tokens, draws["global"], targets)
            terms |= {"scd/video": o.scd_weight * loss.student, "scd/image": o.scd_weight * loss.teacher}
        return terms

    def _video_loss(self, tokens: Tensor, draw: Tensor, teacher: Tensor) -> Tensor:
        visible = tubes(draw, self.options.local_mask_ratio, tokens.shape[1])
        return f.dino_ce(self.video.views(f.take(tokens, visible)), teacher, self._temperatures("video")[1])

    def _image_loss(self, video: Tensor, draw: Tensor, teacher: Tensor) -> Tensor:
        assert self.image is not None
        visible = f.visible_positions(draw, self.options.image_mask_ratio)
        logits = self.image.views(f.take(self.image.encoder.embed(frames_of(video)), visible))
        loss = f.dino_ce(logits, teacher, self._temperatures("image")[1])
        if self.options.image_loss_scale == "code":
            loss = loss * SCALED_FRAMES / min(self.batch_size * video.shape[1], MOST_FRAMES)
        return loss

    def _cluster_loss(self, tokens: Tensor, draw: Tensor, targets: Mapping[str, Tensor]) -> f.ClusterLoss:
        o = self.options
        visible = tubes(draw, o.mask_ratio, tokens.shape[1])
        seen = self.video.encoder.encode(f.take(tokens, visible))[:, 1:]
        made = self.decoder(seen, visible, tokens.shape[1])
        if o.token_alignment == "code":
            made = f.visible_first(made, visible)
        return f.cluster_assignment_distill(
            made, targets["tokens"], self.prototypes.weight, eps=o.sinkhorn_eps, iterations=o.sinkhorn_iterations,
            temperature=o.scd_temperature, soft_targets=o.soft_targets,
            prototype_grad_from_image=o.prototype_grad_from_image, targets=targets["clusters"],
        )  # fmt: skip

    def _draws(self, index: Tensor, video: Tensor) -> dict[str, Tensor]:
        """Uniform numbers for the masks: `local` `[V, B, S]`, `global` `[B, S]`, `image` `[V, B * T, S]`. Those of a
        sample depend on the seed, the step and the sample alone."""
        views, frames, size = self.options.local_views, video.shape[1], self._grid(video)[1]
        rows = []
        for sample in index.tolist():
            generator = torch.Generator().manual_seed(derive_seed(self.run_seed, self.progress.step, sample))
            rows.append(torch.rand(views + 1 + views * frames, size, generator=generator))
        drawn = torch.stack(rows, 1).to(video.device)
        image = drawn[views + 1 :].unflatten(0, (views, frames)).transpose(1, 2).flatten(1, 2)
        return {"local": drawn[:views], "global": drawn[views], "image": image}


def tubes(draw: Tensor, ratio: float, count: int) -> Tensor:
    """Visible tokens `[..., n]` among the `count` of a clip, from uniform numbers `[..., S]` for the places of a
    frame."""
    size = draw.shape[-1]
    return f.tube(f.visible_positions(draw, ratio), count // size, size)


def frames_of(video: Tensor) -> Tensor:
    """The frames of clips as clips of one frame: `[B, T, C, H, W]` to `[B * T, 1, C, H, W]`."""
    return video.flatten(0, 1)[:, None]


def check_encoder(net: Any) -> Any:
    """The student's network, if it is a video encoder. Raises `ModelError` if not."""
    parts = ("embed", "encode", "frame_encoder", "width", "heads", "patch", "tubelet")
    if not all(hasattr(net, part) for part in parts):
        raise ModelError(f"discovr masks the tokens of a video encoder, which a {type(net).__name__} is not; take "
                         "`student: {use: discovr-vit}` or `student: {use: videomae}`")  # fmt: skip
    return net


def check_task(data: DataModule) -> None:
    """Refuse data that asks for predictions: the encoder makes none. Raises `DataError`."""
    if data.task.kind != "unlabelled":
        raise DataError(f"discovr learns an encoder without labels, but the data poses a task of kind "
                        f"{data.task.kind!r}; take data of kind 'unlabelled' (its clips may still have labels, which "
                        "method.probes reads)")  # fmt: skip


def check_probes(data: DataModule, options: DISCOVROptions) -> None:
    """Refuse probes on clips without labels, or with one only, before anything is trained. Raises `DataError`."""
    for split in (options.probe_reference, options.probe_query):
        if "label" not in data.sample(split, 1):
            raise DataError(f"method.probes asks for labels, but the clips of the split {split!r} have none; leave it "
                            "out, or name other splits in method.probe_reference and method.probe_query")  # fmt: skip
    if len(data.labels(options.probe_reference).unique()) < 2:
        raise DataError(f"method.probes: all clips of the split {options.probe_reference!r} have the same label, so "
                        "nothing can be told from them; name another split in method.probe_reference")  # fmt: skip
