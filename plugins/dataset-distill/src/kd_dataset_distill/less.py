"""LESS: which training samples move a model the way that a few target samples ask for.

Source: Xia et al. 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning" (arXiv 2402.04333).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Subset

from kd_dataset_distill.functional import adam_direction, influence
from kd_dataset_distill.networks import architectures, draw
from kd_dataset_distill.options import CoresetOptions, LoRAOptions
from kdcore import DataModule, Model, Run, Stage
from kdcore.data import derive_seed, to_device
from kdcore.errors import ModelError
from kdcore.models import Batch
from kdcore.recipe import TrainOptions
from kdcore.stages import Supervised

TOGETHER = 16
"""Gradients that are projected together."""
SHARD = 64
BLOCK = 4096
"""Rows of the random projection that are in memory at a time."""


class Moments(nn.Module):
    """What the warm-up leaves for each epoch: parameters and Adam's moments `[E, P]`, and the mean rate `[E]`."""

    same_everywhere = True

    def __init__(self, epochs: int, size: int) -> None:
        super().__init__()
        for name in ("values", "exp_avg", "exp_avg_sq"):
            self.register_buffer(name, torch.zeros(epochs, size))
        self.register_buffer("rates", torch.zeros(epochs))


class WarmUp(Supervised):
    """Brief training on a random part of the data by Adam; its state is kept after every epoch.

    The network is a fresh one of the student's architecture, or adapters of it.

    Args:
        run: the run.
        options: of the method.
    """

    def __init__(self, run: Run, options: CoresetOptions) -> None:
        model = draw(run, architectures(run)[0], "warm-up")
        if options.lora is not None:
            add_adapters(model, options.lora)
        super().__init__(model, run.data.task, name="warm-up")
        self.exports = {}
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.data = _part(run, options.warmup_fraction)
        per_epoch = self.data.steps_per_epoch("train", run.recipe.train.batch_size) or 1
        self.per_epoch, steps = per_epoch, per_epoch * options.warmup_epochs
        self.moments = Moments(options.warmup_epochs, sum(p.numel() for p in self.trained))
        adam = {"name": "adamw", "lr": options.warmup_lr, "weight_decay": 0.0}
        self.overrides = {"steps": steps, "optimizer": adam, "schedule": {"name": "linear", "warmup": 0.03},
                          "eval_every": 1 << 30, "save_every": run.recipe.train.save_every or per_epoch}  # fmt: skip

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """AdamW without decay, whose state is read after each epoch."""
        self.adam = AdamW(self.trained, lr=train.optimizer.lr, weight_decay=0.0)
        return {"loss": self.adam}

    def after_step(self) -> None:
        """Add up the rates of an epoch, and at its end keep the state."""
        step, kept = self.progress.step, self.moments
        kept.rates[step // self.per_epoch] += self.adam.param_groups[0]["lr"] / self.per_epoch
        epoch, rest = divmod(step + 1, self.per_epoch)
        if rest == 0:
            kept.values[epoch - 1].copy_(_flat(self.trained))
            for name in ("exp_avg", "exp_avg_sq"):
                getattr(kept, name)[epoch - 1].copy_(_flat([self.adam.state[p][name] for p in self.trained]))


class Influence(Stage):
    """Gradient features of all training samples and of the target's, at every checkpoint; then their similarity.

    Training features are Adam's directions, the target's are plain gradients; both are projected by random signs and
    brought to length one. They are written in shards, which the processes share.

    Args:
        warm: the finished warm-up.
        options: of the method.
    """

    name = "influence"

    def __init__(self, warm: WarmUp, options: CoresetOptions) -> None:
        self.warm, self.options = warm, options

    def share(self, run: Run, workspace: Path) -> None:
        """Write this process's shards that are not there yet."""
        rank, world = run.accelerator.process_index, run.accelerator.num_processes
        self.warm.to(run.device).eval()
        for number, (path, split, checkpoint, first) in enumerate(self._shards(run, workspace)):
            if number % world == rank and not path.exists():
                rows = range(first, min(first + SHARD, run.data.size(split) or 0))
                temporary = path.with_suffix(".tmp")
                save_file(self._features(run, split, checkpoint, rows), temporary)
                temporary.rename(path)

    def _shards(self, run: Run, workspace: Path) -> list[tuple[Path, str, int, int]]:
        """File, split, checkpoint and first row of each."""
        where = workspace / "features"
        where.mkdir(parents=True, exist_ok=True)
        return [(where / f"{split}-{checkpoint}-{first}.safetensors", split, checkpoint, first)
                for checkpoint in range(self.options.warmup_epochs) for split in ("train", self.options.target)
                for first in range(0, run.data.size(split) or 0, SHARD)]  # fmt: skip

    def _features(self, run: Run, split: str, checkpoint: int, rows: range) -> dict[str, Tensor]:
        """`features` `[N, D]` of these samples, and `subtasks` `[N]` of the target's."""
        kept, parameters = self.warm.moments, self.warm.trained
        _put(kept.values[checkpoint].to(run.device), parameters)
        samples = DataModule({"train": Subset(run.data[split], rows)}, run.data.task, collate=run.data.collate,
                             keys=run.data.keys)  # fmt: skip
        gradients, features, tasks = [], [], []
        for batch in samples.eval_loader("train", 1):
            batch = to_device(batch, run.device)
            (loss,) = self.warm(batch).values()
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            gradients.append(_flat(found))
            tasks.append(self._subtask(batch) if split == self.options.target else 0)
            if len(gradients) == TOGETHER or len(tasks) == len(rows):
                vectors, gradients = torch.stack(gradients), []
                if split == "train":
                    moments = (getattr(kept, name)[checkpoint].to(run.device) for name in ("exp_avg", "exp_avg_sq"))
                    vectors = adam_direction(vectors, *moments)
                features.append(F.normalize(project(vectors, self.options.proj_dim, run.seed)).cpu())
        return {"features": torch.cat(features), "subtasks": torch.tensor(tasks)}

    def _subtask(self, batch: Batch) -> int:
        key = self.options.subtask
        if key is None:
            return 0
        if key not in batch:
            raise ModelError(f"method.subtask: the batch has no {key!r}; it has: {', '.join(batch)}")
        return int(batch[key])

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Scores from all shards."""
        found: dict[tuple[str, int], list[dict[str, Tensor]]] = {}
        for path, split, checkpoint, _ in self._shards(run, workspace):
            found.setdefault((split, checkpoint), []).append(load_file(path))
        count, target = range(self.options.warmup_epochs), self.options.target
        train, goal = (torch.stack([torch.cat([part["features"] for part in found[split, k]]) for k in count])
                       for split in ("train", target))  # fmt: skip
        subtasks = torch.cat([part["subtasks"] for part in found[target, 0]])
        scores = influence(train, goal, self.warm.moments.rates.cpu(), subtasks)
        save_file({"scores": scores}, artifact / "scores.safetensors")

    def load(self, run: Run, artifact: Path) -> dict[str, Tensor]:
        """`scores` `[N]` of the training samples."""
        return load_file(artifact / "scores.safetensors")


def project(vectors: Tensor, dim: int, seed: int) -> Tensor:
    """Vectors `[N, P]` times random signs `[P, dim]`, made block by block; as they are if P is not larger."""
    size = vectors.shape[1]
    if size <= dim:
        return vectors
    out = vectors.new_zeros(len(vectors), dim)
    for start in range(0, size, BLOCK):
        block = vectors[:, start : start + BLOCK]
        generator = torch.Generator().manual_seed(derive_seed(seed, "projection", start))
        signs = torch.randint(2, (block.shape[1], dim), generator=generator, dtype=torch.int8).to(block.device)
        out += block @ (2 * signs.to(block.dtype) - 1)
    return out / dim**0.5


def add_adapters(model: Model, options: LoRAOptions) -> None:
    """Put low-rank adapters into the model; nothing else of it is trained.

    Raises:
        ModelError: if peft is not installed, or the model has none of the layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ModelError("method.lora needs peft: pip install 'kd-dataset-distill[text]'") from error
    config = LoraConfig(r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout,
                        target_modules=options.targets)  # fmt: skip
    try:
        inject_adapter_in_model(config, model.module)
    except ValueError as error:
        raise ModelError(f"method.lora.targets: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def _part(run: Run, fraction: float) -> DataModule:
    """A random part of the training data."""
    size = run.data.size("train") or 0
    generator = torch.Generator().manual_seed(derive_seed(run.seed, "warm-up"))
    rows = torch.randperm(size, generator=generator)[: max(1, round(fraction * size))].tolist()
    return DataModule({"train": Subset(run.data["train"], rows)}, run.data.task, collate=run.data.collate,
                      keys=run.data.keys)  # fmt: skip


def _flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _put(vector: Tensor, parameters: list[nn.Parameter]) -> None:
    with torch.no_grad():
        for part, parameter in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True):
            parameter.copy_(part.view_as(parameter))
