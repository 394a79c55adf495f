"""How a batch becomes the arguments of a denoiser, and its answer a prediction.

What the `forward` of a diffusers model asks for by name is read from the batch: see `ARGUMENTS`. Flux differs in that
it reads packed latents with positions, and PixArt and SDXL in that part of their condition comes in a dict.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.errors import ModelError
from kdcore.models import Batch, map_tensors

ARGUMENTS = {
    "encoder_hidden_states": "prompt_embeds",
    "pooled_projections": "pooled_prompt_embeds",
    "encoder_attention_mask": "prompt_attention_mask",
    "class_labels": "label",
}
"""Arguments of `forward` and the batch entries that they are given."""
OPTIONAL = ("encoder_attention_mask",)


def predict(module: nn.Module, batch: Batch) -> Tensor:
    """The prediction of a denoiser of diffusers for a noised batch, `[B, C, H, W]` in float32.

    Raises:
        ModelError: if the batch lacks a condition that the model reads.
    """
    config, noised = _config(module), batch["noised"]
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    given = map_tensors(condition(module, batch, config), lambda t: t.to(dtype) if t.is_floating_point() else t)
    packed = "img_ids" in inspect.signature(module.forward).parameters
    if packed:
        given |= _flux_arguments(module, batch, given, dtype)
        latents: Tensor = pack(noised)
    else:
        given["timestep"] = batch["timestep"] * float(config.get("timestep_scale") or 1.0)
        latents = noised
    found = module(latents.to(dtype), return_dict=False, **given)[0].float()
    if packed:
        return unpack(found, noised.shape[-2], noised.shape[-1])
    wide = found.ndim > 1 and found.shape[1] == 2 * noised.shape[1]
    return found.chunk(2, dim=1)[0] if wide else found  # the other half is the learned variance (DiT, PixArt)


def condition(module: nn.Module, batch: Batch, config: Any) -> dict[str, Any]:
    """The conditioning arguments of a model's `forward`."""
    arguments: dict[str, Any] = {}
    for name in inspect.signature(module.forward).parameters:
        if name == "added_cond_kwargs" and (added := added_condition(module, batch, config)):
            arguments[name] = added
        if name not in ARGUMENTS or not reads(module, name, config):
            continue
        if (key := ARGUMENTS[name]) in batch:
            arguments[name] = batch[key]
        elif name not in OPTIONAL:
            what = {"prompt_embeds": "[B, T, D]", "pooled_prompt_embeds": "[B, P]", "label": "[B]"}[key]
            raise ModelError(f"{type(module).__name__} reads the batch entry {key!r} {what} ({name}), and the data "
                             f"gives: {', '.join(batch)}. Give it as a column, or name a `pipeline` whose text "
                             "encoders make it of the entry 'text'")  # fmt: skip
    return arguments


def reads(module: nn.Module, argument: str, config: Any) -> bool:
    """Whether a model with this config uses an argument that its `forward` has."""
    if argument == "class_labels":
        embedded = config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None
        return embedded or type(module).__name__ == "DiTTransformer2DModel"
    return argument != "encoder_hidden_states" or config.get("cross_attention_dim", 0) is not None


def added_condition(module: nn.Module, batch: Batch, config: Any) -> dict[str, Any] | None:
    """The dict of further conditions: sizes for PixArt, pooled text and sizes for SDXL; `None` for other models."""
    if type(module).__name__ == "PixArtTransformer2DModel":
        if not getattr(module, "use_additional_conditions", False):
            return {"resolution": None, "aspect_ratio": None}
        height, width = (8 * side for side in batch["noised"].shape[-2:])
        size = torch.tensor([[height, width]], device=batch["noised"].device, dtype=torch.float32)
        size = size.expand(len(batch["noised"]), 2)
        return {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
    if config.get("addition_embed_type") != "text_time":
        return None
    if "pooled_prompt_embeds" not in batch:
        raise ModelError(f"{type(module).__name__} reads the batch entry 'pooled_prompt_embeds' [B, P]; the data "
                         f"gives: {', '.join(batch)}")  # fmt: skip
    side = 8 * batch["noised"].shape[-1]
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=batch["noised"].device)
    return {"text_embeds": batch["pooled_prompt_embeds"],
            "time_ids": batch.get("time_ids", sizes.expand(len(batch["noised"]), 6))}  # fmt: skip


def _flux_arguments(module: nn.Module, batch: Batch, given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    noised = batch["noised"]
    rows, columns = (torch.arange(side // 2, device=noised.device) for side in noised.shape[-2:])
    ids = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    words = given["encoder_hidden_states"].shape[1]
    extra = {
        "timestep": batch["timestep"].to(dtype) / 1000,
        "img_ids": torch.cat([torch.zeros_like(ids[:, :1]), ids], dim=1).to(dtype),
        "txt_ids": torch.zeros(words, 3, device=noised.device, dtype=dtype),
    }
    if _config(module).get("guidance_embeds"):
        extra["guidance"] = batch.get("guidance", torch.full((len(noised),), 3.5, device=noised.device)).to(dtype)
    return extra


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as 2x2 patches `[B, H/2 * W/2, 4C]`. Raises `ModelError` if a side is odd."""
    height, width = latents.shape[-2:]
    if height % 2 or width % 2:
        raise ModelError(f"Flux reads 2x2 patches, and latents of {height} x {width} do not split into them")
    patches = latents.unflatten(3, (width // 2, 2)).unflatten(2, (height // 2, 2))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """What `pack` made, as `[B, C, H, W]` again."""
    grid = patches.unflatten(1, (height // 2, width // 2)).unflatten(3, (-1, 2, 2))
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), -1, height, width)


def _config(module: Any) -> Any:
    return getattr(module, "config", {})
