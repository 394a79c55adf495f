"""The method: analyse, cut, distil, quantise, measure.

Source: Kwon et al., HierarchicalPrune: Position-Aware Compression for Large-Scale Diffusion Models, AAAI 2026
(arXiv 2508.04663).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch

from kd_diffusers.denoiser import Denoiser, as_denoiser
from kd_diffusers.train import Denoise
from kd_hierarchical_prune import nf4, surgery
from kd_hierarchical_prune.analysis import ChooseCut, Contribution, block_numbers, contributions, replacement
from kd_hierarchical_prune.blocks import count, find_blocks
from kd_hierarchical_prune.distill import PruneDistill
from kd_hierarchical_prune.measure import Measure, Measured
from kd_hierarchical_prune.options import HierarchicalPruneOptions
from kdcore import Method, Model, Roles, Run, Stage

logger = logging.getLogger(__name__)


class HierarchicalPrune(Method):
    """The stages: `teacher` (if it is to be trained first), `contribution` (unless the cut is given), `cut`,
    `measure-cut`, `distill`, `quantize` (if asked for), `measure`.

    The ablation prunes alike and trains as long, all weights on the denoiser's own loss: pruning alone, without weight
    preservation and distillation.
    """

    roles = Roles(students=(), splits=("train",))
    stage_names = ("teacher", "contribution", "cut", "measure-cut", "distill", "quantize", "measure")
    ablation: Mapping[str, Any] = {"method.pwp": False, "method.l_task": 1.0, "method.l_out": 0.0, "method.l_feat": 0.0}
    cut: Mapping[str, Any] = {"method.samples": 2, "method.sampling_steps": 2}
    options: HierarchicalPruneOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `ModelError` where the teacher is no denoiser, or has no list of blocks, and
        `RecipeError` where the cut cannot be made."""
        o = self.options
        teacher = as_denoiser(run.teacher, "teachers.teacher")
        blocks = find_blocks(teacher.module, o.blocks)
        if o.quantize == "nf4":
            nf4.bitsandbytes()  # told before anything is trained
        only = None if o.train_blocks is None else block_numbers(o.train_blocks, blocks, "train_blocks")
        if o.train_teacher:
            yield Denoise(teacher, key=run.seed, name="teacher", role="teacher")
        teacher.freeze()
        archive = []
        if o.cut_blocks is None or o.sgd_mode == "inverse":
            archive = yield Contribution(teacher, blocks, o)
        facts = yield ChooseCut(teacher, blocks, o, archive)
        found = surgery.cut(teacher, facts["cut"], o.blocks, replacement(o))
        run.adopt("student", found.model)
        split = run.recipe.eval.on[0] if run.recipe.eval.on[0] in run.data else "train"
        before: Measured = yield Measure("measure-cut", {"teacher": teacher, "cut": found.model}, teacher, split, o)
        if self._trains(facts["cut"]):
            surgery.freeze(found, o.pwp, only)
            guided = o.sgd_mode == "inverse" and 1 - facts["ratio"] > o.sgd_threshold
            stage = PruneDistill(found, teacher, blocks, o, run.seed, contributions(archive) if guided else None)
            yield stage
            stage.close()
        models = {"student": found.model}
        parameters = {"student, nf4": count(found.model.module)}
        if o.quantize == "nf4":
            models["student, nf4"] = yield Quantize(found, run)
            run.adopt("student", models["student, nf4"])
        after: Measured = yield Measure("measure", models, teacher, split, o, before, parameters)
        self._report(run, split, {**before.rows, **after.rows}, list(models)[-1])

    def restore(self, student: Model | None, folder: Path) -> Model:
        """The student in a folder. Raises `ModelError` if it is none of diffusers."""
        return student if student is not None else surgery.load(folder)

    def _trains(self, cut: list[Any]) -> bool:
        o = self.options
        if not cut:
            logger.warning("nothing is pruned, so there is nothing to distil")
        return bool(cut) and bool(o.l_task or o.l_out or o.l_feat)

    def _report(self, run: Run, split: str, rows: Mapping[str, Mapping[str, float]], last: str) -> None:
        name = f"{split}/output-distance"
        run.add_metric(name, rows[last]["output-distance"], higher_is_better=False)
        run.add_metric(f"{split}/output-distance-cut", rows["cut"]["output-distance"], higher_is_better=False)
        for model, row in rows.items():
            figures = {key: value for key, value in row.items() if key != "output-distance"}
            run.rows.append({"model": model, name: row["output-distance"], **figures})


class Quantize(Stage):
    """The student with 4-bit weights. The artifact says which layers they are, and the sizes before and after.

    Args:
        found: the trained student, which stays as it is.
        run: gives the type of computation.
    """

    name = "quantize"

    def __init__(self, found: surgery.Cut, run: Run) -> None:
        self.found = found
        types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        self.compute = types[run.recipe.train.precision]

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Write the names of the layers."""
        layers = list(nf4.linears(self.found.model.module))
        (artifact / "layers.json").write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")

    def load(self, run: Run, artifact: Path) -> Denoiser:
        """The quantised student."""
        found = self.found
        return surgery.with_module(
            found.model, nf4.quantized(found.model.module, self.compute), found.removed, found.how
        )
