"""Adapters from the arrays of golden vectors to this plugin's functions."""

import re
from typing import Any

import torch
from torch import Tensor

from kd_hierarchical_prune.functional import feature_loss, output_loss, task_loss

Tensors = dict[str, Tensor]
STREAMS = {"LFImg": "img", "LFCond": "txt", "SA": "sa", "CA": "ca"}


def features(inputs: Tensors, who: str) -> dict[tuple[int, str], Tensor]:
    """`student_img_5` and its like, by (block, stream)."""
    found = {}
    for name, value in inputs.items():
        if match := re.fullmatch(rf"{who}_([a-z]+)_(\d+)", name):
            found[int(match[2]), match[1]] = value
    return found


def kd_losses(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    streams = [STREAMS[kind] for kind in filter(None, options["kd_feat_type"].split(","))]
    weight = inputs.get("weighting")
    prediction = inputs["model_pred"]
    task = task_loss(prediction, inputs["clean_latent"], inputs["noise"], inputs["sigma"], weight)
    output = output_loss(prediction, inputs["teacher_pred"], weight)
    student, teacher = (features(inputs, who) for who in ("student", "teacher"))
    feature = feature_loss(student, teacher, options["blocks"], streams, weight) if streams else torch.zeros(())
    lambdas = (options["lambda_task"], options["lambda_kd_out"], options["lambda_kd_feat"])
    terms = [loss if factor else torch.zeros(()) for factor, loss in zip(lambdas, (task, output, feature), strict=True)]
    total = sum(factor * loss for factor, loss in zip(lambdas, terms, strict=True))
    return {"loss_task": terms[0], "loss_kd_out": terms[1], "loss_kd_feat": terms[2], "loss": total}


ADAPTERS = {"kd_losses": kd_losses}
