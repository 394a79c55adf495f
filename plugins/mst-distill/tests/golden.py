"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

from torch import Tensor
from torch.func import functional_call

from kd_mst_distill.functional import load_balance, routed_kl, top_teachers
from kd_mst_distill.masking import masked
from kd_mst_distill.modules import MaskNet1d, MaskNet2d

Tensors = dict[str, Tensor]


def routing(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    gate = inputs["gate_logits"]
    kl = routed_kl(inputs["student"], inputs["teachers"], gate, k=options["k"], temperature=options["T"])
    balance = load_balance(gate, mode="kl")
    return {"kl": kl, "topk": top_teachers(gate, options["k"]), "lb_kl": balance,
            "lb_cv": load_balance(gate, mode="cv"), "loss": kl + balance}  # fmt: skip


def masknet(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    kind = MaskNet2d if any(name.startswith("spatial_reduce.") for name in params) else MaskNet1d
    net = kind(options["feat_dim"], options["hidden_dim"], options["num_heads"]).eval()
    mask = functional_call(net, params, (inputs["x"],), strict=True)
    product = masked(inputs["x"], lambda x: mask)
    return {"mask": mask, "masked": product, "loss": product.sum()}


ADAPTERS = {"routing": routing, "masknet": masknet}
