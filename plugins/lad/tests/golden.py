"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

from torch import Tensor

from kd_lad.functional import distance, label_channel

Tensors = dict[str, Tensor]


def cwd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": distance(inputs["student"], inputs["teacher"], "cwd", temperature=options["temperature"])}


def noising(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    channel = label_channel(
        inputs["label"], inputs["codes"], inputs["noise"], noise_std=options["noise_std"], scale=options["scale"],
        ignore_index=options["ignore_label"],
    )  # fmt: skip
    return {"channel": channel}


ADAPTERS = {"cwd": cwd, "noising": noising}
