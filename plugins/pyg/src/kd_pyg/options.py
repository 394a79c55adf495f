"""Options of the graphs and of the networks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from kdcore.options import Download, Options

RAW_FILES = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
RAW_BYTES = {"cora": 830_000, "citeseer": 1_050_000, "pubmed": 6_900_000}
FOLDERS = {"cora": "Cora", "citeseer": "CiteSeer", "pubmed": "PubMed"}


class NeighbourhoodOptions(Options):
    """How much of the graph a batch holds around its nodes."""

    hops: int | None = Field(
        2, ge=0, description="hops around a batch's nodes that the batch holds, at least the network's layers; "
        "null: the whole graph"
    )  # fmt: skip
    fanout: list[int] = Field(
        [], description="neighbours drawn per node and hop in training, such as [10, 5]; default: all of them"
    )

    @model_validator(mode="after")
    def _one_number_per_hop(self) -> Self:
        if self.fanout and len(self.fanout) != self.hops:
            raise ValueError(f"fanout needs one number per hop: {len(self.fanout)} are given, hops is {self.hops}")
        if any(number < 1 for number in self.fanout):
            raise ValueError("fanout: at least one neighbour per hop")
        return self


class RandomSplitOptions(NeighbourhoodOptions):
    """Shares of a split drawn at random; what is left over is trained on."""

    val_fraction: float = Field(0.2, gt=0, lt=1, description="share of the labelled nodes in val (random split)")
    test_fraction: float = Field(0.2, gt=0, lt=1, description="share of the labelled nodes in test (random split)")
    split_seed: int = Field(0, ge=0, description="which random split")

    @model_validator(mode="after")
    def _leaves_training_nodes(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction and test_fraction together leave no node for training")
        return self


class PlanetoidOptions(RandomSplitOptions):
    """The citation graphs of Planetoid (Yang et al. 2016); a node's text is the list of its words, `w12 w87`."""

    name: Literal["cora", "citeseer", "pubmed"] = Field("cora", description="which graph")
    root: str = Field(
        "data/planetoid", description="folder with the `ind.*` files, or where they are downloaded to and kept"
    )
    split: Literal["public", "random"] = Field(
        "public", description="the public split (20 training nodes per class), or one drawn at random"
    )
    normalize: bool = Field(True, description="divide each node's word counts by their sum")

    @property
    def raw(self) -> Path | None:
        """The folder in which the raw files lie, or `None` where they must be fetched."""
        root = Path(self.root).expanduser()
        for folder in (root, root / FOLDERS[self.name] / "raw"):
            if all((folder / f"ind.{self.name}.{part}").is_file() for part in RAW_FILES):
                return folder
        return None

    def downloads(self) -> list[Download]:
        """The raw files, unless they are in `root`."""
        return [] if self.raw else [Download(f"Planetoid {self.name}", "GitHub", RAW_BYTES[self.name])]


class GraphFilesOptions(RandomSplitOptions):
    """A graph in files: a table of nodes with texts, labels and splits, and a table of edges."""

    nodes: str = Field(description="csv, tsv, jsonl or parquet file with one row per node")
    edges: str | None = Field(None, description="csv, tsv, jsonl or parquet file with one row per edge; default: none")
    id: str | None = Field(None, description="column of the nodes' names that edges refer to; default: row numbers")
    text: str | None = Field("text", description="column of the nodes' texts; null: there are none")
    label: str = Field("label", description="column of labels, numbers or strings; empty where unknown")
    split: str | None = Field(
        None, description="column that says train, val or test, anything else being context; default: drawn at random"
    )
    source: str = Field("source", description="column of edges: where they begin")
    target: str = Field("target", description="column of edges: where they end")
    undirected: bool = Field(True, description="every edge counts in both directions")
    features: str | None = Field(
        None, description="column of lists of numbers, or a .npy file [N, F]; default: words of the texts (TF-IDF)"
    )
    max_words: int = Field(
        2000, gt=0, description="words that are features, the most frequent ones, without `features`"
    )
    classes: list[str] | None = Field(
        None, description="class names in label order; default: the labels that occur, sorted"
    )


class StochasticBlockOptions(NeighbourhoodOptions):
    """A generated graph of communities: a node's class decides its neighbours, its features and its words."""

    nodes: int = Field(300, gt=0, description="nodes")
    classes: int = Field(4, gt=1, description="communities, which are the classes")
    degree: float = Field(6.0, ge=0, description="mean number of neighbours")
    homophily: float = Field(0.7, ge=0, le=1, description="share of the neighbours that have the node's own class")
    features: int = Field(16, gt=0, description="features of a node")
    signal: float = Field(0.5, ge=0, description="distance of class means in the features, where the noise has 1")
    words: int = Field(8, ge=0, description="words in a node's text; 0 leaves the nodes without texts")
    vocabulary: int = Field(20, gt=0, description="words that belong to each class")
    confusion: float = Field(0.3, ge=0, le=1, description="share of a text's words whose class is drawn at random")
    train_per_class: int = Field(20, gt=0, description="training nodes of each class")
    val: int = Field(80, gt=0, description="nodes for validation; the test has what is left")
    seed: int = Field(0, ge=0, description="of the generator")

    @model_validator(mode="after")
    def _leaves_test_nodes(self) -> Self:
        if self.classes * self.train_per_class + self.val >= self.nodes:
            raise ValueError("train_per_class and val leave no node for the test")
        return self


class GNNOptions(Options):
    """A network of message-passing layers for node classification."""

    hidden: int = Field(64, gt=0, description="width of every layer")
    layers: int = Field(2, ge=1, description="message-passing layers")
    pre: int = Field(1, ge=1, description="linear layers before the first message passing")
    post: int = Field(1, ge=0, description="hidden linear layers between the last message passing and the classifier")
    activation: Literal["prelu", "relu"] = Field("prelu", description="after the normalisation of each layer")
    batch_norm: bool = Field(True, description="normalise each layer's outputs over the nodes of the batch's graph")
    l2_norm: bool = Field(False, description="each layer's outputs have length 1")
    dropout: float = Field(0.2, ge=0, lt=1, description="dropout after each layer")
    checkpoint: str | None = Field(None, description="folder of a saved model or of a run; it decides the architecture")


class GATOptions(GNNOptions):
    """A graph attention network."""

    heads: int = Field(4, ge=1, description="attention heads; they divide the width")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} cannot be divided into {self.heads} heads")
        return self
