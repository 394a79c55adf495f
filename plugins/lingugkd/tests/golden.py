"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

from torch import Tensor

from kd_lingugkd.functional import distill_loss as objective

Tensors = dict[str, Tensor]


def distill_loss(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    found = objective(
        inputs["h"], inputs["t"], inputs["logits"], inputs["labels"], params.get("distill_loss_weights"),
        params.get("loss_weights"), tau=options.get("temperature", 0.07), symmetric=options.get("symmetric", False),
    )  # fmt: skip
    return {"loss": found.loss, "infonce": found.infonce, "logp": found.log_probs}


ADAPTERS = {"distill_loss": distill_loss}
