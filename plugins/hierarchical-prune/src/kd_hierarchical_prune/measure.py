"""Memory, latency, output distance and pictures of several denoisers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_diffusers.denoiser import Denoiser
from kd_diffusers.sampling import save_grid
from kd_diffusers.train import mean_distance, pictures
from kd_hierarchical_prune.blocks import count
from kd_hierarchical_prune.options import HierarchicalPruneOptions
from kdcore import Run, Stage
from kdcore.data import to_device

FIGURES, PICTURES = "figures.json", "pictures.safetensors"


@dataclass
class Measured:
    """What a measurement found.

    Args:
        rows: by model, `parameters`, `size_bytes`, `latency_ms`, on a GPU `peak_bytes`, and `output-distance`.
        pictures: by model, `[N, C, H, W]`; none for latents that are no pictures.
    """

    rows: dict[str, dict[str, float]]
    pictures: dict[str, Tensor] = field(default_factory=dict)


class Measure(Stage):
    """Figures and pictures of denoisers, beside those of an earlier measurement.

    Args:
        name: the stage's name.
        models: by name.
        teacher: the denoiser whose outputs are compared with.
        split: what is measured on.
        options: how many pictures, and how they are drawn.
        before: an earlier measurement, whose pictures stand above these.
        parameters: of models whose tensors do not tell, by name (4-bit weights).
    """

    def __init__(
        self,
        name: str,
        models: Mapping[str, Denoiser],
        teacher: Denoiser,
        split: str,
        options: HierarchicalPruneOptions,
        before: Measured | None = None,
        parameters: Mapping[str, int] | None = None,
    ) -> None:
        self.name, self.models, self.teacher, self.split, self.options = name, models, teacher, split, options
        self.before, self.parameters = before, parameters or {}
        self.distances: dict[str, float] = {}

    def share(self, run: Run, workspace: Path) -> None:
        """The output distances, all processes together."""
        size = run.recipe.train.eval_batch_size or run.recipe.train.batch_size
        self.distances = {name: mean_distance(run, model, self.teacher, self.split, size)
                          for name, model in self.models.items()}  # fmt: skip

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Measure, draw, and write the figures, the pictures and their grid."""
        rows: dict[str, dict[str, float]] = {}
        drawn: dict[str, Tensor] = {}
        batch = to_device(run.data.sample(self.split, max(self.options.samples, 1)), run.device)
        for name, model in self.models.items():
            rows[name] = {**self._cost(run, model, batch), "output-distance": self.distances[name]}
            rows[name]["parameters"] = float(self.parameters.get(name, count(model.module)))
            o = self.options
            if o.samples and (found := pictures(model, batch, o.sampling_steps, o.guidance, run.seed)) is not None:
                drawn[name] = found.contiguous()
        (artifact / FIGURES).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        if drawn:
            from safetensors.torch import save_file

            save_file(drawn, artifact / PICTURES)
            earlier = self.before.pictures if self.before else {}
            save_grid({**earlier, **drawn}, artifact / "samples.png", batch.get("text", ()))

    def load(self, run: Run, artifact: Path) -> Measured:
        """Figures and pictures."""
        from safetensors.torch import load_file

        found = artifact / PICTURES
        return Measured(json.loads((artifact / FIGURES).read_text()), load_file(found) if found.is_file() else {})

    def _cost(self, run: Run, model: Denoiser, batch: dict[str, Any]) -> dict[str, float]:
        model.to(run.device).eval()
        noised = model.noised(batch)
        cuda = run.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(run.device)
            held = torch.cuda.memory_allocated(run.device)
        found = model.describe(noised)
        cost = {"parameters": 0.0, "size_bytes": found["size_bytes"], "latency_ms": found["latency_ms"]}
        if cuda:  # its own weights and what a forward takes beside all else that lies there
            working = torch.cuda.max_memory_allocated(run.device) - held
            cost["peak_bytes"] = found["size_bytes"] + float(working)
        return cost
