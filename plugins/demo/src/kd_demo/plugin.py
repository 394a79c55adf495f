"""Hooks of kd-demo."""

from __future__ import annotations

from kdcore import Component, hookimpl
from kdcore.components import Kind

_VIDEO = ("video", "classification", "unlabelled")
_IMAGE, _PIXELS, _TEXT, _TOKENS = (
    ("image", "classification"),
    ("image", "segmentation"),
    ("text", "classification"),
    ("text", "causal-lm"),
)

_SENSORS = ("series", "multimodal", "classification")


@hookimpl
def kd_register_data() -> list[Component]:
    return [
        _component("data", "digits", "digits:digits", "Digits", "1,797 handwritten digits of 8x8 pixels", _IMAGE),
        _component("data", "sensors", "sensors:sensors", "Sensors", "generated movements, two sensors each", _SENSORS),
        _component("data", "shapes", "shapes:shapes", "Shapes", "generated images, a class per pixel", _PIXELS),
        _component("data", "heartbeats", "heartbeats:heartbeats", "Heartbeats", "generated clips of a beat", _VIDEO),
        _component("data", "topics", "text:topics", "Topics", "generated sentences in six topics", _TEXT),
        _component("data", "sentences", "text:sentences", "Sentences", "generated texts for a language model", _TOKENS),
    ]


@hookimpl
def kd_register_teachers() -> list[Component]:
    writer = _component("teacher", "scripted-writer", "writer:ScriptedWriter", "ScriptedWriter",
                        "a script that writes sentences on topics", ("text", "text-teacher"))  # fmt: skip
    return [*_models("teacher"), writer]


@hookimpl
def kd_register_students() -> list[Component]:
    return _models("student")


def _models(kind: Kind) -> list[Component]:
    text = (*_TEXT, "causal-lm")
    return [
        _component(kind, "demo-cnn", "models:cnn", "CNN", "small residual image classifier", _IMAGE),
        _component(kind, "demo-segmenter", "models:segmenter", "Segmenter", "small segmenter of stride 4", _PIXELS),
        _component(kind, "demo-sensors", "sensors:sensor_net", "SensorNet", "small CNN for sensors, fused", _SENSORS),
        _component(kind, "demo-transformer", "models:transformer", "Transformer", "small transformer for text", text),
        _component(kind, "demo-vit", "models:vit", "ViT", "small vision transformer", _IMAGE),
    ]


def _component(kind: Kind, name: str, target: str, options: str, summary: str, tags: tuple[str, ...]) -> Component:
    return Component(kind, name, f"kd_demo.{target}", f"kd_demo.options:{options}Options", summary, tags)


@hookimpl
def kd_register_methods() -> list[Component]:
    summary = "a student alone and the same student distilled, over several seeds, in one table"
    return [_component("method", "quickstart", "quickstart:Quickstart", "Quickstart", summary, ("generic", "any"))]
