"""A graph in files: a table of nodes and a table of edges."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor

from kd_pyg.graph import GraphData, random_split
from kd_pyg.options import GraphFilesOptions
from kdcore.data import IGNORE
from kdcore.errors import DataError, did_you_mean

READERS: dict[str, Callable[..., pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, keep_default_na=False, na_values=[""]),
    ".tsv": lambda path: pd.read_csv(path, sep="\t", keep_default_na=False, na_values=[""]),
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".parquet": pd.read_parquet,
}
SPLITS = ("train", "val", "test")


def graph_files(options: GraphFilesOptions) -> GraphData:
    """The graph.

    Raises:
        DataError: if a file or column is missing, an edge names a node that there is not, a label is no class, two
            nodes have one name, or there is nothing to make features of.
    """
    nodes = read_table(options.nodes, "nodes")
    texts = None
    if options.text is not None and ("text" in options.model_fields_set or options.text in nodes):
        texts = [None if pd.isna(text) else str(text) for text in column(nodes, options.text, "text")]
    labels, classes = encode_labels(column(nodes, options.label, "label"), options.classes)
    return GraphData(
        _features(options, nodes, texts),
        _edges(options, nodes),
        labels,
        _splits(options, nodes, labels),
        classes,
        texts=texts,
        undirected=options.undirected,
        hops=options.hops,
        fanout=options.fanout,
    )


def read_table(path: str, key: str) -> pd.DataFrame:
    """A table from a csv, tsv, jsonl or parquet file. Raises `DataError` naming the option `key`."""
    file = Path(path).expanduser()
    if file.suffix not in READERS:
        raise DataError(f"data.{key}: {path!r} is none of {', '.join(READERS)}")
    if not file.is_file():
        raise DataError(f"data.{key}: there is no file {path!r}")
    try:
        return READERS[file.suffix](file)
    except (OSError, ValueError) as error:
        raise DataError(f"data.{key}: {path!r} cannot be read: {error}") from error


def column(table: pd.DataFrame, name: str, key: str) -> pd.Series[Any]:
    """A column of a table. Raises `DataError` naming the option `key` and near names."""
    if name not in table:
        raise DataError(f"data.{key}: the file has no column {name!r}; "
                        f"{did_you_mean(name, map(str, table.columns), 'columns')}")  # fmt: skip
    return table[name]


def encode_labels(values: pd.Series[Any], classes: list[str] | None) -> tuple[Tensor, list[str]]:
    """Classes `[N]`, -100 where there is none, and the class names.

    Raises:
        DataError: on a label that is not among the classes given.
    """
    given = [None if pd.isna(value) else _plain(value) for value in values]
    if classes is None:
        found = {value for value in given if value is not None}
        try:
            names = [str(value) for value in sorted(found)]
        except TypeError:  # numbers and strings mixed
            names = sorted(map(str, found))
    else:
        names = classes
    index: dict[str, int] = {name: i for i, name in enumerate(names)}
    labels = torch.full((len(given),), IGNORE)
    for row, value in enumerate(given):
        if value is not None:
            if str(value) not in index:
                raise DataError(
                    f"node {row} has the label {value!r}; {did_you_mean(str(value), names, 'data.classes')}"
                )
            labels[row] = index[str(value)]
    return labels, names


def _plain(value: Any) -> Any:
    """A label as Python has it; a column of whole numbers with gaps is read as floats."""
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _edges(options: GraphFilesOptions, nodes: pd.DataFrame) -> Tensor:
    if options.edges is None:
        return torch.empty(2, 0, dtype=torch.long)
    table = read_table(options.edges, "edges")
    names: list[Hashable] = list(range(len(nodes)))
    if options.id is not None:
        names = list(column(nodes, options.id, "id"))
    number = {name: i for i, name in enumerate(names)}
    if len(number) < len(names):
        twice = next(name for i, name in enumerate(names) if number[name] != i)
        raise DataError(f"data.id: two nodes are named {twice!r}")
    ends = []
    for key in ("source", "target"):
        given = list(column(table, getattr(options, key), key))
        if lost := [row for row, name in enumerate(given) if name not in number]:
            raise DataError(f"{options.edges}: row {lost[0]} names the {key} {given[lost[0]]!r}, and there is no such "
                            f"node in {options.nodes} ({len(lost)} such rows)")  # fmt: skip
        ends.append([number[name] for name in given])
    return torch.tensor(ends, dtype=torch.long)


def _features(options: GraphFilesOptions, nodes: pd.DataFrame, texts: list[str | None] | None) -> Tensor:
    """Features `[N, F]`: of a file, of a column, or the TF-IDF weights of the most frequent words of the texts."""
    if options.features is None:
        if texts is None:
            raise DataError("data.features: nodes without texts need features: a column of lists, or a .npy file")
        try:
            reader = TfidfVectorizer(max_features=options.max_words, dtype=np.float32)
            words = reader.fit_transform([text or "" for text in texts])
        except ValueError as error:
            raise DataError(f"data.text: no word of the texts can be a feature: {error}") from error
        return torch.from_numpy(words.toarray())
    try:
        if options.features.endswith(".npy"):
            found = np.load(Path(options.features).expanduser(), allow_pickle=False)
        else:
            found = np.stack([np.asarray(row, np.float32) for row in column(nodes, options.features, "features")])
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"data.features: {options.features!r} cannot be read: {error}") from error
    if found.ndim != 2 or len(found) != len(nodes):
        raise DataError(f"data.features: {options.features!r} has the shape {list(found.shape)} for {len(nodes)} nodes")
    return torch.from_numpy(found.astype(np.float32))


def _splits(options: GraphFilesOptions, nodes: pd.DataFrame, labels: Tensor) -> dict[str, Tensor]:
    if options.split is None:
        return random_split(labels, options.val_fraction, options.test_fraction, options.split_seed)
    given = column(nodes, options.split, "split")
    splits = {name: torch.from_numpy(np.flatnonzero(given == name)) for name in SPLITS}
    if not len(splits["train"]):
        raise DataError(f"data.split: no row of the column {options.split!r} says 'train'; it says: "
                        f"{', '.join(sorted(map(str, given.unique()))[:5])}")  # fmt: skip
    return {name: ids for name, ids in splits.items() if len(ids)}
