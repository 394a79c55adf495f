"""Hooks of kd-dataset-distill."""

from __future__ import annotations

from dataclasses import dataclass

from kdcore import Component, Paper, hookimpl
from kdcore.components import Kind

TAGS = ("dataset-distillation", "classification")


@dataclass(frozen=True)
class Entry:
    """A method: its target, its options, what lists say of it, and where it comes from."""

    target: str
    options: str
    summary: str
    tags: tuple[str, ...]
    paper: Paper


METHODS: dict[str, Entry] = {
    "dc": Entry(
        "images:DC",
        "DC",
        "images whose gradients are those of the real data",
        ("image", "gradients"),
        Paper(
            "Dataset Condensation with Gradient Matching",
            "Bo Zhao, Konda Reddy Mopuri, Hakan Bilen",
            "ICLR",
            2021,
            "2006.05929",
            "https://github.com/VICO-UoE/DatasetCondensation",
        ),
    ),
    "dsa": Entry(
        "images:DSA",
        "DSA",
        "gradient matching under the same augmentation of both sides",
        ("image", "gradients", "augmentation"),
        Paper(
            "Dataset Condensation with Differentiable Siamese Augmentation",
            "Bo Zhao, Hakan Bilen",
            "ICML",
            2021,
            "2102.08259",
            "https://github.com/VICO-UoE/DatasetCondensation",
        ),
    ),
    "dm": Entry(
        "images:DM",
        "DM",
        "images whose mean embeddings are those of the real data",
        ("image", "features"),
        Paper(
            "Dataset Condensation with Distribution Matching",
            "Bo Zhao, Hakan Bilen",
            "WACV",
            2023,
            "2110.04181",
            "https://github.com/VICO-UoE/DatasetCondensation",
        ),
    ),
    "mtt": Entry(
        "trajectories:MTT",
        "MTT",
        "images that move a network as epochs of real data do",
        ("image", "trajectories"),
        Paper(
            "Dataset Distillation by Matching Training Trajectories",
            "George Cazenavette, Tongzhou Wang, Antonio Torralba, Alexei A. Efros, Jun-Yan Zhu",
            "CVPR",
            2022,
            "2203.11932",
            "https://github.com/GeorgeCazenavette/mtt-distillation",
        ),
    ),
    "dilm": Entry(
        "dilm:DiLM",
        "DiLM",
        "a language model whose texts give the gradients of the real data",
        ("text", "gradients", "generation"),
        Paper(
            "DiLM: Distilling Dataset into Language Model for Text-level Dataset Distillation",
            "Aru Maekawa, Satoshi Kosugi, Kotaro Funakoshi, Manabu Okumura",
            "Findings of NAACL",
            2024,
            "2404.00264",
            "https://github.com/arumaekawa/DiLM",
        ),
    ),
    "coreset": Entry(
        "coreset:Coreset",
        "Coreset",
        "a small part of the real data: herding, k-centres, perplexity or LESS",
        ("image", "text", "selection", "any"),
        Paper(
            "LESS: Selecting Influential Data for Targeted Instruction Tuning",
            "Mengzhou Xia, Sadhika Malladi, Suchin Gururangan, Sanjeev Arora, Danqi Chen",
            "ICML",
            2024,
            "2402.04333",
            "https://github.com/princeton-nlp/LESS",
        ),
    ),
    "synthesize": Entry(
        "synthesize:Synthesize",
        "Synthesize",
        "samples of each class that a text teacher writes",
        ("text", "generation", "black-box"),
        Paper(
            "Knowledge Distillation and Dataset Distillation of Large Language Models: Emerging Trends, Challenges, "
            "and Future "
            "Directions",
            "Luyang Fang, Xiaowei Yu, Jiazhang Cai, Yongkai Chen, Shushan Wu, Tianming Liu, Ping Ma",
            "Artificial Intelligence Review",
            2025,
            "2504.14772",
        ),
    ),
}
"""The methods by name."""


@hookimpl
def kd_register_methods() -> list[Component]:
    """Matching, selection and synthesis."""
    return [
        Component(
            "method",
            name,
            f"kd_dataset_distill.{entry.target}",
            f"kd_dataset_distill.options:{entry.options}Options",
            entry.summary,
            (*TAGS, *entry.tags),
            entry.paper,
            f"recipes/{name}",
        )
        for name, entry in METHODS.items()
    ]


@hookimpl
def kd_register_data() -> list[Component]:
    """The small data sets themselves, for any recipe."""
    return [_component("data", "distilled", "artifact:distilled", "Distilled", "the small data set that a run made",
                       ("image", "text", *TAGS))]  # fmt: skip


@hookimpl
def kd_register_students() -> list[Component]:
    """The papers' network."""
    return [_convnet("student")]


@hookimpl
def kd_register_teachers() -> list[Component]:
    """The papers' network, and the generator of DiLM."""
    generator = _component(
        "teacher",
        "dd-generator",
        "generator:build",
        "Generator",
        "a causal language model with a start token for every class",
        ("text", "generation"),
    )
    return [_convnet("teacher"), generator]


def _convnet(kind: Kind) -> Component:
    return _component(kind, "dd-convnet", "convnet:convnet", "ConvNet", "the ConvNet of dataset condensation",
                      ("image", "classification"))  # fmt: skip


def _component(kind: Kind, name: str, target: str, options: str, summary: str, tags: tuple[str, ...]) -> Component:
    return Component(
        kind, name, f"kd_dataset_distill.{target}", f"kd_dataset_distill.options:{options}Options", summary, tags
    )
