"""Where the stages of a network and their patch embeddings are found."""

from __future__ import annotations

from collections.abc import Sequence

from kd_transkd.modules import STAGES
from kdcore import Model
from kdcore.errors import ModelError
from kdcore.models import Source


def tap_stages(model: Source, role: str, stages: Sequence[str]) -> list[str]:
    """Tap names of the four stages, shallow to deep.

    Raises:
        ModelError: if the patterns match nothing, or not four modules.
    """
    return _four(model.tap(*stages), role, "stages", stages)


def tap_embeddings(model: Source, role: str, embeds: Sequence[str], stages: Sequence[str]) -> list[str]:
    """Tap names of the four patch embeddings: those of the patterns, or else those found beside the stages.

    Raises:
        ModelError: if there are not four.
    """
    return _four(model.tap(*(embeds or find_embeddings(model, role, stages))), role, "embeds", embeds)


def find_embeddings(model: Source, role: str, stages: Sequence[str]) -> list[str]:
    """Names of the modules that make each stage's patches: `<stage>.patch_embeddings` (SegFormer of transformers), or
    `<stage>.downsample`, with `patch_embed` before the first (PVT v2 of timm).

    Raises:
        ModelError: if a stage has none of these.
    """
    assert isinstance(model, Model)
    names = {name for name, _ in model.module.named_modules()}
    found = []
    for stage in stages:
        parent = stage.rpartition(".")[0].rpartition(".")[0]
        first = f"{parent}.patch_embed".lstrip(".") if stage == stages[0] else ""
        candidates = (f"{stage}.patch_embeddings", f"{stage}.downsample", first)
        match = next((name for name in candidates if name in names), None)
        if match is None:
            raise ModelError(
                f"transkd found no patch embedding beside the {role}'s stage {stage!r}: name all four in "
                f"{role}_embeds, shallow to deep, or set embed=0 to distil the maps alone"
            )
        found.append(match)
    return found


def _four(names: list[str], role: str, what: str, patterns: Sequence[str]) -> list[str]:
    if len(names) != STAGES:
        raise ModelError(f"transkd pairs {STAGES} {what}, but {', '.join(patterns)} of the {role} are {len(names)} "
                         f"({', '.join(names)}): name {STAGES} in {role}_{what}, shallow to deep")  # fmt: skip
    return names
