"""The teacher's linear layers in four bits (NF4, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kdcore.errors import ModelError


def quantize_nf4(module: Any) -> None:
    """Replace every linear layer but the one that makes the logits, in place. Raises `ModelError` without
    bitsandbytes."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ModelError(
            "method.quantize=nf4 needs bitsandbytes: pip install 'kd-lingugkd[nf4]', or set quantize to none"
        ) from error
    head = module.get_output_embeddings()
    kind = next((p.dtype for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)), torch.bfloat16)
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear and layer is not head:
            made = bnb.nn.Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=kind,
                                     quant_type="nf4")  # fmt: skip
            made.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=made)
            made.bias = layer.bias
            module.set_submodule(name, made.to(layer.weight.device))
    module.is_loaded_in_4bit = True  # for peft, which then puts its adapters beside such layers
