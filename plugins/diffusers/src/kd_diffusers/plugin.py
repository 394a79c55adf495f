"""Hooks of kd-diffusers."""

from __future__ import annotations

from kdcore import Component, hookimpl
from kdcore.components import Kind

TAGS = ("image", "diffusion", "text-to-image")


@hookimpl
def kd_register_teachers() -> list[Component]:
    """Denoisers."""
    return [_denoiser("teacher")]


@hookimpl
def kd_register_students() -> list[Component]:
    """Denoisers."""
    return [_denoiser("student")]


@hookimpl
def kd_register_data() -> list[Component]:
    """Small generated data, so that quickstarts and tests need no download."""
    return [
        Component("data", "captioned-shapes", "kd_diffusers.toy:captioned_shapes", "kd_diffusers.options:ShapesOptions",
                  "8x8 pictures of coloured shapes with captions and their embeddings", (*TAGS, "generated")),
        Component("data", "mixture-2d", "kd_diffusers.toy:mixture", "kd_diffusers.options:MixtureOptions",
                  "points of a mixture of Gaussians in the plane, each with its component", ("diffusion", "generated")),
    ]  # fmt: skip


@hookimpl
def kd_register_methods() -> list[Component]:
    """The loss that denoisers are trained with, and the plain distillation of one."""
    return [Component("method", "denoise", "kd_diffusers.train:DenoiseMethod", "kd_diffusers.options:DenoiseOptions",
                      "a denoiser trained on its own loss, and on a teacher's predictions where there is one",
                      (*TAGS, "baseline"))]  # fmt: skip


def _denoiser(kind: Kind) -> Component:
    return Component(
        kind,
        "diffusers",
        target="kd_diffusers.build:build",
        options="kd_diffusers.options:DiffusersOptions",
        summary="a denoiser of diffusers (U-Net or transformer), from a pipeline, a folder or a config",
        tags=TAGS,
    )
