"""How a batch enters a transformers model, and what comes out."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_transformers.heads import Head, is_decoder_only
from kd_transformers.images import Normalise
from kdcore.errors import ModelError
from kdcore.models import Batch, Outputs

TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")


class Call:
    """`call(module, batch) -> Outputs`; for heads with one row of logits per sample, with the embedding.

    The embedding `[B, D]` is the input of the classifier: of the linear layer with as many outputs as there are
    classes that runs last. For the head `encoder` it is the mean over the tokens, or the first one.

    Args:
        module: the model; hooks are set on its linear layers.
        head: what it predicts.
        pooling: how `encoder` pools.
        normalise: for images.
    """

    def __init__(self, module: Any, head: Head, pooling: Literal["mean", "cls"], normalise: Normalise) -> None:
        self.head, self.pooling, self.normalise = head, pooling, normalise
        self.config = module.config
        self.accepted = set(inspect.signature(module.forward).parameters)
        self.reads = "image" if module.main_input_name == "pixel_values" else "input_ids"
        self.decoder_only = is_decoder_only(module.config)
        self.caught: Tensor | None = None
        if head.pooled:
            for layer in module.modules():
                if isinstance(layer, nn.Linear) and layer.out_features == module.config.num_labels:
                    layer.register_forward_pre_hook(self.catch)

    def catch(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook. (A bound method, so that a copied model fills the copy's own call.)"""
        self.caught = args[0]

    def __call__(self, module: Any, batch: Batch) -> Outputs:
        """Run the model.

        Raises:
            ModelError: if the batch lacks the model's input, or the model cannot take its shape.
        """
        if self.reads not in batch:
            raise ModelError(f"{type(module).__name__} reads {self.reads!r}; the batch has: {', '.join(batch)}")
        self.caught = None
        inputs = self._image(module, batch["image"]) if self.reads == "image" else self._text(module, batch)
        try:
            found = module(**inputs)
        except ValueError as error:
            raise ModelError(f"{type(module).__name__} cannot take this batch of "
                             f"{self.reads} {list(batch[self.reads].shape)}: {error}") from error  # fmt: skip
        if self.head.name == "encoder":
            return Outputs(embedding=self._pool(module, found, inputs))
        return Outputs(logits=found.logits, embedding=self._embedding(found.logits, inputs))

    def _image(self, module: Any, image: Tensor) -> dict[str, Any]:
        channels = getattr(self.config, "num_channels", image.shape[1])
        if image.shape[1] != channels:
            raise ModelError(f"{type(module).__name__} reads images of {channels} channels, the batch's have "
                             f"{image.shape[1]}: convert them in the data, or set `config: {{num_channels: …}}` for a "
                             "model with fresh weights")  # fmt: skip
        return {"pixel_values": self.normalise(image, module.dtype)}

    def _text(self, module: Any, batch: Batch) -> dict[str, Any]:
        ids = batch["input_ids"]
        longest = getattr(self.config, "max_position_embeddings", None) or -1  # XLNet says -1 for no limit
        if 0 < longest < ids.shape[1]:
            raise ModelError(f"{type(module).__name__} reads at most {longest} tokens, the batch has {ids.shape[1]}: "
                             "shorten the texts in the data (`max_length`)")  # fmt: skip
        inputs = {key: batch[key] for key in TEXT_KEYS if key in batch and key in self.accepted}
        inputs.setdefault("attention_mask", torch.ones_like(ids))
        if self.decoder_only and "position_ids" in self.accepted:
            inputs["position_ids"] = _positions(inputs["attention_mask"])
        if "use_cache" in self.accepted:
            inputs["use_cache"] = False
        if self.head.name == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self._shifted(module, batch)
        return inputs

    def _shifted(self, module: Any, batch: Batch) -> Tensor:
        if "labels" not in batch or not hasattr(module, "prepare_decoder_input_ids_from_labels"):
            raise ModelError(f"{type(module).__name__} needs 'decoder_input_ids', or 'labels' to make them from; "
                             f"the batch has: {', '.join(batch)}")  # fmt: skip
        return module.prepare_decoder_input_ids_from_labels(labels=batch["labels"])  # type: ignore[no-any-return]

    def _embedding(self, logits: Tensor, inputs: dict[str, Any]) -> Tensor | None:
        caught, self.caught = self.caught, None
        if caught is None or caught.ndim == 2:
            return caught
        pad = getattr(self.config.get_text_config(), "pad_token_id", None)
        if caught.ndim != 3 or logits.ndim != 2 or "input_ids" not in inputs or pad is None:
            return None
        # every token went through the classifier: take the one whose logits the model took, the last that is no padding
        positions = torch.arange(caught.shape[1], device=caught.device)
        last = (positions * (inputs["input_ids"] != pad)).argmax(-1)
        return caught[torch.arange(len(caught), device=caught.device), last]

    def _pool(self, module: Any, found: Any, inputs: dict[str, Any]) -> Tensor:
        hidden = getattr(found, "last_hidden_state", None)
        if hidden is None:
            raise ModelError(f"{type(module).__name__} gives no hidden states to pool; use another head")
        if hidden.ndim == 4:
            return hidden.mean((2, 3))  # type: ignore[no-any-return]
        if self.pooling == "cls":
            return hidden[:, 0]  # type: ignore[no-any-return]
        if "attention_mask" not in inputs:
            return hidden.mean(1)  # type: ignore[no-any-return]
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)  # type: ignore[no-any-return]


def _positions(mask: Tensor) -> Tensor:
    """Positions `[B, T]` counted from the first token, so that padding on the left changes nothing."""
    first = mask.long().argmax(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)
