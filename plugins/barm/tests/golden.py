"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

from torch import Tensor

from kd_barm.functional import step_losses, unify_background

Tensors = dict[str, Tensor]


def loss(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    parts = [
        [inputs[f"{kind}{i}"] for i in range(len(options["num_classes"])) if f"{kind}{i}" in inputs]
        for kind in ("head", "ear", "prev_head", "prev_ear")
    ]
    heads, _, previous, _ = parts
    terms = step_losses(
        *parts, inputs["labels"], pseudo_thresh=options["pseudo_thresh"], ignore_index=options["ignore_index"]
    )
    weights = {"pb-bce": 1, "bga-tri": options["co_bg(triplet)"], "bfd": options["co_tn(bfd)"],
               "gkd": options["co_p(gkd)"], "bga-bce": options["co_oc(bga_bce)"]}  # fmt: skip
    total = sum(weights[name] * term for name, term in terms.items())
    return {
        "train_logits": unify_background(heads, training=True),
        "eval_logits": unify_background(heads, training=False),
        "prev_logits": unify_background(previous, training=False),
        "loss_pb_bce": terms["pb-bce"],
        "loss_bga_triplet": terms["bga-tri"],
        "loss_bga_bce": terms["bga-bce"],
        "loss_bfd": terms["bfd"],
        "loss_gkd": terms["gkd"],
        "loss_total": total,
        "loss": total
        + 0 * parts[1][-1].sum(),  # the newest branch's features get their gradient through the head alone
    }


ADAPTERS = {"loss": loss}
