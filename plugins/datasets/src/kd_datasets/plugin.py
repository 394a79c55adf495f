"""Hooks of kd-datasets."""

from kdcore import hookimpl
from kdcore.components import Component


@hookimpl
def kd_register_data() -> list[Component]:
    return [
        Component(
            "data",
            "datasets",
            target="kd_datasets.data:hub_or_local",
            options="kd_datasets.options:DatasetsOptions",
            summary="Hugging Face data sets, tables, saved data sets and image folders",
            tags=("image", "text", "classification", "segmentation", "language-model", "streaming"),
        )
    ]


@hookimpl
def kd_register_teachers() -> list[Component]:
    return [
        Component(
            "teacher",
            "columns",
            target="kd_datasets.data:columns_teacher",
            options="kd_datasets.options:ColumnsOptions",
            summary="a teacher whose logits or embeddings stand in columns of the data",
            tags=("offline", "logits", "embedding"),
        )
    ]
