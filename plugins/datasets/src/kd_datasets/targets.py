"""What the columns mean: their roles, the kind of task, and the numbers of the classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import datasets

from kd_datasets.options import LANGUAGE_ROLES, ROLES, DatasetsOptions, Kind
from kdcore.data import IGNORE
from kdcore.errors import DataError, did_you_mean

NEEDS: dict[Kind, str] = {"classification": "label", "multilabel": "label", "regression": "label",
                          "segmentation": "mask"}  # fmt: skip

Form = Literal["text", "completion", "messages", "preference"]
FORMS: dict[Form, set[str]] = {"text": {"text"}, "completion": {"prompt", "completion"}, "messages": {"messages"},
                               "preference": {"prompt", "chosen", "rejected"}}  # fmt: skip
"""The columns of each form that a language model's data may have; a template stands for a column of prompts."""


def column_names(rows: Any) -> list[str]:
    """The columns of a data set or a stream."""
    return list(rows.column_names or next(iter(rows)))


def find_roles(options: DatasetsOptions, available: list[str]) -> dict[str, str]:
    """`role -> column`: those the options name, or, if they name none, the columns that are named like a role. Those of
    a language model are found by their names where the task is one, or where there is a tokenizer and nothing else.

    Raises:
        DataError: if a column is not there, or no role has one.
    """
    roles = {role: column for role in (*ROLES, *LANGUAGE_ROLES) if (column := getattr(options, role))}
    for option, column in {**roles, **{f"columns.{key}": column for key, column in options.columns.items()}}.items():
        if column not in available:
            near = did_you_mean(column, available, "columns")
            raise DataError(f"{option}: the data has no column {column!r}; {near} (all: {', '.join(available)})")
    if not roles:
        roles = {role: role for role in ROLES if role in available}
        if options.template is not None:
            roles.pop("text", None)
        if "text" not in roles and (
            options.task == "causal-lm" or (not options.task and not roles and options.tokenizer)
        ):
            roles |= _language_roles(options, available)
    if not roles and not options.columns:
        raise DataError(
            f"say which column is what (`image:`, `label:`, `text:` …); the columns: {', '.join(available)}"
        )
    return roles


def _language_roles(options: DatasetsOptions, available: list[str]) -> dict[str, str]:
    """The columns of the one form that is complete. Raises `DataError` where several are."""
    forms: list[Form] = ["completion", "preference"] if options.template is not None else [*FORMS]
    complete = [wanted for form in forms if (wanted := _columns(form, options)) <= set(available)]
    if len(complete) > 1:
        found = " or ".join(", ".join(sorted(wanted)) for wanted in complete)
        raise DataError(f"the data has several columns to learn from: name those to be used ({found})")
    return {role: role for wanted in complete for role in LANGUAGE_ROLES if role in wanted}


def _columns(form: Form, options: DatasetsOptions) -> set[str]:
    return FORMS[form] - ({"prompt"} if options.template is not None else set())


def find_form(options: DatasetsOptions, roles: Mapping[str, str]) -> Form:
    """Which form a language model's data has.

    Raises:
        DataError: if the columns are those of no form, or of several.
    """
    given = {role for role in ("text", *LANGUAGE_ROLES) if role in roles}
    for form in FORMS:
        if given == _columns(form, options):
            return form
    prompt = "`template`" if options.template is not None else "`prompt` (or `template`)"
    found = ", ".join(f"`{role}`" for role in sorted(given)) or "none of them"
    raise DataError(f"a language model's data is `text`, `messages`, {prompt} and `completion`, or {prompt}, `chosen` "
                    f"and `rejected`; found: {found}. Set the columns that are "
                    "missing, and leave out the others")  # fmt: skip


def find_kind(options: DatasetsOptions, roles: Mapping[str, str], feature: Any) -> Kind:
    """The kind of task: the option, or what the columns and the feature of the label suggest.

    Raises:
        DataError: if the kind needs a column that no role has, or has no use for one.
    """
    kind = options.task or _suggested(options, roles, feature)
    if (needed := NEEDS.get(kind)) and needed not in roles:
        raise DataError(f"a task of kind {kind!r} needs a column of {needed}s: set `{needed}:`")
    if kind != "causal-lm" and (strange := next((role for role in LANGUAGE_ROLES if role in roles), None)):
        raise DataError(
            f"{strange}: only a language model (`task: causal-lm`) learns from such a column; the task is {kind!r}"
        )
    return kind


def _suggested(options: DatasetsOptions, roles: Mapping[str, str], feature: Any) -> Kind:
    if any(role in roles for role in LANGUAGE_ROLES):
        return "causal-lm"
    if "mask" in roles:
        return "segmentation"
    if "label" in roles:
        if _is_list(feature):
            return "multilabel"
        return "regression" if getattr(feature, "dtype", "").startswith("float") else "classification"
    return "causal-lm" if "text" in roles and options.tokenizer else "unlabelled"


def _is_list(feature: Any) -> bool:
    return isinstance(feature, datasets.List | datasets.LargeList | list)


@dataclass(frozen=True)
class Classes:
    """The classes, and the number of each value of the label column.

    Args:
        names: in label order; empty where only their number is known.
        count: how many.
        numbers: value of the column -> class, where they differ.
        ignored: values that do not count.
    """

    names: tuple[str, ...] = ()
    count: int | None = None
    numbers: Mapping[Any, int] = field(default_factory=dict)
    ignored: tuple[Any, ...] = (None,)

    def number(self, value: Any) -> int:
        """The class of a value, `IGNORE` if it does not count. Raises `DataError` if it is no class."""
        if value in self.ignored:
            return IGNORE
        number = self.numbers.get(value) if self.numbers else int(value)
        if number is None or not 0 <= number < (self.count or 0):
            names = [str(name) for name in self.names or self.numbers]
            raise DataError(
                f"the label {value!r} is none of the {self.count} classes; {did_you_mean(str(value), names, 'classes')}"
            )
        return number


def find_classes(options: DatasetsOptions, kind: Kind, splits: Mapping[str, Any], column: str | None) -> Classes:
    """The classes of the task: from the option, the feature, or the values that occur.

    Raises:
        DataError: if they cannot be told, or labels occur that are not among them.
    """
    if kind in ("regression", "unlabelled", "causal-lm"):
        return Classes()
    named = options.classes if isinstance(options.classes, list) else []
    count = len(named) or (options.classes if isinstance(options.classes, int) else None)
    if kind == "segmentation" or column is None:
        if count is None:
            raise DataError(
                "classes: a segmentation needs its class names in the order of the mask's values, or their number"
            )
        return Classes(tuple(named), count)
    feature = _inner(next(iter(splits.values())).features, column)
    ignored = (None, options.ignore_label)
    if isinstance(feature, datasets.ClassLabel):
        if unknown := [name for name in named if name not in feature.names]:
            hint = did_you_mean(unknown[0], feature.names, "its classes")
            raise DataError(f"classes: the data has no class {unknown[0]!r}; {hint}")
        numbers = _numbers(feature.names, named, feature.names)
        by_value = {feature.str2int(name): number for name, number in numbers.items()}
        return Classes(tuple(named or feature.names), len(numbers), by_value, (*ignored, -1))
    values = None if options.streaming else _values(splits.values(), column) - set(ignored)
    if values is None and count is None:
        raise DataError(f"classes: column {column!r} of a stream does not say its classes; name them, or their number")
    if values and all(isinstance(value, str) for value in values):
        numbers = _numbers(sorted(values), named, values)
        return Classes(tuple(named or sorted(values)), len(numbers), numbers, ignored)
    if values is None:
        return Classes(tuple(named), count, {name: i for i, name in enumerate(named)}, ignored)
    return Classes(tuple(named), count or max(map(int, values or {0})) + 1, {}, ignored)


def _numbers(found: Iterable[str], named: list[str], values: Iterable[str]) -> dict[str, int]:
    """`name -> number` in the asked order, or as found. Raises `DataError` for names that were not asked for."""
    if named and (strange := sorted(set(values) - set(named))):
        raise DataError(f"classes: the data also has {', '.join(map(repr, strange[:5]))}; "
                        f"{did_you_mean(strange[0], named, 'classes')}")  # fmt: skip
    return {name: number for number, name in enumerate(named or found)}


def _inner(features: Any, column: str) -> Any:
    feature: Any = (features or {}).get(column)
    while _is_list(feature):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature


def _values(splits: Iterable[Any], column: str) -> set[Any]:
    """All values of a column; of lists, all their entries."""
    found: set[Any] = set()
    for rows in splits:
        if _is_list(rows.features[column]):
            found.update(entry for entries in rows[column] for entry in entries or ())
        else:
            found.update(rows.unique(column))
    return found
