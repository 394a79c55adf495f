"""DC, DSA and DM: images whose gradients, or mean embeddings, are those of the real data.

Sources: Zhao, Mopuri, Bilen 2021 (arXiv 2006.05929); Zhao and Bilen 2021 (arXiv 2102.08259) and 2023 (arXiv
2110.04181).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from kd_dataset_distill.artifact import WriteData
from kd_dataset_distill.augment import Augmentation, draw
from kd_dataset_distill.evaluation import train_networks
from kd_dataset_distill.functional import distribution_distance, flat, gradient_matching, minibatches, unflat
from kd_dataset_distill.networks import Held, architectures
from kd_dataset_distill.networks import draw as draw_network
from kd_dataset_distill.options import DCOptions, DMOptions, ImageOptions
from kd_dataset_distill.real import ClassBatches, PixelSpace, RealImages, by_class
from kdcore import Method, Roles, Run, Stage, TrainStage
from kdcore.data import derive_seed
from kdcore.models import Batch
from kdcore.recipe import TrainOptions

NET_MOMENTUM = 0.5
NORM_BATCH = 16
"""Real images of each class that the statistics of batch norms are taken from (DC's code)."""


def first_images(real: RealImages, options: ImageOptions, space: PixelSpace, seed: int) -> Tensor:
    """Where the images begin `[C * ipc, ...]`, ordered by class, in the units of `space`."""
    if options.init == "real":
        picked = [real.pick(c, options.ipc, derive_seed(seed, "init", c)) for c in range(len(real.rows))]
        return space(torch.cat(picked).to(space.mean.device))
    shape = (len(real.rows) * options.ipc, *real.images.shape[1:])
    return torch.randn(shape, generator=torch.Generator().manual_seed(derive_seed(seed, "noise")))


class Pixels(TrainStage):
    """Images as parameters, learned on fresh networks.

    Args:
        run: the run; its first student is the architecture of the networks.
        real: the real images.
        options: of the method.
        space: the units of the pixels.
    """

    shardable = False

    def __init__(self, run: Run, real: RealImages, options: ImageOptions, space: PixelSpace) -> None:
        super().__init__("distil")
        self.run, self.options, self.space = run, options, space
        self.classes = len(real.rows)
        self.role = architectures(run)[0]
        self.pixels = nn.Parameter(first_images(real, options, space, run.seed))
        self.register_buffer("labels", torch.arange(self.classes).repeat_interleave(options.ipc))

    @property
    def images(self) -> Tensor:
        """The images `[C * ipc, ...]`, ordered by class."""
        return self.space.inverse(self.pixels.detach())

    def settings(self, steps: int, batch_size: int) -> dict[str, Any]:
        """Overrides of the recipe's `train` section, which is that of the networks trained on the result."""
        every = self.run.recipe.train.save_every or max(1, min(1000, steps // 5))
        return {
            "steps": steps,
            "batch_size": batch_size,
            "grad_accumulation": 1,
            "schedule": "constant",
            "compile": False,
            "clip_norm": None,
            "save_every": every,
            "workers": 0,
        }

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """SGD on the pixels."""
        return {"loss": SGD([self.pixels], lr=self.options.lr_img, momentum=self.options.momentum)}

    def prepare(self, batch: Batch) -> None:
        """There are no adapters to make."""

    def generator(self, *key: object) -> torch.Generator:
        """Of random numbers that depend on the run's seed, the step and the key alone."""
        return torch.Generator().manual_seed(derive_seed(self.run.seed, self.name, self.progress.step, *key))


class Matching(Pixels):
    """Images matched class by class; each process has whole classes.

    Args:
        run, real, options, space: as `Pixels`.
        steps: steps on the images.
    """

    def __init__(
        self, run: Run, real: RealImages, options: DCOptions | DMOptions, space: PixelSpace, steps: int
    ) -> None:
        super().__init__(run, real, options, space)
        self.held = Held(draw_network(run, self.role, 0))
        self.data = by_class(ClassBatches(real, options.batch_real, run.seed), self.classes, real.task)
        world = run.accelerator.num_processes
        self.overrides = self.settings(steps, -(-self.classes // world) * world)

    def sides(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Real and synthetic images of the batch's classes under the same augmentation, and the labels."""
        labels, ours = batch["label"].tolist(), self.pixels.unflatten(0, (self.classes, -1))
        real, synthetic = [], []
        for label, images in zip(labels, batch["image"], strict=True):
            change = draw(self.options.augment, self.generator("siamese", label))
            real.append(_apply(change, self.space(images)))
            synthetic.append(_apply(change, ours[label]))
        return real, synthetic, labels

    def network(self, signal: str) -> Any:
        """`(parameters, pixels) -> signal` of the network held."""
        return lambda parameters, pixels: self.held(parameters, {"image": self.space.inverse(pixels)}, signal)


def _apply(change: Augmentation | None, images: Tensor) -> Tensor:
    return images if change is None else change(images)


class GradientMatching(Matching):
    """DC, algorithm 1. A step of the engine is one step on the images; `outer` of them share a network, which is
    trained on the images for `inner` epochs in between. Network and momentum are in the state of the stage."""

    options: DCOptions

    def __init__(self, run: Run, real: RealImages, options: DCOptions, space: PixelSpace) -> None:
        self.outer, self.inner = options.loops
        super().__init__(run, real, options, space, options.iterations * self.outer)
        self.register_buffer("velocity", torch.zeros_like(flat(dict(self.held.model.named_parameters()))))
        norm_batch = [real.pick(c, NORM_BATCH, derive_seed(run.seed, "norm", c)) for c in range(self.classes)]
        self.norm_images = torch.cat(norm_batch) if self.held.norms else None

    def before_step(self, batches: list[Batch]) -> None:
        """Begin with a fresh network after every `outer` steps."""
        iteration, turn = divmod(self.progress.step, self.outer)
        if turn == 0:
            self.held.refresh(draw_network(self.run, self.role, iteration))
            self.velocity.zero_()
        self.held.model.eval()
        if self.norm_images is not None:
            self.held.calibrate(self.norm_images.to(self.pixels.device))

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The distance of the gradients, summed over classes: C times the mean over those of this batch."""
        real, synthetic, labels = self.sides(batch)
        distance = gradient_matching(
            self.network("logits"), self.held.leaves(), real, synthetic, labels, self.options.metric
        )
        return {"match": self.classes * distance / len(labels)}

    def after_step(self) -> None:
        """Train the network on the images, but not after its last step."""
        if (self.progress.step + 1) % self.outer == 0:
            return
        o, pixels = self.options, self.pixels.detach()
        parameters, network = self.held.leaves(), self.network("logits")
        generator = self.generator("inner")
        order = minibatches(len(pixels), o.batch_train, generator)
        velocity = unflat(self.velocity, parameters)
        for _ in range(self.inner * -(-len(pixels) // o.batch_train)):
            rows = next(order).to(pixels.device)
            inputs = _apply(draw(o.augment, generator, len(rows)), pixels[rows])
            with torch.enable_grad():
                loss = F.cross_entropy(network(parameters, inputs), self.labels[rows])
                gradients = torch.autograd.grad(
                    loss, list(parameters.values()), allow_unused=True, materialize_grads=True
                )
            for (name, value), gradient in zip(parameters.items(), gradients, strict=True):
                velocity[name].mul_(NET_MOMENTUM).add_(gradient)
                value.sub_(o.lr_net * velocity[name])
        self.held.take(parameters)


class DistributionMatching(Matching):
    """DM, algorithm 1: a fresh network in every step, which is never trained."""

    options: DMOptions

    def __init__(self, run: Run, real: RealImages, options: DMOptions, space: PixelSpace) -> None:
        super().__init__(run, real, options, space, options.iterations)

    def before_step(self, batches: list[Batch]) -> None:
        """Draw the step's network; batch norms go by the images of all classes together."""
        self.held.refresh(draw_network(self.run, self.role, self.progress.step))
        self.held.model.eval()
        for norm in self.held.norms:
            norm.train()

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The distance of mean embeddings, summed over classes: C times the mean over those of this batch."""
        real, synthetic, labels = self.sides(batch)
        network, parameters = self.network("embedding"), dict(self.held.model.named_parameters())
        with torch.no_grad():
            theirs = network(parameters, torch.cat(real)).split([len(images) for images in real])
        ours = network(parameters, torch.cat(synthetic)).split([len(images) for images in synthetic])
        return {"match": self.classes * distribution_distance(theirs, ours) / len(labels)}


class DC(Method):
    """Stages: `distil`, `data`, then a stage per network trained on each set. The ablation keeps random real images."""

    roles = Roles(teachers=(), students=None)
    ablation: Mapping[str, Any] = {"method.iterations": 0, "method.init": "real", "method.baselines": []}
    cut: Mapping[str, Any] = {"method.iterations": 5, "method.batch_real": 16, "method.eval_networks": 1,
                              "method.baselines": []}  # fmt: skip
    stage_class: type[GradientMatching] | type[DistributionMatching] = GradientMatching
    options: Any

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `DataError` where the data is no classification of images, or a class has too few."""
        o = self.options
        real = RealImages.read(run.data, run.recipe.method.use, o.ipc if o.init == "real" else 1)
        space = PixelSpace(real.images)
        stage: Any = self.stage_class(run, real, o, space)
        if o.iterations:
            stage = yield stage
        rows = yield WriteData(lambda: columns(stage), o, run.data.task)
        yield from train_networks(run, o, rows, augment=(o.augment, space))


class DSA(DC):
    """DC under differentiable Siamese augmentation."""


class DM(DC):
    """As DC, with distribution matching."""

    stage_class = DistributionMatching


def columns(stage: Pixels) -> dict[str, Any]:
    """The small data set as columns."""
    return {"image": stage.images.cpu(), "label": stage.labels.tolist()}
