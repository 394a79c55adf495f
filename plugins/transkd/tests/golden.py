"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

import torch
from torch import Tensor

from kd_classic.functional import hcl as hierarchical_context_loss
from kd_transkd.modules import CrossSelectiveFusion, EmbeddingAlignment, EmbeddingAssistant, GLMixer

Tensors = dict[str, Tensor]


def numbered(tensors: Tensors, name: str) -> list[Tensor]:
    return [tensors[f"{name}_{i}"] for i in range(sum(key.startswith(f"{name}_") for key in tensors))]


def load(module: torch.nn.Module, params: Tensors, names: dict[str, str]) -> None:
    """Load the parameters whose names begin with a key of `names`, which is replaced by its value."""
    found = {
        ours + key[len(theirs) :].replace("__", "."): value
        for theirs, ours in names.items()
        for key, value in params.items()
        if key.startswith(theirs)
    }
    module.load_state_dict(found, strict=True)


def hcl(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    return {"loss": hierarchical_context_loss(numbered(inputs, "student"), numbered(inputs, "teacher"))}


def csf(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    features, embeds = numbered(inputs, "feat"), numbered(inputs, "embed")
    widths = (options["in_channels"], options["out_channels"])
    fusion = CrossSelectiveFusion(*widths, channels_mid=options["mid_channel"], reduced=options["reduced_len"])
    names = {}
    for i in range(4):  # theirs are numbered from the deepest
        names |= {
            f"skfs__{3 - i}__{theirs}__": f"blocks.{i}.{ours}."
            for theirs, ours in (
                ("conv1", "conv1"), ("conv2", "conv2"), ("fc", "squeeze"), ("fc1", "squeeze_one"), ("fcs", "excite"),
            )
        }  # fmt: skip
    load(fusion, params, names)
    fused = fusion.train(options["mode"] == "train")(features)
    aligned = []
    for i, (tokens, stage) in enumerate(zip(embeds, features, strict=True)):
        alignment = EmbeddingAlignment(tokens.shape[-1], widths[1][i])
        load(alignment, params, {f"embed{i + 1}_linearproject__": "project."})
        aligned.append(alignment(tokens, stage.shape[-2:], stage))
    loss = sum((f * c).mean() for f, c in zip(fused, numbered(inputs, "cotangent"), strict=True))
    loss = loss + sum(tokens.square().mean() for tokens in aligned)
    outputs = {f"feat_{i}": value for i, value in enumerate(fused)}
    return {**outputs, **{f"embed_{i}": value for i, value in enumerate(aligned)}, "loss": loss}


def glmixer(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    mixer = GLMixer(options["dim"], heads=options["num_heads"], residual=options["residual_add"])
    mix = torch.cat([params["atten_weight"], params["conv_weight"]])
    alignment = EmbeddingAlignment(options["dim"], options["out_dim"], mixer=mixer)
    names = {"attn4__": "mixer.", "conv1__": "mixer.local.", "conv2__": "mixer.gate.", "mix": "mixer.mix",
             "embed4_linearproject__": "project."}  # fmt: skip
    load(alignment, {**params, "mix": mix}, names)
    aligned = alignment(inputs["embed"], (1, inputs["embed"].shape[1]), inputs["embed"])
    return {"embed": aligned, "loss": aligned.square().mean()}


def ea(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    outputs = {}
    sources = [inputs["image"], *numbered(inputs, "feat")]
    for i, (tokens, source) in enumerate(zip(numbered(inputs, "embed"), sources, strict=True)):
        width = options["out_channels"][i]
        assistant = EmbeddingAssistant(source.shape[1], width, first=i == 0)
        alignment = EmbeddingAlignment(tokens.shape[-1], width, stage=i + 1, assistant=assistant)
        shares = torch.cat([params[f"fuse_weights__{i}"], params[f"fuse_weights__{4 + i}"]])
        names = {f"patch_embed{i + 1}__": "assistant.", f"embed{i + 1}_linearproject__": "project.", "shares": "shares"}
        load(alignment, {**params, "shares": shares}, names)
        stride = 4 if i == 0 else 2
        outputs[f"embed_{i}"] = alignment(tokens, (source.shape[2] // stride, source.shape[3] // stride), source)
    return outputs


ADAPTERS = {"hcl": hcl, "csf": csf, "glmixer": glmixer, "ea": ea}
