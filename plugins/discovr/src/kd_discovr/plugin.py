"""Hooks of kd-discovr."""

from __future__ import annotations

from kdcore import Component, Paper, hookimpl

PAPER = Paper("Self-supervised Learning of Echocardiographic Video Representations via Online Cluster Distillation",
              "Divyanshu Mishra, Mohammadreza Salehi, Pramit Saha, Olga Patey, Aris Papageorghiou, Yuki Asano, "
              "J. Alison Noble", "NeurIPS", 2025, "2506.11777", "https://github.com/mdivyanshu97/DISCOVR")  # fmt: skip
TAGS = ("video", "self-supervised", "unlabelled")


@hookimpl
def kd_register_methods() -> list[Component]:
    """The method."""
    summary = "a video encoder without labels: video and image self-distillation joined by online clusters"
    return [Component("method", "discovr", "kd_discovr.method:DISCOVR", "kd_discovr.options:DISCOVROptions", summary,
                      (*TAGS, "ema", "clustering"), PAPER)]  # fmt: skip


@hookimpl
def kd_register_students() -> list[Component]:
    """The encoders that it can train."""
    return [
        Component("student", "discovr-vit", "kd_discovr.models:video_vit", "kd_discovr.options:VideoViTOptions",
                  "vision transformer over tubelets of a clip", TAGS),
        Component("student", "videomae", "kd_discovr.models:videomae", "kd_discovr.options:VideoMAEOptions",
                  "VideoMAE encoder of the transformers library", TAGS),
    ]  # fmt: skip


@hookimpl
def kd_register_data() -> list[Component]:
    """Clips in local files."""
    return [Component("data", "clips", "kd_discovr.clips:clips", "kd_discovr.options:ClipsOptions",
                      "video files in a folder or listed in CSV files, with or without labels", TAGS)]  # fmt: skip
