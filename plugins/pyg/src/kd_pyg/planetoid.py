"""The citation graphs of Planetoid (Yang et al. 2016, arXiv:1603.08861), from their raw files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch import Tensor
from torch_geometric.data import Data, download_url
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


PARTS = ("x", "tx", "allx", "y", "ty", "ally", "graph")
"""The raw files that are pickles; `test.index` is text."""
PLAIN = {("collections", "defaultdict"), ("copy_reg", "_reconstructor"), ("numpy", "dtype"), ("numpy", "ndarray")}
PLAIN |= {(module, name) for module in ("builtins", "__builtin__") for name in ("list", "object")}
PLAIN |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
PLAIN |= {(f"scipy.sparse.{module}", "csr_matrix") for module in ("csr", "_csr")}
"""What the published files hold: arrays, sparse matrices and lists of neighbours."""


class _Plain(pickle.Unpickler):
    """Reads no pickle that names anything but `PLAIN`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no graph has")
        return super().find_class(module, name)


def _check(raw: Path, name: str) -> None:
    for part in PARTS:
        with open(raw / f"ind.{name}.{part}", "rb") as file:
            _Plain(file, encoding="latin1").load()


def _read(options: PlanetoidOptions) -> Data:
    raw = options.raw
    if raw is None:
        try:
            raw = Path(options.root).expanduser() / FOLDERS[options.name] / "raw"
            for part in (*PARTS, "test.index"):
                if not (raw / f"ind.{options.name}.{part}").is_file():
                    download_url(f"{Planetoid.url}/ind.{options.name}.{part}", str(raw))
        except Exception as error:  # what a download can fail with depends on the libraries beneath
            raise DataError(
                f"data.root: the raw files of {options.name!r} (ind.{options.name}.*) are not in {options.root!r} and "
                f"cannot be fetched: {type(error).__name__}: {error}"
            ) from error
    try:
        _check(Path(raw), options.name)
        return read_planetoid_data(str(raw), options.name)
    except Exception as error:  # damaged pickles fail in many ways
        raise DataError(f"the raw files in {raw} cannot be read: {type(error).__name__}: {error}") from error
