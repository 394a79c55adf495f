"""Adapters from the arrays of golden vectors to this plugin's functions."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from kd_classic import functional
from kd_classic.modules import (
    ABF,
    Connector,
    ContrastMemory,
    MaskedGenerator,
    Projector,
    Regressor,
    VariationalRegressor,
    generation_mask,
)

Tensors = dict[str, Tensor]


def kd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.kd(inputs["logits_s"], inputs["logits_t"], **options)}


def logitstd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    student = functional.logit_standardize(inputs["logits_s"], eps=options["eps"])
    teacher = functional.logit_standardize(inputs["logits_t"], eps=options["eps"])
    return {"loss": functional.kd(student, teacher, temperature=options["temperature"])}


def dkd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.dkd(inputs["logits_s"], inputs["logits_t"], inputs["target"], **options)}


def dist(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.dist(inputs["logits_s"], inputs["logits_t"], **options)}


def fitnet(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    student, teacher = inputs["feat_s"], inputs["feat_t"]
    regressor = Regressor(student.shape, teacher.shape, relu=options.get("use_relu", True))
    # Training mode updates the running statistics in place, hence the copies.
    state = {name: value.clone() for name, value in params.items()}
    return {"loss": functional.fitnet(functional_call(regressor, state, (student,)), teacher)}


def at(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    students, teachers = _layers(inputs, "feat_s"), _layers(inputs, "feat_t")
    return {"loss": functional.at(students, teachers, p=options.get("p", 2))}


def at_paper(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    students, teachers = _layers(inputs, "feat_s"), _layers(inputs, "feat_t")
    return {"loss": functional.at(students, teachers, mode="paper", p=options.get("p", 2))}


def nst(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.nst(inputs["feat_s"], inputs["feat_t"])}


def vid(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    regressor = VariationalRegressor(inputs["feat_s"].shape[1], inputs["feat_t"].shape[1])
    mean = functional_call(regressor, params, (inputs["feat_s"],))
    return {"loss": functional.vid(mean, params["log_scale"], inputs["feat_t"], eps=options["eps"])}


def ab(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.ab(_layers(inputs, "feat_s"), _layers(inputs, "feat_t"), margin=options["margin"])}


def ofd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    students, teachers = _layers(inputs, "feat_s"), _layers(inputs, "feat_t")
    connected, margins = [], []
    for i, (student, teacher) in enumerate(zip(students, teachers, strict=True)):
        connector = Connector(student.shape[1], teacher.shape[1])
        connected.append(functional_call(connector, _part(params, f"connectors.{i}."), (student,)))
        margins.append(functional.ofd_margin(params[f"teacher_bn{i}.weight"], params[f"teacher_bn{i}.bias"]))
    loss = functional.ofd(connected, teachers, margins)
    return {"loss": loss, **{f"margin{i}": margin for i, margin in enumerate(margins)}}


def reviewkd_abf(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    level = ABF(options["in"], options["mid"], options["out"], fuse=True)
    size = (options["out_shape"], options["out_shape"])
    y, residual = functional_call(level, _part(params), (inputs["x"], inputs["y"], size))
    return {"y": y, "residual": residual, "loss": y.square().mean()}


def reviewkd_hcl(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.hcl(_layers(inputs, "feat_s"), _layers(inputs, "feat_t"))}


def mgd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    student, teacher = inputs["feat_s"], inputs["feat_t"]
    generator = MaskedGenerator(student.shape[1], teacher.shape[1])
    keep = generation_mask(inputs["u"], options["lambda"], options["kind"])
    generated = functional_call(generator, params, (student, keep))
    return {"loss": functional.mgd(generated, teacher, alpha=options["alpha"])}


def simkd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    student, teacher = functional.pool_to_smaller(inputs["feat_s"], inputs["feat_t"])
    projector = Projector(student.shape[1], teacher.shape[1], factor=options["factor"])
    projected = functional_call(projector, _part(params, "transfer.", "transfer."), (student,))
    logits = F.linear(projected.mean((2, 3)), params["cls_t.weight"], params["cls_t.bias"])
    return {"loss": functional.fitnet(projected, teacher), "logits": logits, "feat_s": projected, "feat_t": teacher}


def sp(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.sp(inputs["feat_s"], inputs["feat_t"])}


def rkd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    weights = {name: options[name] for name in ("distance_weight", "angle_weight")}
    return {"loss": functional.rkd(inputs["feat_s"], inputs["feat_t"], **weights)}


def pkt(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.pkt(inputs["feat_s"], inputs["feat_t"], eps=options["eps"])}


def crd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    student, teacher, size = inputs["feat_s"], inputs["feat_t"], options["n_data"]
    memory = ContrastMemory(student.shape[1], teacher.shape[1], size, width=options["feat_dim"],
                            temperature=options["nce_t"], momentum=options["nce_m"])  # fmt: skip
    for name, side in (("student", "s"), ("teacher", "t")):
        layer = getattr(memory, f"embed_{name}")
        del layer.weight, layer.bias  # so that gradients reach the vector's own arrays
        layer.weight, layer.bias = (params[f"embed_{side}.linear.{part}"] for part in ("weight", "bias"))
    memory.student_bank = params["contrast.memory_v1"].clone()
    memory.teacher_bank = params["contrast.memory_v2"].clone()
    ours, theirs, anchors_s, anchors_t = memory(student, teacher, inputs["contrast_idx"])
    loss = functional.crd(ours, size) + functional.crd(theirs, size)
    memory.update(anchors_s, anchors_t, inputs["idx"])
    return {"loss": loss, "Z_v1": memory.student_z, "Z_v2": memory.teacher_z,
            "memory_v1": memory.student_bank, "memory_v2": memory.teacher_bank}  # fmt: skip


def wsld(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    weights = {"alpha": options["alpha"], "temperature": options["T"]}
    return {"loss": functional.wsld(inputs["logits_s"], inputs["logits_t"], inputs["target"], **weights)}


def lsr(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.lsr(inputs["logits_s"], inputs["target"], **options)}


def tfkd_reg(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.tfkd_reg(inputs["logits_s"], inputs["target"], **options)}


def deit(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    loss = functional.deit(inputs["logits_cls"], inputs["logits_dist"], inputs["logits_t"], inputs["target"],
                           kind=options["type"], alpha=options["alpha"], temperature=options["tau"])  # fmt: skip
    return {"loss": loss}


def byot(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.byot(_layers(inputs, "logits"), _layers(inputs, "feat"), inputs["target"], **options)}


def cwd(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    norm = "mse" if options["divergence"] == "mse" else options["norm_type"]
    return {"loss": functional.cwd(inputs["feat_s"], inputs["feat_t"], temperature=options["temperature"], norm=norm)}


def skd_pixelwise(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.skd_pixelwise(inputs["logits_s"], inputs["logits_t"])}


def skd_pairwise(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": functional.skd_pairwise(inputs["feat_s"], inputs["feat_t"], scale=options["scale"])}


def _part(params: Tensors, prefix: str = "", new: str = "") -> Tensors:
    """The parameters under a prefix; copies, because training mode updates running statistics in place."""
    return {new + name[len(prefix) :]: value.clone() for name, value in params.items() if name.startswith(prefix)}


def _layers(inputs: Tensors, prefix: str) -> list[Tensor]:
    """`prefix` alone, or `prefix` 0, 1, ... in order."""
    names = sorted((name for name in inputs if name.startswith(prefix)), key=lambda name: int(name[len(prefix) :] or 0))
    return [inputs[name] for name in names]


ADAPTERS: dict[str, Callable[[Tensors, Tensors, dict[str, Any]], Tensors]] = {
    adapter.__name__: adapter
    for adapter in (
        kd,
        logitstd,
        dkd,
        dist,
        fitnet,
        at,
        at_paper,
        nst,
        vid,
        ab,
        ofd,
        reviewkd_abf,
        reviewkd_hcl,
        mgd,
        simkd,
        sp,
        rkd,
        pkt,
        crd,
        wsld,
        lsr,
        tfkd_reg,
        deit,
        byot,
        cwd,
        skd_pixelwise,
        skd_pairwise,
    )
}
