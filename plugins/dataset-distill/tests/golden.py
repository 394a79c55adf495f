"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from kd_dataset_distill import functional
from kd_dataset_distill.convnet import ConvNet

Tensors = dict[str, Tensor]


def match(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    synthetic, real = ([inputs[f"{side}_{i}"] for i in range(len(inputs) // 2)] for side in ("syn", "real"))
    loss = functional.gradient_distance(synthetic, real, options.get("dis_metric", "ours"))
    return {"loss": loss + 0 * sum(gradient.sum() for gradient in synthetic)}  # the gradient of what is ignored is 0


def dcstep(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    forward, real, synthetic = (
        _network(options, "logits"),
        list(inputs["real"]),
        inputs["syn"].chunk(len(inputs["real"])),
    )
    params = {name: value.requires_grad_() for name, value in params.items()}
    metric = options.get("dis_metric", "ours")
    labels = list(range(len(real)))
    return {"loss": functional.gradient_matching(forward, params, real, synthetic, labels, metric)}


def dm(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    forward, real = _network(options, "embedding"), inputs["real"]
    theirs = forward(params, real.flatten(0, 1)).unflatten(0, real.shape[:2])
    ours = forward(params, inputs["syn"]).unflatten(0, (len(real), -1))
    return {"loss": functional.distribution_distance(list(theirs), list(ours))}


def mtt(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    start, target = ({k.partition("/")[2]: v for k, v in params.items() if k.startswith(f"{which}/")}
                     for which in ("start", "target"))  # fmt: skip
    start = {name: value.requires_grad_() for name, value in start.items()}
    rows = [index[index >= 0].long() for index in inputs["index_batches"]]
    batches = [(inputs["images"][row], inputs["labels"][row]) for row in rows]
    final = functional.flat(functional.unroll(_network(options, "logits"), start, batches, inputs["lr"]))
    loss = functional.trajectory_distance(final, functional.flat(start), functional.flat(target))
    return {"loss": loss, "final_params": final}


def less(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    moments = {key: options[key] for key in ("beta1", "beta2", "eps") if key in options}
    direction = functional.adam_direction(inputs["grads"], inputs["exp_avg"], inputs["exp_avg_sq"], **moments)
    count = inputs["val_feat"].shape[1]
    tasks = torch.arange(count) // (count // options.get("n_subtasks", 1))
    score = functional.influence(inputs["train_feat"], inputs["val_feat"], options["checkpoint_weights"], tasks)
    return {"adam_direction": direction, "score": score}


def _network(options: dict[str, Any], output: str) -> functional.Forward:
    size = options.get("im_size", 32)
    size = [size, size] if isinstance(size, int) else size
    norm = str(options.get("net_norm", "instance"))
    kind = "batch" if norm.startswith("batch") else "none" if norm.startswith("none") else "instance"
    net = ConvNet(options["channel"], size, options["num_classes"], options["net_width"], options["net_depth"], kind)
    return lambda params, images: functional_call(net, params, (images,))[output]


ADAPTERS = {"match": match, "dcstep": dcstep, "dm": dm, "mtt": mtt, "less": less}
