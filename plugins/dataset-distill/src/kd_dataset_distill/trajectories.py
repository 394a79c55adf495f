"""MTT: images that move a network in a few steps as far as epochs of real data did.

Source: Cazenavette et al. 2022, "Dataset Distillation by Matching Training Trajectories" (arXiv 2203.11932), "
                                 "algorithm 1.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import Dataset

from kd_dataset_distill.artifact import WriteData
from kd_dataset_distill.augment import draw
from kd_dataset_distill.evaluation import TrainOn, train_networks
from kd_dataset_distill.functional import flat, minibatches, trajectory_distance, unflat, unroll
from kd_dataset_distill.images import Pixels, columns
from kd_dataset_distill.networks import Held, architectures
from kd_dataset_distill.networks import draw as draw_network
from kd_dataset_distill.options import EvaluationOptions, MTTOptions
from kd_dataset_distill.real import PixelSpace, RealImages
from kdcore import DataModule, Method, Model, Roles, Run, Stage
from kdcore.data import derive_seed
from kdcore.errors import ModelError
from kdcore.models import Batch
from kdcore.recipe import TrainOptions

LOWEST_RATE = 1e-4
"""The learned rate of the steps on synthetic images never falls below it."""
WHITENING = "whitening.safetensors"


class Recorder(nn.Module):
    """The parameters of a network after every epoch, `[epochs + 1, P]`; the first row are the initial ones."""

    same_everywhere = True

    def __init__(self, model: Model, epochs: int) -> None:
        super().__init__()
        first = flat(dict(model.named_parameters())).detach()
        self.register_buffer("trajectory", torch.zeros(epochs + 1, len(first)))
        self.record(0, model)

    def record(self, epoch: int, model: Model) -> None:
        """Copy the parameters as they are now."""
        self.trajectory[epoch].copy_(flat(dict(model.named_parameters())).detach())


class Expert(TrainOn):
    """A network trained on the real data by plain SGD, recorded after every epoch.

    Args:
        run: the run.
        options: of the method.
        number: of the expert.
        space: the units of pixels.
    """

    def __init__(self, run: Run, options: MTTOptions, number: int, space: PixelSpace) -> None:
        name = f"expert-{number}"
        model = whitened(draw_network(run, architectures(run)[0], "expert", number), space)
        data = DataModule({"train": run.data["train"]}, run.data.task, collate=run.data.collate, keys=run.data.keys)
        super().__init__(model, data, EvaluationOptions(), name=name, seed=derive_seed(run.seed, name) % 2**31,
                         augment=(options.augment, space))  # fmt: skip
        self.exports = {}
        self.recorder = Recorder(model, options.train_epochs)
        self.per_epoch = data.steps_per_epoch("train", options.batch_expert) or 1
        steps = options.train_epochs * self.per_epoch
        sgd = {"name": "sgd", "lr": options.lr_expert, "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}
        self.overrides = {"steps": steps, "batch_size": options.batch_expert, "optimizer": sgd, "schedule": "constant",
                          "clip_norm": None, "eval_every": steps,
                          "save_every": run.recipe.train.save_every or max(1, steps // 4)}  # fmt: skip

    def after_step(self) -> None:
        """Record at the end of an epoch."""
        epoch, rest = divmod(self.progress.step + 1, self.per_epoch)
        if rest == 0:
            self.recorder.record(epoch, self.student)


class Trajectories:
    """The recorded experts of a run, read from their artifacts row by row.

    Args:
        folder: the run folder.
        count: how many experts.
    """

    KEY = "recorder.trajectory"

    def __init__(self, folder: Path, count: int) -> None:
        self.files = [next((folder / "stages").glob(f"*-expert-{n}/artifact/stage.safetensors")) for n in range(count)]

    def row(self, expert: int, epoch: int) -> Tensor:
        """The parameters `[P]` of an expert after an epoch."""
        with safe_open(self.files[expert], framework="pt") as file:
            found: Tensor = file.get_slice(self.KEY)[epoch]
        return found


class Ticks(Dataset[dict[str, Any]]):
    """As many empty samples as processes: what a step needs is drawn from its number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {}


class TrajectoryMatching(Pixels):
    """From an expert's parameters after t epochs, N steps on the images are to lead where M more epochs led.

    Every process computes the same step. The rate of the N steps is learned with the images.
    """

    options: MTTOptions

    def __init__(self, run: Run, real: RealImages, options: MTTOptions, space: PixelSpace) -> None:
        super().__init__(run, real, options, space)
        self.held = Held(draw_network(run, self.role, "expert", 0))
        check_network(self.held)
        self.rate = nn.Parameter(torch.tensor(float(options.lr_expert)), requires_grad=options.learn_lr)
        world = run.accelerator.num_processes
        self.data = DataModule({"train": Ticks(world)}, real.task, collate=lambda samples: {})
        self.trajectories = Trajectories(run.path, options.num_experts)
        self.overrides = self.settings(options.iterations, world)

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """SGD on the pixels and on the rate."""
        groups = [{"params": [self.pixels]}, {"params": [self.rate], "lr": self.options.lr_lr}]
        groups = groups if self.options.learn_lr else groups[:1]
        return {"loss": SGD(groups, lr=self.options.lr_img, momentum=self.options.momentum)}

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """The loss spans all processes."""
        return {"match": None}

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The normalised distance of the parameters."""
        start, target = (row.to(self.pixels.device) for row in self.segment())
        self.held.model.eval()
        like = dict(self.held.model.named_parameters())
        begin = {name: value.clone().requires_grad_() for name, value in unflat(start, like).items()}
        final = unroll(self._logits, begin, self.batches(), self.rate)
        return {"match": trajectory_distance(flat(final), start, target)}

    def segment(self) -> tuple[Tensor, Tensor]:
        """Parameters `[P]` at both ends of a random stretch of a random expert's trajectory."""
        o, generator = self.options, self.generator("segment")
        expert = int(torch.randint(o.num_experts, (), generator=generator))
        epoch = int(torch.randint(o.max_start_epoch, (), generator=generator))
        return self.trajectories.row(expert, epoch), self.trajectories.row(expert, epoch + o.expert_epochs)

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Augmented images and labels of the N steps."""
        o, generator, found = self.options, self.generator("batches"), []
        order = minibatches(len(self.pixels), o.batch_syn or len(self.pixels), generator)
        for _ in range(o.syn_steps):
            rows = next(order).to(self.pixels.device)
            change = draw(o.augment, generator, len(rows))
            images = self.pixels[rows]
            found.append((change(images) if change else images, self.labels[rows]))
        return found

    def after_step(self) -> None:
        """Keep the rate positive."""
        self.rate.clamp_(min=LOWEST_RATE)

    def _logits(self, parameters: dict[str, Tensor], pixels: Tensor) -> Tensor:
        return self.held(parameters, {"image": pixels if self.space.zca else self.space.inverse(pixels)})


def check_network(held: Held) -> None:
    """Refuse what an unroll cannot go through. Raises `ModelError`."""
    if held.norms:
        raise ModelError(
            "mtt steps through the student's parameters alone, and batch norms keep statistics beside them: take "
            "instance or layer norms (dd-convnet with norm=instance)"
        )


def whitened(model: Model, space: PixelSpace) -> Model:
    """The model behind the whitening, where there is one: what it is given are ordinary images."""

    def whiten(_: nn.Module, inputs: tuple[Batch]) -> tuple[Batch]:
        image = inputs[0]["image"]
        return ({**inputs[0], "image": space.to(image.device)(image)},)

    if space.zca:
        model.register_forward_pre_hook(whiten)
    return model


class MTT(Method):
    """Stages: `expert-0` and so on, `distil`, `data`, then a stage per network trained on each set.

    The ablation keeps random real images, and trains no expert.
    """

    roles = Roles(teachers=(), students=None)
    ablation: Mapping[str, Any] = {"method.iterations": 0, "method.baselines": []}
    cut: Mapping[str, Any] = {
        "method.iterations": 3,
        "method.num_experts": 1,
        "method.train_epochs": 2,
        "method.max_start_epoch": 1,
        "method.expert_epochs": 1,
        "method.syn_steps": 2,
        "method.batch_expert": 512,
        "method.eval_networks": 1,
        "method.baselines": [],
    }
    options: MTTOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `DataError` as DC, `ModelError` for a network with batch norms."""
        o = self.options
        real = RealImages.read(run.data, run.recipe.method.use, o.ipc if o.init == "real" else 1)
        space = PixelSpace(real.images, o.zca).to(run.device)
        check_network(Held(draw_network(run, architectures(run)[0], "check")))
        stage: Any = Pixels(run, real, o, space)
        train: dict[str, Any] = {}
        if o.iterations:
            for number in range(o.num_experts):
                yield Expert(run, o, number, space)
            stage = yield TrajectoryMatching(run, real, o, space)
            train = {"optimizer": {"name": "sgd", "lr": stage.rate.item()}} if o.learn_lr else {}
        rows = yield WriteWhitened(lambda: columns(stage), o, run.data.task, space)
        yield from train_networks(
            run, o, rows, augment=(o.augment, space), train=train, wrap=lambda model: whitened(model, space)
        )

    def restore(self, student: Model | None, folder: Path) -> Model:
        """The student, behind the whitening that it was trained with."""
        student = super().restore(student, folder)
        found = [f for parent in folder.parents for f in parent.glob(f"stages/*-data/artifact/{WHITENING}")]
        if found:
            space = PixelSpace(torch.zeros(2, 1, 1, 1))
            space.zca = True
            for name, value in load_file(found[0]).items():
                space.register_buffer(name, value)
            whitened(student, space)
        return student


class WriteWhitened(WriteData):
    """As `WriteData`, with the whitening beside the data set, where there is one."""

    def __init__(self, columns: Any, options: MTTOptions, task: Any, space: PixelSpace) -> None:
        super().__init__(columns, options, task)
        self.space = space

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Write both."""
        super().execute(run, workspace, artifact)
        if self.space.zca:
            save_file({name: value.contiguous().cpu() for name, value in self.space.state_dict().items()},
                      artifact / WHITENING)  # fmt: skip
