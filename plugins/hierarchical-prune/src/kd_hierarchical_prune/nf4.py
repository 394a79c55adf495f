"""4-bit weights (NF4) of all linear layers by bitsandbytes, in the format that diffusers saves and loads.

Source: Dettmers et al., QLoRA, NeurIPS 2023, section 3. Activations stay in the type of computation.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdcore.errors import ModelError


def bitsandbytes() -> Any:
    """The library. Raises `ModelError` where it is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise ModelError("method.quantize: nf4 needs bitsandbytes: pip install 'kd-hierarchical-prune[nf4]'") from error
    return bnb


def quantized(module: nn.Module, compute: torch.dtype) -> nn.Module:
    """A copy of a network whose linear layers hold 4-bit weights; `compute` is the type they multiply in."""
    made = copy.deepcopy(module).requires_grad_(False).eval()
    device = next(module.parameters()).device
    for path, linear in linears(made).items():
        _replace(made, path, linear, compute, linear.weight.data, device)
    if hasattr(made, "register_to_config"):
        made.register_to_config(quantization_config=_settings(compute))
    return made


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers, by module name."""
    return {path: part for path, part in module.named_modules() if type(part) is nn.Linear}


def load_weights(module: nn.Module, files: Sequence[Path], quantization: dict[str, Any] | None) -> None:
    """Read the weights of a network, quantised ones into 4-bit layers. Raises `ModelError` if they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state: dict[str, Tensor] = {}
    try:
        for file in files:
            state |= load_file(file)
        if quantization is not None:
            compute = getattr(torch, quantization["bnb_4bit_compute_dtype"])
            for path, linear in linears(module).items():
                _load_layer(module, path, linear, compute, state)
            if hasattr(module, "register_to_config"):
                module.register_to_config(quantization_config=_settings(compute))
            module.requires_grad_(False)
        missing, unexpected = module.load_state_dict(state, strict=quantization is None)
    except (OSError, SafetensorError, RuntimeError, KeyError, AttributeError) as error:
        raise ModelError(f"{files[0]} does not hold the weights of this network: {error}") from error
    left = [name for name in missing if name.rpartition(".")[0] not in _four_bit(module)]
    if left or unexpected:
        raise ModelError(f"{files[0]} does not hold the weights of this network: {(left + unexpected)[0]}")


def _load_layer(
    module: nn.Module, path: str, linear: nn.Linear, compute: torch.dtype, state: dict[str, Tensor]
) -> None:
    """One 4-bit layer; its entries are taken out of the state."""
    name = f"{path}.weight"
    packed = state.pop(name)
    stats = {key: state.pop(key) for key in [k for k in state if k.startswith(f"{name}.")]}
    bias = state.pop(f"{path}.bias", None)
    layer = _layer(linear, compute)
    layer.weight = bitsandbytes().nn.Params4bit.from_prequantized(
        data=packed, quantized_stats=stats, requires_grad=False, device="cpu", module=layer
    )
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    _put(module, path, layer)


def _replace(module: nn.Module, path: str, linear: nn.Linear, compute: torch.dtype, weight: Tensor,
             device: torch.device) -> None:  # fmt: skip
    layer = _layer(linear, compute)
    layer.weight = bitsandbytes().nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4",
                                                compress_statistics=False, module=layer)  # fmt: skip
    layer.bias = linear.bias
    _put(module, path, layer.to(device))


def _layer(linear: nn.Linear, compute: torch.dtype) -> Any:
    layer: Any = _layer_class()(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=compute,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    layer.support_avx512bf16_for_cpu = False  # that path repacks the weight in place, and not every width
    return layer


@functools.cache
def _layer_class() -> type[nn.Module]:
    """The 4-bit layer of bitsandbytes, right on CPUs for every width: there it takes the scales of wrong blocks where
    rows do not split into blocks of 64 weights, so the weights are read as one row."""
    bnb = bitsandbytes()

    class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc, name-defined]
        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu":
                found: Tensor = super().forward(x)
                return found
            state = copy.copy(self.weight.quant_state)
            shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
            weight = bnb.functional.dequantize_4bit(self.weight.data, state).reshape(shape).to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            return nn.functional.linear(x.to(self.compute_dtype), weight, bias).to(x.dtype)

    return Linear4bit


def _put(module: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, layer)


def _four_bit(module: nn.Module) -> set[str]:
    return {path for path, part in module.named_modules() if type(part).__name__ == "Linear4bit"}


def _settings(compute: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
