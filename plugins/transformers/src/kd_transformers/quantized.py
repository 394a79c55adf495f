"""Weights held in 8 bits (LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339) or in 4 (NF4, Dettmers et al. 2023,
arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from kdcore.errors import ModelError


def quantization(bits: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is called with.

    Args:
        bits: `int8`, `int4`, or nothing.
        dtype: what products are computed in, under `int4`.

    Raises:
        ModelError: if bitsandbytes is not installed.
    """
    if bits is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"quantization: {bits} needs bitsandbytes: pip install 'kd-transformers[quantization]', or "
                         "leave it out")  # fmt: skip
    settings = {"load_in_8bit": True} if bits == "int8" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }  # fmt: skip
    return {"quantization_config": transformers.BitsAndBytesConfig(**settings)}


def is_quantized(module: Any) -> bool:
    """Whether a network's weights are, by whatever library."""
    return bool(getattr(module, "is_quantized", False))


def settle(module: nn.Module) -> None:
    """Make the layers of bitsandbytes fit for training and for checkpoints, where they are not.

    A checkpoint's state holds the constants of a quantised weight, which a layer that has been called does not take
    back: they are passed over, for the layer has them. A processor's fast path for 4 bits, which loses the gradient,
    is switched off. And that products of 8 bits are computed in fp16 is not said again at each of them.
    """
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for layer in module.modules():
        if type(layer).__name__ in ("Linear4bit", "Linear8bitLt"):
            layer.register_load_state_dict_pre_hook(_without_constants)  # type: ignore[no-untyped-call]
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _without_constants(layer: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in list(state):
        if key.startswith(f"{prefix}weight.") or key in (f"{prefix}SCB", f"{prefix}weight_format"):
            del state[key]
