"""The citation graphs of Planetoid (Yang et al. 2016, arXiv:1603.08861), from their raw files."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.io import read_planetoid_data

from kd_pyg.graph import GraphData, random_split
from kd_pyg.options import FOLDERS, PlanetoidOptions
from kdcore.data import IGNORE
from kdcore.errors import DataError

CLASSES = {
    "cora": ("Theory", "Reinforcement_Learning", "Genetic_Algorithms", "Neural_Networks", "Probabilistic_Methods",
             "Case_Based", "Rule_Learning"),
    "citeseer": ("AI", "ML", "IR", "DB", "Agents", "HCI"),
    "pubmed": ("Diabetes_Experimental", "Diabetes_Type_2", "Diabetes_Type_1"),
}  # fmt: skip
"""Class names in label order: told from the number of papers of each class, which the raw files do not name."""


def planetoid(options: PlanetoidOptions) -> GraphData:
    """The graph. Nodes without any word (CiteSeer has 15, known from its edges only) have no label and are in no
    split.

    Raises:
        DataError: if the raw files are neither there nor to be had.
    """
    found = _read(options)
    words = found.x > 0
    labels = found.y.where(words.any(1), IGNORE)
    if options.split == "public":
        splits = {name: found[f"{name}_mask"].nonzero().flatten() for name in ("train", "val", "test")}
    else:
        splits = random_split(labels, options.val_fraction, options.test_fraction, options.split_seed)
    x = found.x / found.x.sum(1, keepdim=True).clamp(min=1e-12) if options.normalize else found.x
    return GraphData(x, found.edge_index, labels, splits, CLASSES[options.name], texts=word_texts(words),
                     hops=options.hops, fanout=options.fanout)  # fmt: skip


def word_texts(words: Tensor) -> list[str]:
    """A text per node from the words `[N, F]` it has, by number: `w12 w87`; `no words` where there is none."""
    texts: list[list[str]] = [[] for _ in range(len(words))]
    for node, word in words.nonzero().tolist():
        texts[node].append(f"w{word}")
    return [" ".join(text) or "no words" for text in texts]


def _read(options: PlanetoidOptions) -> Data:
    raw = options.raw
    if raw is None:
        try:
            raw = Path(Planetoid(str(Path(options.root).expanduser()), FOLDERS[options.name]).raw_dir)
        except Exception as error:  # what a download can fail with depends on the libraries beneath
            raise DataError(
                f"data.root: the raw files of {options.name!r} (ind.{options.name}.*) are not in {options.root!r} and "
                f"cannot be fetched: {type(error).__name__}: {error}"
            ) from error
    try:
        return read_planetoid_data(str(raw), options.name)
    except Exception as error:  # damaged pickles fail in many ways
        raise DataError(f"the raw files in {raw} cannot be read: {type(error).__name__}: {error}") from error
