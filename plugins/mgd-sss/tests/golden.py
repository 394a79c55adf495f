"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

import numpy as np
from torch import Tensor

from kd_mgd_sss.functional import (
    box_masks,
    cut_mix,
    gap_logit_l1,
    hard_pseudo_ce,
    region_cosine_mse,
    region_similarity,
)

Tensors = dict[str, Tensor]


def content(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    raw = region_cosine_mse(inputs["student"], inputs["teacher"], options["grid"])
    return {
        "corr_student": region_similarity(inputs["student"], options["grid"]),
        "raw": raw,
        "loss": options["lambda_2"] * raw,
    }


def semantic(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": options["lambda_1"] * gap_logit_l1(inputs["student"], inputs["teacher"], "sum")}


def pixel(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    found = {
        f"pseudo_{role}": cut_mix(inputs[f"{role}_0"].argmax(1), inputs[f"{role}_1"].argmax(1), inputs["mask"])
        for role in ("wide", "deep")
    }
    return {**found, "loss": sum(hard_pseudo_ce(inputs["student_mixed"], classes) for classes in found.values())}


def boxmask(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    rng = np.random.RandomState(options["seed"])
    size = (options["shape"][0], options["shape"][1])
    return {"mask": box_masks(rng, options["n_masks"], size, options["n_boxes"], tuple(options["prop_range"]))}


ADAPTERS = {"content": content, "semantic": semantic, "pixel": pixel, "boxmask": boxmask}
