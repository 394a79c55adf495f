"""Adapters from the arrays of golden vectors to this plugin's functions.

A vector here holds several losses, each with a gradient of its own: every one is computed on a copy of the student's
logits, which is put among the inputs under the gradient's name. The sum of the losses has all of those gradients.
"""

from typing import Any

import torch
from torch import Tensor

from kd_llm_kd_suite import functional
from kdcore.data import IGNORE

Tensors = dict[str, Tensor]

DISTILLM = {
    "forward_kl": ("fkl", None),
    "reverse_kl": ("rkl", None),
    "symmetric_kl": ("sym", "lam"),
    "js_distance": ("jsdistance", "lam"),
    "tv_distance": ("tvd", None),
    "skewed_forward_kl": ("sfkl", "alpha"),
    "skewed_reverse_kl": ("srkl", "alpha"),
}
"""Its name -> ours, and what its `lam` is called here."""


def gkdjsd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    outputs: Tensors = {}
    for i, case in enumerate(options["cases"]):
        logits, teacher = _own(inputs, f"student_logits_{i}"), inputs["teacher_logits"]
        labels = inputs["labels"] if case.get("mask", True) else None
        shape = {name: case[name] for name in ("beta", "temperature") if name in case}
        kept = teacher[..., 0].numel() if labels is None else int((labels != IGNORE).sum())
        # Without labels its "batchmean" divides by the batch size; its "mean" divides by the classes, too.
        batch = len(teacher) if labels is None else kept
        divisor = {"batchmean": batch, "sum": 1, "mean": kept * teacher.shape[-1]}[case.get("reduction", "batchmean")]
        mean = functional.divergence("jsd", logits, teacher, labels, **shape)
        outputs[f"loss_{i}"] = mean * kept / divisor
    return _with_sum(outputs)


def distillm(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    outputs: Tensors = {}
    for theirs, given in options.items():
        name, called = DISTILLM[theirs]
        own: dict[str, Any] = {called: given["lam"]} if called and "lam" in given else {}
        if name in ("fkl", "sym", "sfkl"):
            own["cross_entropy_form"] = True
        logits = _own(inputs, theirs)
        outputs[theirs] = functional.divergence(name, logits, inputs["teacher_logits"], inputs["labels"], **own)
    return _with_sum(outputs)


def minillm(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    mask, logits = inputs["mask"], _own(inputs, "single_step_reg")
    regulariser = functional.single_step_regulariser(logits, inputs["teacher_logits"], mask)
    outputs = {"single_step_reg": functional.masked_mean(regulariser, mask)}
    ours, theirs = (functional.token_logprobs(inputs[f"{s}_logits"], inputs["tokens"]) for s in ("student", "teacher"))
    for i, case in enumerate(options.get("advantage_cases", [])):
        gamma, normalised = case["gamma"], case["length_normalization"] and case["gamma"] > 0
        found = functional.advantages(
            ours, theirs, mask, gamma=gamma, length_norm=False, scaling=1.0, clip=torch.inf, whitened=False
        )
        scale = float(gamma) ** torch.arange(mask.shape[1]) if gamma > 0 else torch.ones(mask.shape[1])
        if normalised:  # there a masked position is as long as 1e-4 of another
            lengths = torch.where(mask.bool(), 1.0, 1e-4)
            scale = 1 / functional.returns(lengths, torch.ones_like(mask), gamma=gamma, length_norm=False)
        outputs[f"advantage_{i}"] = found * scale
    return {**outputs, "loss": outputs["single_step_reg"]}


def _own(inputs: Tensors, gradient: str) -> Tensor:
    inputs[gradient] = inputs["student_logits"].detach().clone().requires_grad_()
    return inputs[gradient]


def _with_sum(losses: Tensors) -> Tensors:
    return {**losses, "loss": torch.stack(list(losses.values())).sum()}


ADAPTERS = {"gkdjsd": gkdjsd, "distillm": distillm, "minillm": minillm}
