"""Training a denoiser: on its own loss, and on a teacher's predictions."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_diffusers.denoiser import Denoiser, as_denoiser
from kd_diffusers.options import DenoiseOptions
from kd_diffusers.sampling import is_picture, sample, save_grid
from kdcore import Method, Roles, Run, Stage, TrainStage
from kdcore.data import to_device
from kdcore.models import Batch


class Denoise(TrainStage):
    """A denoiser on its own loss, and on the distance to a teacher's predictions for the same noised inputs.

    The terms are `task`, `mean (prediction - target)^2`, and `output`, `mean (prediction - teacher's)^2`, both with
    their weights.

    Args:
        student: what is trained.
        teacher: a frozen denoiser, or `None`.
        task_weight, output_weight: of the terms; one with weight 0 is not computed.
        key: seeds level and noise, with the step and the sample index.
        name: the stage's name.
        role: under which the trained model is saved with the artifact.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None = None,
        *,
        task_weight: float = 1.0,
        output_weight: float = 1.0,
        key: object = 0,
        name: str = "denoise",
        role: str = "student",
    ) -> None:
        super().__init__(name)
        self.student, self.key = student, key
        self.frozen = {"teacher": teacher.freeze()} if teacher is not None else {}
        self.exports = {role: student}
        self.task_weight, self.output_weight = task_weight, output_weight if teacher is not None else 0.0

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The weighted terms of one batch."""
        batch = self.student.noised(batch, self.key, self.progress.step)
        terms: dict[str, Tensor] = {}
        if self.output_weight:
            with torch.no_grad():
                wanted = self.frozen["teacher"](batch).extras["prediction"]
        prediction = self.student(batch).extras["prediction"]
        if self.task_weight:
            target = self.student.process.target(batch["latents"], batch["noise"], batch["timestep"])
            terms["task"] = self.task_weight * (prediction - target).square().mean()
        if self.output_weight:
            terms["output"] = self.output_weight * (prediction - wanted).square().mean()
        return terms


class DenoiseMethod(Method):
    """Two stages: `denoise`, then `samples`, a grid of pictures. With a teacher in the recipe, plain distillation."""

    roles = Roles(teachers=(), splits=("train",))
    stage_names = ("denoise", "samples")
    options: DenoiseOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `ModelError` if a model is no denoiser."""
        o = self.options
        student = as_denoiser(run.student, "students.student")
        teachers = {role: as_denoiser(model, f"teachers.{role}") for role, model in run.teachers().items()}
        teacher = teachers.get("teacher")
        yield Denoise(student, teacher, task_weight=o.task_weight, output_weight=o.output_weight, key=run.seed)
        on = run.recipe.eval.on[0]
        if on in run.data:
            size = run.recipe.train.eval_batch_size or run.recipe.train.batch_size
            run.add_metric(f"{on}/denoising-loss", mean_loss(run, student, on, size), higher_is_better=False)
            if teacher is not None:
                value = mean_distance(run, student, teacher, on, size)
                run.add_metric(f"{on}/output-distance", value, higher_is_better=False)
        models = {**teachers, "student": student}
        yield Samples(models, on if on in run.data else "train", o.samples, o.sampling_steps, o.guidance)


class Samples(Stage):
    """Pictures of several denoisers for the same captions and the same noise, in `samples.png`, a row per model.

    Args:
        models: by the name of their row.
        split: where captions or labels are taken from.
        count: how many.
        steps, guidance: of the sampler.
    """

    name = "samples"

    def __init__(self, models: dict[str, Denoiser], split: str, count: int, steps: int, guidance: float) -> None:
        self.models, self.split, self.count, self.steps, self.guidance = models, split, count, steps, guidance

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Draw the pictures; nothing where there is none to draw."""
        if not self.count:
            return
        batch = to_device(run.data.sample(self.split, self.count), run.device)
        rows = {name: pictures(model.to(run.device), batch, self.steps, self.guidance, run.seed)
                for name, model in self.models.items()}  # fmt: skip
        save_grid({k: v for k, v in rows.items() if v is not None}, artifact / "samples.png", batch.get("text", ()))

    def load(self, run: Run, artifact: Path) -> Path | None:
        """The picture's file, if there is one."""
        return path if (path := artifact / "samples.png").is_file() else None


def pictures(model: Denoiser, batch: Batch, steps: int, guidance: float, seed: int) -> Tensor | None:
    """Pictures `[B, C, H, W]` in [0, 1] on the CPU, or `None` for latents that are none."""
    was_training = model.training
    latents = sample(model.eval(), batch, steps=steps, guidance=guidance, seed=seed)
    model.train(was_training)
    return model.decode(latents).cpu() if is_picture(latents) else None


@torch.no_grad()
def mean_loss(run: Run, model: Denoiser, split: str, size: int) -> float:
    """The denoiser's own loss over a split, at levels and noise fixed by sample index; the processes share the work."""
    model.to(run.device).eval()

    def losses(batch: Batch) -> Tensor:
        target = model.process.target(batch["latents"], batch["noise"], batch["timestep"])
        return per_sample(model(batch).extras["prediction"], target)

    return _mean(run, [losses(batch) for batch in noised_batches(run, model, split, size)])


@torch.no_grad()
def mean_distance(run: Run, model: Denoiser, teacher: Denoiser, split: str, size: int) -> float:
    """`mean (prediction - teacher's)^2` over a split, at levels and noise fixed by sample index: how far a denoiser's
    outputs are from its teacher's. The processes share the work."""
    model.to(run.device).eval()
    teacher.to(run.device).eval()
    found = [per_sample(model(batch).extras["prediction"], teacher(batch).extras["prediction"])
             for batch in noised_batches(run, teacher, split, size)]  # fmt: skip
    return _mean(run, found)


def noised_batches(run: Run, model: Denoiser, split: str, size: int) -> Iterator[Batch]:
    """This process's batches of a split on the device, noised by sample index alone."""
    accelerator = run.accelerator
    for batch in run.data.eval_loader(split, size, accelerator.process_index, accelerator.num_processes):
        yield model.noised(to_device(batch, run.device))


def per_sample(one: Tensor, two: Tensor) -> Tensor:
    """The mean squared difference of each sample, `[B]`."""
    return (one - two).square().flatten(1).mean(1)


def _mean(run: Run, values: list[Tensor]) -> float:
    """The mean over all processes."""
    found = torch.cat(values).double() if values else torch.zeros(0, dtype=torch.float64, device=run.device)
    total = torch.stack([found.sum(), torch.tensor(float(len(found)), dtype=torch.float64, device=run.device)])
    total = run.accelerator.reduce(total, "sum")
    return float(total[0] / total[1])
