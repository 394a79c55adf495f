"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

from torch import Tensor
from torch.func import functional_call

from kd_discovr import functional as f
from kd_discovr.modules import DINOHead

Tensors = dict[str, Tensor]


def dino(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    teacher, student = inputs["teacher_logits"], inputs["student_logits"]
    hot, cold = f.image_temperatures(options["teacher_temp"], options["student_temp"])
    probabilities = f.teacher_probabilities(teacher, inputs["center"], hot)
    scale = 256 / len(teacher) if options.get("grad_scale") == "256/B" else 1.0
    center = f.moved_center(inputs["center"], probabilities, options["center_momentum"])
    return {"loss": scale * f.dino_ce(student, probabilities, cold), "center": center}


def dinohead(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    head = DINOHead(options["in"], options["out"], options["hidden"], options["bottleneck"])
    names = {"last_layer.weight_g": "last_layer.parametrizations.weight.original0",
             "last_layer.weight_v": "last_layer.parametrizations.weight.original1"}  # fmt: skip
    state = {names.get(key := name.replace("__", "."), key): value for name, value in params.items()}
    return {"logits": functional_call(head, state, (inputs["x"],))}


def scd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    teacher, student = inputs["teacher"], inputs["student"]
    prototypes = f.normalise_(params["prototypes"])
    eps, iterations = options["eps"], options["iterations"]
    found = {"prototypes_normalised": prototypes.detach()}
    for name, tokens in (("teacher", teacher), ("student", student)):
        found[f"scores_{name}"] = f.prototype_scores(tokens, prototypes)
        found[f"q_{name}"] = f.assignments(found[f"scores_{name}"], eps, iterations, soft=True)
    loss = f.cluster_assignment_distill(student, teacher, prototypes, eps=eps, iterations=iterations,
                                        temperature=options["temperature"])  # fmt: skip
    return {**found, "loss_teacher": loss.teacher, "loss_student": loss.student, "loss": loss.teacher + loss.student}


def tokennorm(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"features": f.standardise_tokens(inputs["tokens"][:, 1:])}


ADAPTERS = {"dino": dino, "dinohead": dinohead, "scd": scd, "tokennorm": tokennorm}
