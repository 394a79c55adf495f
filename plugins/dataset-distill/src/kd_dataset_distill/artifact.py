"""The small data set: written by a run, read by any recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_dataset_distill.options import DistilledOptions, EvaluationOptions
from kdcore import PluginManager, Run, Stage
from kdcore.data import DataModule, Task, to_device
from kdcore.errors import DataError, ModelError
from kdcore.recipe import explain, load

FACTS, PICTURES = "facts.json", "images.png"
LOGITS = "teacher_logits"


class Rows(Dataset[dict[str, Any]]):
    """The rows of a small data set as samples of the data that it was made from.

    A row with an `index` stands for that training sample; one with an `image` is itself the sample; the `text` of one
    (and its `text_pair`) is encoded by the tokenizer of the data's task, where it has one. `teacher_logits` are handed
    on.
    """

    def __init__(self, rows: datasets.Dataset, data: DataModule) -> None:
        self.columns: dict[str, Any] = rows.with_format("torch")[:]
        self.data, self.size = data, len(rows)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {name: column[index] for name, column in self.columns.items()}
        extra = {LOGITS: row[LOGITS]} if LOGITS in row else {}
        if "index" in row:
            found = self.data["train"][int(row["index"])]
            sample = dict(found) if isinstance(found, Mapping) else dict(zip(self.data.keys, found, strict=False))
            return {**sample, **extra}
        if "image" in row:
            return {"image": row["image"], "label": row["label"], **extra}
        text = encode(self.data.task.tokenizer, row["text"], row.get("text_pair"))
        return {**text, "label": row["label"], **extra}

    def column(self, name: str) -> Any:
        """All labels. Raises `KeyError` for another column, or where there are none."""
        if name != "label":
            raise KeyError(name)
        return self.columns["label"]


def encode(tokenizer: Any, text: str, pair: str | None = None) -> dict[str, Any]:
    """Tokens `[T]` of a text; without a tokenizer the text itself."""
    if tokenizer is None:
        return {"text": text} if pair is None else {"text": text, "text_pair": pair}
    if not callable(tokenizer):
        ids = torch.tensor(tokenizer.encode(text if pair is None else f"{text} {pair}"))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    longest = getattr(tokenizer, "model_max_length", None) or 1 << 30
    limit = {"truncation": True, "max_length": longest} if longest < 1 << 20 else {}
    found = tokenizer(text, pair, **limit)
    return {key: torch.tensor(found[key]) for key in ("input_ids", "attention_mask", "token_type_ids") if key in found}


def as_data(rows: datasets.Dataset | Dataset[Any], data: DataModule) -> DataModule:
    """A data module whose training split is the small data set."""
    split = Rows(rows, data) if isinstance(rows, datasets.Dataset) else rows
    return DataModule({"train": split}, data.task, collate=data.collate, augment=data.augment, keys=data.keys)


def selection(data: DataModule, index: Tensor) -> datasets.Dataset:
    """Real training samples as rows of a small data set: `index`, and `label` where there are labels."""
    columns = {"index": index.tolist()}
    if data.task.kind == "classification":
        columns["label"] = data.labels("train")[index.cpu()].tolist()
    return datasets.Dataset.from_dict(columns)


def with_logits(run: Run, rows: datasets.Dataset, options: EvaluationOptions) -> datasets.Dataset:
    """The rows with the teacher's logits, where soft labels are asked for.

    Raises:
        ModelError: if the recipe names no teacher.
    """
    if not options.soft_labels:
        return rows
    if "teacher" not in (*run.recipe.teachers, *run.given.get("teachers", {})):
        raise ModelError("soft_labels: the recipe names no teacher that could give them (`teacher:`)")
    teacher, found = run.teacher.freeze().to(run.device), []
    with torch.no_grad(), run.accelerator.autocast():
        for batch in as_data(rows, run.data).eval_loader("train", 256):
            found.append(teacher(to_device(batch, run.device)).need("logits").float().cpu())
    return rows.add_column(LOGITS, torch.cat(found).tolist())


class WriteData(Stage):
    """Writes the small data set with `datasets`; the artifact is the data set.

    Args:
        columns: gives the columns when the stage is executed.
        options: of the method.
        task: of the data.
    """

    name = "data"

    def __init__(self, columns: Callable[[], dict[str, Any]], options: EvaluationOptions, task: Task) -> None:
        self.columns, self.options, self.task = columns, options, task

    def execute(self, run: Run, workspace: Path, artifact: Path) -> None:
        """Write `data/`, what it is (`facts.json`) and, of images, a picture of all."""
        columns = self.columns()
        if "image" in columns:
            save_picture(columns["image"], artifact / PICTURES)
            columns["image"] = columns["image"].numpy()
        rows = datasets.Dataset.from_dict(columns, features=features(columns, self.task))
        rows = with_logits(run, rows, self.options)
        rows.save_to_disk(str(artifact / "data"))
        facts = {"method": run.recipe.method.use, "samples": len(rows), "task": self.task.kind,
                 "classes": list(self.task.classes), "num_classes": self.task.num_classes}  # fmt: skip
        (artifact / FACTS).write_text(json.dumps(facts, indent=1) + "\n")

    def load(self, run: Run, artifact: Path) -> datasets.Dataset:
        """The rows."""
        return datasets.load_from_disk(str(artifact / "data"))


def features(columns: Mapping[str, Any], task: Task) -> datasets.Features:
    """Types of the columns: images of their shape, labels with their names."""
    found: dict[str, Any] = {}
    for name, values in columns.items():
        if name == "image":
            found[name] = datasets.Array3D(tuple(values.shape[1:]), "float32")
        elif name == "label":
            found[name] = datasets.ClassLabel(names=list(task.classes)) if task.classes else datasets.Value("int64")
        else:
            kind = "string" if isinstance(values[0], str) else "int64" if isinstance(values[0], int) else "float32"
            found[name] = datasets.Value(kind)
    return datasets.Features(found)


def save_picture(images: Tensor, path: Path, columns: int = 10, side: int = 320) -> None:
    """All images side by side, the first `columns` in the first row; each enlarged by a whole factor."""
    from PIL import Image

    count, channels, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.ones(rows * columns, channels, height, width)
    canvas[:count] = images.clamp(0, 1)
    grid = (
        canvas.view(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2).reshape(rows * height, -1, channels)
    )
    pixels = (255 * grid).round().byte().numpy()
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels[..., :3])
    factor = max(1, side // (columns * width))
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(path)


def distilled(options: DistilledOptions) -> DataModule:
    """The data of a recipe `{use: distilled, path: runs/x}`: a small training split, the other splits as they were.

    Raises:
        DataError: if there is no such data set, or the data it was made from cannot be had again.
    """
    folder = find_data(Path(options.path))
    data = _original(folder, options.data)
    rows = datasets.load_from_disk(str(folder))
    splits = {**data.splits, "train": Rows(rows, data)}
    return DataModule(splits, data.task, collate=data.collate, augment=data.augment, keys=data.keys)


def find_data(path: Path) -> Path:
    """The folder of a small data set: in a run folder, or this one. Raises `DataError` where there is none."""
    places: Sequence[Path] = [*sorted(path.glob("stages/*-data/artifact/data")), path / "data", path]
    for place in places:
        if (place / "dataset_info.json").is_file():
            return place.resolve()
    raise DataError(
        f"distilled: {path} holds no small data set; give the folder of a finished run of dc, dsa, dm, mtt, dilm, "
        "coreset or synthesize"
    )


def _original(folder: Path, given: Mapping[str, Any] | None) -> DataModule:
    """The data that the small set was made from: as the options say, or else as the run's recipe says."""
    from pydantic import ValidationError

    recipe = next((p / "recipe.yaml" for p in folder.parents if (p / "recipe.yaml").is_file()), None)
    if given is None and recipe is None:
        raise DataError(
            f"distilled: {folder} does not lie in a run folder, so the task and the other splits are not known: "
            "name their data (`data: {use: …}`)"
        )
    section = dict(given) if given is not None else load(recipe)["data"] if recipe else {}
    use = section.pop("use", None)
    if use in (None, "given:given"):
        raise DataError("distilled: the run was made from Python objects; name the data with its other splits "
                        "(`data: {use: …}`)")  # fmt: skip
    component = PluginManager().get("data", use)
    model = component.load_options()
    try:
        found: DataModule = component.load_target()(model.model_validate(section) if model else None)
    except ValidationError as error:
        raise DataError("distilled: " + "; ".join(explain(error, model, "data"))) from None
    return found
