"""The recipe: which components, with which options, trained how. Validated before anything heavy is imported."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from kdcore.components import Kind
from kdcore.errors import ComponentError, RecipeError, did_you_mean, shown
from kdcore.options import CacheOptions, Options
from kdcore.plugins import PluginManager
from kdcore.reading import load as load
from kdcore.training import OptimizerOptions as OptimizerOptions
from kdcore.training import ScheduleOptions as ScheduleOptions
from kdcore.training import Section
from kdcore.training import TrainOptions as TrainOptions

MOST_PROBLEMS = 20
"""That a message lists."""


def _shorthand(value: Any) -> Any:
    return {"use": value} if isinstance(value, str) else value


def _switch(value: Any) -> Any:
    """`true` for a section with nothing but its defaults, `false` for none."""
    return {} if value is True else None if value is False else value


class ModelSpec(BaseModel):
    """One teacher or student: its component, that component's options, and whether it is trained first; whether what
    the teacher says is kept in a cache."""

    model_config = ConfigDict(extra="allow")
    use: str
    train: Annotated[dict[str, Any] | None, BeforeValidator(_switch)] = None
    cache: Annotated[CacheOptions | None, BeforeValidator(_switch)] = None
    _folder: str | None = None  # `cache: FOLDER`, an option of components that keep texts

    @model_validator(mode="wrap")
    @classmethod
    def _set_apart(cls, value: Any, handler: Any) -> Any:
        named = isinstance(value, dict) and isinstance(value.get("cache"), str)
        made = handler({k: v for k, v in value.items() if k != "cache"} if named else value)
        made._folder = value["cache"] if named else None
        return made


class LossSpec(BaseModel):
    """One loss of the list, and how it enters the sum."""

    model_config = ConfigDict(extra="allow")
    use: str
    name: str | None = Field(None, pattern=r"^[^./]+$")
    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    warmup: float = Field(0.0, ge=0)
    teacher: str = "teacher"


class ComponentSpec(BaseModel):
    """Data or a method: its component and that component's options."""

    model_config = ConfigDict(extra="allow")
    use: str


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_-]*$")]
"""Of roles and stages: they become names of files, and parts of key paths."""


class StageOverrides(Section):
    """What one stage does differently, by stage name."""

    train: dict[str, Any] = Field({}, description="overrides of `train`")


class EvalOptions(Section):
    """What is measured, and on which splits. The first metric is the one that comparisons use."""

    metrics: list[str] = Field([], description="names; default: the task's own")
    on: list[str] = Field(
        ["val"], min_length=1, description="splits the student is evaluated on at the end; the first during training"
    )
    window: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="height and width of a window that slides over the images of a segmentation; default: no window",
    )
    stride: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="pixels that it moves by, down and to the right; default: two thirds of the window"
    )

    @model_validator(mode="after")
    def _slides(self) -> EvalOptions:
        if self.stride and not (self.window and all(s <= w for s, w in zip(self.stride, self.window, strict=True))):
            raise ValueError("stride: it belongs to a window, which it may not exceed: set `window`, or leave it out")
        return self


Model = Annotated[ModelSpec, BeforeValidator(_shorthand)]


class Recipe(Section):
    """A whole recipe. `teacher: X` is short for `teachers: {teacher: X}`, likewise `student`."""

    method: Annotated[ComponentSpec, BeforeValidator(_shorthand)]
    teachers: dict[Name, Model] = {}
    students: dict[Name, Model] = {}
    data: Annotated[ComponentSpec, BeforeValidator(_shorthand)]
    losses: list[Annotated[LossSpec, BeforeValidator(_shorthand)]] = []
    train: TrainOptions = Field(default_factory=lambda: TrainOptions())
    stages: dict[Name, StageOverrides] = {}
    eval: EvalOptions = Field(default_factory=lambda: EvalOptions())
    seed: int = Field(0, ge=0)
    trackers: list[str] | None = Field(None, description="Accelerate trackers; default: tensorboard where installed")

    @model_validator(mode="before")
    @classmethod
    def _roles(cls, value: Any) -> Any:
        if isinstance(value, dict):
            value = dict(value)
            for one, many in (("teacher", "teachers"), ("student", "students")):
                if one in value:
                    if many in value:
                        raise ValueError(f"give either {one!r} or {many!r}, not both")
                    value[many] = {one: value.pop(one)}
        return value

    def train_for(self, stage: str, *more: Mapping[str, Any]) -> TrainOptions:
        """The `train` section of one stage: the recipe's, changed by `more` and then by `stages.<stage>.train`."""
        merged: dict[str, Any] = self.train.model_dump(exclude_unset=True)
        for override in (*more, self.stages[stage].train if stage in self.stages else {}):
            merged = _deep_merge(merged, override)
        return TrainOptions.model_validate(merged)


def _deep_merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    if "epochs" in over and "steps" not in over:
        merged.pop("steps", None)
    for key, value in over.items():
        value = {"name": value} if key in ("optimizer", "schedule") and isinstance(value, str) else value
        old = merged.get(key)
        same = (
            isinstance(value, Mapping)
            and isinstance(old, Mapping)
            and value.get("name", old.get("name")) == old.get("name")
        )
        merged[key] = _deep_merge(old, value) if same else value  # type: ignore[arg-type]
    return merged


@dataclass(frozen=True)
class Resolved:
    """A valid recipe and the validated options of each of its components, by key path such as `students.student`."""

    recipe: Recipe
    options: dict[str, Options | None]

    @property
    def passing(self) -> set[str]:
        """Key paths of options that do not change the result."""
        own = {f"{key}.{name}" for key, options in self.options.items() if options for name in options.passing}
        cached = [f"teachers.{role}.cache" for role, spec in self.recipe.teachers.items() if spec.cache]
        return own.difference(cached) | {f"{key}.folder" for key in cached}

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over all that may change the result: what artifacts and checkpoints belong to."""
        data = self.dump()
        for path in self.passing:
            *parents, last = path.split(".")
            _node(data, parents).pop(last, None)
        return hashlib.blake2b(json.dumps(data, sort_keys=True, default=str).encode(), digest_size=8).hexdigest()

    def dump(self) -> dict[str, Any]:
        """The recipe as plain data, every default of its components written out: what the run folder keeps."""
        data = self.recipe.model_dump(mode="json", exclude_none=True)
        for key, options in self.options.items():
            node = _node(data, key.split("."))  # which may have a `cache` of its own
            given = options.model_dump(mode="json") if options else {}
            node.update({name: value for name, value in given.items() if name not in node})
        return data


def _node(data: Any, path: Iterable[str]) -> Any:
    """What stands at a key path of plain data."""
    for part in path:
        data = data[int(part)] if isinstance(data, list) else data[part]
    return data


def find_recipe(recipe: str | Path | Mapping[str, Any], manager: PluginManager) -> tuple[Any, str]:
    """A recipe's source and name: a mapping, a file, or `method` or `method/recipe` of a plugin.

    Raises:
        RecipeError, ComponentError: if there is none.
    """
    if isinstance(recipe, Mapping):
        return recipe, "run"
    text = str(recipe)
    if text.endswith((".yaml", ".yml")) or os.path.isfile(text):
        return Path(text), Path(text).stem.strip(".") or "run"  # it names a folder
    method, _, name = text.partition("/")
    files = manager.get("method", method).recipe_files()
    if (name or "quickstart") not in files:
        raise RecipeError(
            f"method {method!r} ships no recipe {name or 'quickstart'!r}; recipes: {', '.join(files) or 'none'}"
        )
    return Path(str(files[name or "quickstart"])), f"{method.partition(':')[2] or method}-{name or 'quickstart'}"


def resolve(data: Mapping[str, Any], manager: PluginManager, source: str = "recipe") -> Resolved:
    """Validate a recipe and the options of every component it names. All problems are reported together.

    Raises:
        RecipeError: with one line per problem, each with its key path and what would be valid.
    """
    try:
        recipe = Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(_report(source, explain(error, Recipe))) from None
    problems: list[str] = []
    options: dict[str, Options | None] = {}
    for key, kind, spec in _components(recipe):
        try:
            model = manager.get(kind, spec.use).load_options()
            given = dict(spec.model_extra or {})
            if (place := getattr(spec, "_folder", None)) is not None:
                given["cache"] = place
            if model is None and given:
                problems.append(f"{key}: {spec.use} takes no options, but got {', '.join(sorted(given))}")
            options[key] = model.model_validate(given) if model else None
        except ComponentError as error:
            problems.append(f"{key}.use: {error}")
        except ValidationError as error:
            problems += explain(error, typing.cast(type[BaseModel], model), key)
        except Exception as error:  # a plugin's own code
            problems.append(f"{key}: the options of {spec.use!r} fail: {type(error).__name__}: {error}")
    problems += [f"students.{role}.cache: a student learns; what teachers say can be cached"
                 for role, spec in recipe.students.items() if spec.cache]  # fmt: skip
    train_overrides = [(f"{kind}.{role}.train", spec.train) for kind in ("teachers", "students")
                       for role, spec in getattr(recipe, kind).items() if spec.train]  # fmt: skip
    train_overrides += [(f"stages.{name}.train", stage.train) for name, stage in recipe.stages.items()]
    for key, override in train_overrides:
        try:
            TrainOptions.model_validate(_deep_merge(recipe.train.model_dump(exclude_unset=True), override))
        except ValidationError as error:
            problems += explain(error, TrainOptions, key)
        if "precision" in override:
            problems.append(f"{key}.precision: precision belongs to the whole run: set train.precision")
    if problems:
        raise RecipeError(_report(source, problems))
    return Resolved(recipe, options)


def with_changes(options: Options | None, changes: Mapping[str, Any], key: str) -> Options:
    """A component's options, some of them changed. Raises `RecipeError` where it has no such options."""
    if options is None:
        raise RecipeError(f"{key}: the component takes no options, but {', '.join(changes)} are to be changed")
    try:
        return type(options).model_validate({**options.model_dump(), **changes})
    except ValidationError as error:
        raise RecipeError("\n".join(explain(error, type(options), key))) from None


def recipe_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors that complete and check YAML."""
    return Recipe.model_json_schema()


def _components(recipe: Recipe) -> list[tuple[str, Kind, Any]]:
    found: list[tuple[str, Kind, Any]] = [("method", "method", recipe.method), ("data", "data", recipe.data)]
    found += [(f"teachers.{role}", "teacher", spec) for role, spec in recipe.teachers.items()]
    found += [(f"students.{role}", "student", spec) for role, spec in recipe.students.items()]
    return found + [(f"losses.{i}", "loss", spec) for i, spec in enumerate(recipe.losses)]


def explain(error: ValidationError, model: type[BaseModel], key: str = "") -> list[str]:
    """A pydantic error as lines of `key.path: what is wrong`, with the nearest valid key where one is unknown."""
    lines = []
    for item in error.errors():
        *above, last = item["loc"] or ("",)
        path = [part for part in above if not (isinstance(part, str) and "[" in part)] + [last]
        where = ".".join(filter(None, [key, *map(shown, path)]))
        if item["type"] == "extra_forbidden":
            valid = _keys_at(model, path[:-1])
            lines.append(f"{where}: unknown key; {did_you_mean(str(path[-1]), valid, 'valid keys')}")
        elif item["type"] == "missing":
            lines.append(f"{where}: required, but not given")
        else:
            value = "" if isinstance(item["input"], Mapping | list) else f" (got {shown(repr(item['input']))})"
            lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}{value}".removeprefix(": "))
    return lines


def _keys_at(model: type[BaseModel], path: list[Any]) -> list[str]:
    """The keys valid at a path into a model; empty where the path leaves the models."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = [] if field is None else [t for t in _types_in(field.annotation) if issubclass(t, BaseModel)]
        if inner:
            model = inner[0]
    extra = ["teacher", "student"] if model is Recipe else []
    return [*model.model_fields, *extra]


def _types_in(annotation: Any) -> list[type]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated, dict, list):
        return [t for arg in typing.get_args(annotation) for t in _types_in(arg)]
    return [annotation] if isinstance(annotation, type) else []


def _report(source: str, problems: list[str]) -> str:
    more = [f"… and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
    return f"{source} is not valid:\n" + "\n".join(f"  {line}" for line in problems[:MOST_PROBLEMS] + more)
