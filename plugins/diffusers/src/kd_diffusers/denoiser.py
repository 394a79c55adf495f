"""A denoiser behind the uniform call, with the process that noises its inputs and the frozen rest of its pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_diffusers.calls import predict
from kd_diffusers.pipeline import Rest, as_pixels
from kd_diffusers.process import Process
from kdcore.data import derive_seed
from kdcore.errors import ModelError
from kdcore.models import Batch, Model, Outputs

FACTS = "denoiser.json"
"""What stands beside a saved denoiser: where the rest of its pipeline came from, and how timesteps are drawn."""

Predict = Callable[[nn.Module, Batch], Tensor]


class Denoiser(Model):
    """A denoiser: `forward(batch)` gives `Outputs(extras={"prediction": [B, ...]})` and the features of its taps.

    A batch that was noised (see `noised`) is taken as it is. One that was not is noised first, by sample index alone:
    always at the same level with the same noise.

    Args:
        module: the network.
        process: what noises its inputs and says what it predicts.
        rest: VAE and text encoders, where there are any.
        predict: `predict(module, noised batch) -> prediction`; default: as models of diffusers are called.
        save: `save(folder)` writes the network; default: as diffusers does, or `model.safetensors` for another module.
        stages: module names of the blocks, shallow to deep.
    """

    def __init__(
        self,
        module: nn.Module,
        process: Process,
        *,
        rest: Rest | None = None,
        predict: Predict = predict,
        save: Callable[[Path], None] | None = None,
        stages: Sequence[str] = (),
    ) -> None:
        super().__init__(
            module,
            lambda network, batch: Outputs(extras={"prediction": predict(network, batch)}),
            save=save or (self._save_native if hasattr(module, "save_pretrained") else None),
            stages=stages,
        )
        self.process, self.rest, self._predict = process, rest, predict

    def forward(self, batch: Batch) -> Outputs:
        """The prediction for a batch."""
        return super().forward(batch if "noised" in batch else self.noised(batch))

    def like(
        self, module: nn.Module, *, save: Callable[[Path], None] | None = None, stages: Sequence[str] = ()
    ) -> Denoiser:
        """Another network with the same process and the same rest of the pipeline."""
        return Denoiser(module, self.process, rest=self.rest, predict=self._predict, save=save, stages=stages)

    def noised(self, batch: Batch, *key: object) -> Batch:
        """A batch with everything that a denoiser reads, encoded once for all that share it.

        To the entries of `encoded` come `timestep` `[B]`, and `noise` and `noised`, shaped as the latents. Level and
        noise of a sample depend on the key and its `index` only: on several processes they are as on one.
        """
        batch = self.encoded(batch, *key)
        clean = batch["latents"]
        levels, noises = [], []
        for index in batch["index"].tolist():
            generator = torch.Generator().manual_seed(derive_seed("noise", *key, index))
            levels.append(self.process.draw(clean.shape[1:], generator))
            noises.append(torch.randn(clean.shape[1:], generator=generator))
        timestep, noise = torch.stack(levels).to(clean.device), torch.stack(noises).to(clean.device)
        return {**batch, "timestep": timestep, "noise": noise, "noised": self.process.noised(clean, noise, timestep)}

    def encoded(self, batch: Batch, *key: object) -> Batch:
        """A batch with `latents` (of `image`) and the embeddings of its captions (`text`, or that or `text_pair` at
        random), where they are not there.

        Raises:
            ModelError: if it has neither images nor latents, or captions that nothing encodes.
        """
        found = dict(batch)
        if "latents" not in batch:
            if "image" not in batch:
                raise ModelError(f"a denoiser reads 'image' [B, 3, H, W] in [0, 1] or 'latents' [B, C, h, w]; "
                                 f"the data gives: {', '.join(batch)}")  # fmt: skip
            found["latents"] = self._latents(batch, key)
        if "text" in batch and "prompt_embeds" not in batch and self.rest is not None:
            found |= self.rest.encode_captions(one_caption(batch, *key), found["latents"].device)
        return found

    def unconditional(self, batch: Batch) -> Batch:
        """The batch without its condition: the empty caption, or zeros where there is no text encoder; the label
        beyond the last class."""
        found = dict(batch)
        if "text" in batch and self.rest is not None and self.rest.has_text_encoder:
            device = batch["index"].device
            return found | self.rest.encode_captions([""] * len(batch["index"]), device)
        for key in ("prompt_embeds", "pooled_prompt_embeds"):
            if key in batch:
                found[key] = torch.zeros_like(batch[key])
        if "label" in batch:
            classes = getattr(self.module, "config", {}).get("num_embeds_ada_norm", 0)
            found["label"] = torch.full_like(batch["label"], classes or 0)
        return found

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as images `[B, 3, H, W]` in [0, 1]."""
        return as_pixels(latents) if self.rest is None else self.rest.decode(latents)

    def _latents(self, batch: Batch, key: tuple[object, ...]) -> Tensor:
        images = batch["image"]
        if self.rest is None:
            return 2 * images - 1
        shape = self.rest.latent_shape(images)
        seeds = [derive_seed("posterior", *key, index) for index in batch["index"].tolist()]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return self.rest.encode_images(images, noise.to(images.device))

    def _save_native(self, folder: Path) -> None:
        """Write the denoiser as diffusers does, its scheduler, and what else is needed to load it here."""
        module: Any = self.module
        module.save_pretrained(folder)
        self.save_facts(folder)

    def save_facts(self, folder: Path) -> None:
        """Write the scheduler and `denoiser.json` into the folder of a saved network."""
        self.process.scheduler.save_pretrained(folder / "scheduler")
        facts: dict[str, Any] = {
            key: getattr(self.process, key) for key in ("mean", "std") if hasattr(self.process, key)
        }
        if self.rest is not None:
            facts |= {"pipeline": self.rest.where, "denoiser": self.rest.denoiser,
                      "max_sequence_length": self.rest.max_sequence_length}  # fmt: skip
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def one_caption(batch: Batch, *key: object) -> list[str]:
    """The captions of a batch; of samples with two (`text` and `text_pair`), one by the key and the sample's index."""
    if "text_pair" not in batch:
        return list(batch["text"])
    pairs = zip(batch["text"], batch["text_pair"], batch["index"].tolist(), strict=True)
    return [(one, two)[derive_seed("caption", *key, index) & 1] for one, two, index in pairs]


def as_denoiser(model: Any, who: str) -> Denoiser:
    """The model, if it is a denoiser. Raises `ModelError` if not."""
    if not isinstance(model, Denoiser):
        raise ModelError(f"{who} is no denoiser: take one of the component `diffusers`, or wrap a network in "
                         "kd_diffusers.denoiser.Denoiser")  # fmt: skip
    return model
