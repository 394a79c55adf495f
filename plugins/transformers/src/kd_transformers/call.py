"""How a batch enters a transformers model, and what comes out."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kd_transformers.heads import Head, is_decoder_only
from kd_transformers.images import Normalise
from kd_transformers.packed import takes_packed
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
        attentions: whether the attention maps are given, as `extras["attentions"]`.
        whole: whether logits are always made by the model, which may stand on several devices.
    """

    def __init__(
        self, module: Any, head: Head, pooling: Literal["mean", "cls"], normalise: Normalise, attentions: bool = False,
        whole: bool = False,
    ) -> None:  # fmt: skip
        self.extra = {"output_attentions": True} if attentions else {}
        self.head, self.pooling, self.normalise = head, pooling, normalise
        self.config = module.config
        self.accepted = set(inspect.signature(module.forward).parameters)
        self.reads = "image" if module.main_input_name == "pixel_values" else "input_ids"
        self.decoder_only = is_decoder_only(module.config)
        self.caught: Tensor | None = None
        self.apart = head.name == "causal-lm" and last_linear(module) is not None and not whole
        self.packed: bool | None = None
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
            if self.apart:
                found = module.base_model(**inputs, **self.extra)
                head = module.get_output_embeddings()
                return Outputs(embedding=found.last_hidden_state, head=head, extras=self._extras(found))
            found = module(**inputs, **self.extra)
        except ValueError as error:
            raise ModelError(f"{type(module).__name__} cannot take this batch of "
                             f"{self.reads} {list(batch[self.reads].shape)}: {error}") from error  # fmt: skip
        if self.head.name == "encoder":
            return Outputs(embedding=self._pool(module, found, inputs))
        return Outputs(logits=found.logits, embedding=self._embedding(found.logits, inputs), extras=self._extras(found))

    def _extras(self, found: Any) -> dict[str, Any]:
        maps = getattr(found, "attentions", None) if self.extra else None
        return {"attentions": list(maps)} if maps else {}

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
        length = ids.shape[1]
        if length > longest > 0 and "position_ids" in batch:
            length = int(batch["position_ids"].max()) + 1  # a row of several texts
        if 0 < longest < length:
            raise ModelError(f"{type(module).__name__} reads at most {longest} tokens, the batch has {length}: "
                             "shorten the texts in the data (`max_length`)")  # fmt: skip
        inputs = {key: batch[key] for key in TEXT_KEYS if key in batch and key in self.accepted}
        if "position_ids" in batch:
            inputs |= self._packed(module, batch)
        else:
            inputs.setdefault("attention_mask", torch.ones_like(ids))
        if self.decoder_only and "position_ids" not in inputs and "position_ids" in self.accepted:
            inputs["position_ids"] = _positions(inputs["attention_mask"])
        if "use_cache" in self.accepted:
            inputs["use_cache"] = False
        if self.head.name == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self._shifted(module, batch)
        return inputs

    def _packed(self, module: Any, batch: Batch) -> dict[str, Any]:
        """Rows of several texts: the model finds them by their positions, where it has no mask."""
        if self.packed is None:
            self.packed = self.decoder_only and takes_packed(module)
        if not self.packed:
            raise ModelError(f"{type(module).__name__} does not tell apart the texts of a packed row: set `packing` "
                             "and `padding_free` of the data to false, or another `attn_implementation`")  # fmt: skip
        return {"position_ids": batch["position_ids"], "attention_mask": None}

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


@torch.no_grad()
def last_linear(module: Any) -> nn.Linear | None:
    """The linear layer by which a language model makes its logits, if nothing comes after it and nothing but it after
    the hidden states of the network below: tried on two tokens."""
    head = module.get_output_embeddings()
    if type(head) is not nn.Linear or module.base_model is module or not head.weight.is_floating_point():
        return None
    entered: list[Tensor] = []

    def scaled(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        entered.append(inputs[0])
        return output + 1000 * torch.arange(output.shape[-1], device=output.device, dtype=output.dtype)

    was_training, ids = module.training, torch.tensor([[0, 1]], device=module.device)
    handle = head.register_forward_hook(scaled)
    module.eval()
    try:
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        logits, hidden = module(**inputs).logits, module.base_model(**inputs).last_hidden_state
        plain = torch.equal(logits.float(), head(hidden).float()) and torch.equal(entered[0], hidden)
    except Exception:  # a model of another kind: it is called as a whole
        return None
    finally:
        handle.remove()
        module.train(was_training)
    return head if plain else None


def _positions(mask: Tensor) -> Tensor:
    """Positions `[B, T]` counted from the first token, so that padding on the left changes nothing."""
    first = mask.long().argmax(1, keepdim=True)
    return (torch.arange(mask.shape[1], device=mask.device) - first).clamp(min=0)
