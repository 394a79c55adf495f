"""Hooks of kd-timm."""

from kdcore import hookimpl
from kdcore.components import Component

TARGET = "kd_timm.models:timm_model"
TAGS = ("image", "classification", "logits", "embedding", "features")


@hookimpl
def kd_register_teachers() -> list[Component]:
    options = "kd_timm.options:TimmTeacherOptions"
    return [Component("teacher", "timm", TARGET, options, "an image model of timm with its weights", TAGS)]


@hookimpl
def kd_register_students() -> list[Component]:
    options = "kd_timm.options:TimmOptions"
    return [Component("student", "timm", TARGET, options, "an image model of timm", TAGS)]
