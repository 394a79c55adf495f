"""Distillation losses as pure functions: tensors in, a scalar (or one value per sample) out.

The teacher's side never receives a gradient, and float16 or bfloat16 inputs are computed in float32. What is given in
a wrong shape or range raises `ValueError` and says what would fit.
"""

from kd_classic.functional.features import (
    ab,
    at,
    attention_map,
    fitnet,
    hcl,
    mgd,
    nst,
    ofd,
    ofd_margin,
    pool_to_smaller,
    vid,
)
from kd_classic.functional.logits import cross_entropy, dist, dkd, flatten_positions, kd, logit_standardize
from kd_classic.functional.maps import cwd, skd_pairwise, skd_pixelwise
from kd_classic.functional.objectives import byot, deit, lsr, tfkd_reg, wsld
from kd_classic.functional.relations import crd, pkt, rkd, rkd_angle, rkd_distance, sp

__all__ = [
    "ab",
    "at",
    "attention_map",
    "byot",
    "crd",
    "cross_entropy",
    "cwd",
    "deit",
    "dist",
    "dkd",
    "fitnet",
    "flatten_positions",
    "hcl",
    "kd",
    "logit_standardize",
    "lsr",
    "mgd",
    "nst",
    "ofd",
    "ofd_margin",
    "pkt",
    "pool_to_smaller",
    "rkd",
    "rkd_angle",
    "rkd_distance",
    "skd_pairwise",
    "skd_pixelwise",
    "sp",
    "tfkd_reg",
    "vid",
    "wsld",
]
