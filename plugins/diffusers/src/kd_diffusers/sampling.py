"""Pictures from a denoiser: the sampler of its scheduler, and a grid of them in a file."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_diffusers.denoiser import Denoiser
from kd_diffusers.process import dynamic_mu
from kdcore.data import derive_seed
from kdcore.models import Batch

CELL, LABEL = 96, 120
"""Pixels of a cell of a grid at least, and of the column with the rows' names."""


@torch.no_grad()
def sample(model: Denoiser, batch: Batch, *, steps: int = 28, guidance: float = 1.0, seed: int = 0) -> Tensor:
    """Latents drawn under the conditions of a batch, `[B, C, H, W]`; its own latents only give their shape.

    The noise of a sample depends on the seed and its `index` only. `decode` of the model makes pictures of them.

    Args:
        model: the denoiser; used as it is, without gradient.
        batch: captions, embeddings or labels, and images or latents.
        steps: of the sampler.
        guidance: classifier-free guidance `u + guidance (c - u)`; up to 1: the conditional prediction alone. What a
            guidance-distilled Flux reads as its guidance.
        seed: of the noise.
    """
    batch = model.encoded(batch)
    shape, device = batch["latents"].shape, batch["latents"].device
    generators = [torch.Generator().manual_seed(derive_seed("sample", seed, i)) for i in batch["index"].tolist()]
    scheduler = _scheduler(model, shape, steps, device)
    latents = torch.stack([torch.randn(shape[1:], generator=g) for g in generators]).to(device)
    latents = latents * float(getattr(scheduler, "init_noise_sigma", 1.0))
    batch = batch | {"guidance": torch.full((shape[0],), guidance, device=device)}
    empty = model.unconditional(batch) if guidance > 1 and not _reads_guidance(model) else None
    extra: dict[str, Any] = {"generator": generators} if _takes(scheduler.step, "generator") else {}
    for timestep in scheduler.timesteps:
        levels = timestep.expand(shape[0]).to(device)
        state = {"noised": scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input")
                 else latents, "timestep": levels}  # fmt: skip
        prediction = model(batch | state).extras["prediction"]
        if empty is not None:
            without = model(empty | state).extras["prediction"]
            prediction = without + guidance * (prediction - without)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **extra)[0]
    return latents


def _scheduler(model: Denoiser, shape: torch.Size, steps: int, device: torch.device) -> Any:
    """A fresh copy of the model's scheduler, set to so many steps."""
    own = model.process.scheduler
    scheduler = type(own).from_config(own.config)
    mu = dynamic_mu(own, shape)
    scheduler.set_timesteps(steps, device=device, **({} if mu is None else {"mu": mu}))
    return scheduler


def _reads_guidance(model: Denoiser) -> bool:
    return bool(getattr(model.module, "config", {}).get("guidance_embeds"))


def _takes(function: Any, name: str) -> bool:
    return name in inspect.signature(function).parameters


def is_picture(latents: Tensor) -> bool:
    """Whether latents `[B, C, H, W]` can be drawn: they have an extent."""
    return latents.ndim == 4 and min(latents.shape[-2:]) > 1


def save_grid(rows: Mapping[str, Tensor], path: Path, columns: Sequence[str] = ()) -> None:
    """Write pictures `[N, 3, H, W]` (or one channel) in [0, 1] as one PNG: a row per name, a column per sample.

    Args:
        rows: pictures by the name of their row; the rows may be empty, and then nothing is written.
        path: the file.
        columns: what each column shows, as far as there is room to write it above.
    """
    from PIL import Image, ImageDraw
    from torchvision.transforms.functional import to_pil_image

    if not rows or not len(next(iter(rows.values()))):
        return
    first = next(iter(rows.values()))
    scale = max(1, -(-CELL // first.shape[-1]))
    width, height = (scale * side + 4 for side in (first.shape[-1], first.shape[-2]))
    head = 16 if columns else 0
    canvas = Image.new("RGB", (LABEL + width * len(first), head + height * len(rows)), "white")
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(columns[: len(first)]):
        draw.text((LABEL + column * width, 2), text[: width // 6], fill="black")
    for row, (name, pictures) in enumerate(rows.items()):
        draw.text((4, head + row * height + height // 2 - 6), name[: LABEL // 6], fill="black")
        for column, picture in enumerate(F.interpolate(pictures.float().cpu(), scale_factor=scale, mode="nearest")):
            canvas.paste(to_pil_image(picture.clamp(0, 1)), (LABEL + column * width, head + row * height))
    canvas.save(path)
