"""The frozen rest of a pipeline: VAE and text encoders, loaded when a batch first needs them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from torch import Tensor

from kd_diffusers.source import NetworkConfig, explained
from kdcore.errors import ModelError

ENCODED = {
    "StableDiffusion3": ("prompt_embeds", "", "pooled_prompt_embeds", ""),
    "StableDiffusionXL": ("prompt_embeds", "", "pooled_prompt_embeds", ""),
    "StableDiffusion": ("prompt_embeds", ""),
    "Flux": ("prompt_embeds", "pooled_prompt_embeds", ""),
    "PixArt": ("prompt_embeds", "prompt_attention_mask", "", ""),
    "Sana": ("prompt_embeds", "prompt_attention_mask", "", ""),
}
"""What `encode_prompt` of a family of pipelines returns, in its order, by the batch entries it becomes."""


@dataclass
class Rest:
    """VAE and text encoders of a pipeline.

    Args:
        where: Hub id or folder.
        denoiser: what the pipeline calls its denoiser, which is not loaded again.
        arguments: of `from_pretrained`.
        max_sequence_length: tokens of a caption, at most, where the pipeline can be told.
    """

    where: str
    denoiser: str
    arguments: dict[str, Any] = field(default_factory=dict)
    max_sequence_length: int = 256

    @functools.cached_property
    def pipe(self) -> Any:
        """The pipeline without its denoiser. Raises `ModelError` if it cannot be loaded."""
        with explained(f"the pipeline {self.where!r}", self.where):
            index = diffusers.DiffusionPipeline.load_config(self.where, revision=self.arguments.get("revision"))
            made = getattr(diffusers, index["_class_name"])
            parts = list(inspect.signature(made.__init__).parameters.values())[1:]
            needed = [part.name for part in parts if part.default is part.empty]
            absent = [self.denoiser, *(name for name in needed if not index.get(name, [None])[0])]  # such as no T5
            pipe = made.from_pretrained(self.where, use_safetensors=True, **dict.fromkeys(absent), **self.arguments)
            config = NetworkConfig.load_config(
                self.where, subfolder=self.denoiser, revision=self.arguments.get("revision")
            )
        stub = SimpleNamespace(config=SimpleNamespace(**config))  # text encoders ask it for widths
        setattr(pipe, self.denoiser, stub)
        for module in self._modules(pipe):
            module.requires_grad_(False).eval()
        return pipe

    @property
    def has_text_encoder(self) -> bool:
        """Whether it encodes captions."""
        return getattr(self.pipe, "text_encoder", None) is not None

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """The conditioning entries of a batch: `prompt_embeds` `[B, T, D]` and, with most, `pooled_prompt_embeds`
        `[B, P]` or `prompt_attention_mask` `[B, T]`.

        Raises:
            ModelError: for a pipeline without text encoders, or of a family that is not in `ENCODED`.
        """
        name = type(self.pipe).__name__
        family = next((f for f in ENCODED if name.startswith(f)), None)
        if family is None or not self.has_text_encoder:
            raise ModelError(f"{name} ({self.where}) encodes no captions here; give the batch entry 'prompt_embeds'. "
                             f"Those that do: {', '.join(ENCODED)}")  # fmt: skip
        given = {"prompt": list(captions), "prompt_2": None, "prompt_3": None, "device": device,
                 "num_images_per_prompt": 1, "do_classifier_free_guidance": False,
                 "max_sequence_length": self.max_sequence_length}  # fmt: skip
        encode = self._on(device).encode_prompt
        known = inspect.signature(encode).parameters
        found = encode(**{key: value for key, value in given.items() if key in known})
        return {key: value for key, value in zip(ENCODED[family], found, strict=True) if key and value is not None}

    @torch.no_grad()
    def encode_images(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images `[B, 3, H, W]` in [0, 1] as scaled latents `[B, C, h, w]` in float32.

        `noise`, shaped as the latents, draws from the VAE's posterior; without it its mean is taken. Pixels are moved
        to [-1, 1] where the pipeline has no VAE.
        """
        pixels = 2 * images - 1
        vae = getattr(self._on(images.device), "vae", None)
        if vae is None:
            return pixels
        encoded = vae.encode(pixels.to(vae.dtype))
        if not hasattr(encoded, "latent_dist"):  # DC-AE, which has no posterior
            return float(vae.config.scaling_factor) * encoded.latent.float()
        posterior = encoded.latent_dist
        latents = posterior.mean.float() if noise is None else posterior.mean.float() + posterior.std.float() * noise
        return (latents - float(vae.config.get("shift_factor") or 0.0)) * float(vae.config.scaling_factor)

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """The shape of one image's latents, `(C, h, w)`."""
        vae = getattr(self.pipe, "vae", None)
        if vae is None:
            return tuple(images.shape[1:])
        factor = int(getattr(self.pipe, "vae_scale_factor", 8))
        return (int(vae.config.latent_channels), images.shape[-2] // factor, images.shape[-1] // factor)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents as images `[B, 3, H, W]` in [0, 1]."""
        vae = getattr(self._on(latents.device), "vae", None)
        if vae is None:
            return as_pixels(latents)
        shift = float(vae.config.get("shift_factor") or 0.0)
        values = latents / float(vae.config.scaling_factor) + shift
        return as_pixels(vae.decode(values.to(vae.dtype), return_dict=False)[0].float())

    def _on(self, device: torch.device) -> Any:
        for module in self._modules(self.pipe):
            if module.device != device:
                module.to(device)
        return self.pipe

    def _modules(self, pipe: Any) -> list[Any]:
        return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def as_pixels(values: Tensor) -> Tensor:
    """Values in [-1, 1] as pixels in [0, 1]."""
    return (values / 2 + 0.5).clamp(0, 1)
