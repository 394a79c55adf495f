"""LinguGKD on Cora: a GCN alone, the same GCN distilled, and the language model that taught it.

    python benchmarks/lingugkd.py --data ../shared/data/planetoid [--split random] [--seeds 0 1 2] [--gnn gcn]

The graph's raw texts are not part of it: a node's text is the list of its words by number (`w12 w87`). So the teacher
is a small language model without any pretraining, made from a config and trained here, on the prompts of the training
nodes. Each seed has a teacher, students and, with `--split random`, a split of its own; the students of a seed differ
in the objective only, have the same epochs, and each is taken at its best epoch on the validation nodes.
Two controls are distilled from the teacher's states dealt out to other training nodes: of the same class, and of any.
With `--no-teacher` the teacher is not measured, which is most of the time.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_from_disk

from kdcore import api

TEACHER = {"use": "transformers", "config": {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256}}  # fmt: skip


def recipe(args: argparse.Namespace, seed: int, **method: Any) -> dict[str, Any]:
    tune = {"steps": args.steps, "batch_size": 32, "optimizer": {"name": "adamw", "lr": 2e-3},
            "schedule": {"name": "cosine", "warmup": 0.1}}  # fmt: skip
    return {
        "method": {"use": "lingugkd", "tuning": "full", "neighbours": 4, "prompts": 1, "max_length": 256,
                   "feature_batch": 32, "link_prompts": 0.05, **method},
        "teacher": TEACHER,
        "student": {"use": args.gnn, "hidden": args.hidden, "dropout": 0.5},
        "data": {"use": "planetoid", "name": args.name, "root": args.data, "split": args.split, "split_seed": seed,
                 "hops": None},
        "train": {"epochs": args.epochs, "batch_size": 5000, "eval_every": 2, "save_every": 1000, "log_every": 1000,
                  "optimizer": {"name": "adamw", "lr": 5e-3, "weight_decay": 5e-4}},
        "stages": {"tune": {"train": tune}},
        "eval": {"on": ["val", "test"]},
        "seed": seed,
    }  # fmt: skip


def deal_out(run: Path, where: Path, labels: torch.Tensor, seed: int, within: bool) -> str:
    """Features in which each node has the states of another one: of its own class, or of any."""
    shutil.copytree(next(run.glob("stages/*-features/artifact")), where)
    rows = load_from_disk(str(where / "data")).to_pandas()
    nodes = torch.tensor(sorted(set(rows["node"])))
    generator = torch.Generator().manual_seed(seed)
    groups = [nodes[labels[nodes] == c] for c in labels[nodes].unique()] if within else [nodes]
    other = {int(a): int(b) for group in groups
             for a, b in zip(group, group[torch.randperm(len(group), generator=generator)], strict=True)}  # fmt: skip
    rows["node"] = rows["node"].map(other)
    shutil.rmtree(where / "data")
    Dataset.from_pandas(rows, preserve_index=False).save_to_disk(str(where / "data"))
    return str(where)


def one_seed(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, float]:
    """Test accuracies by row of the table."""
    taught = api.run(recipe(args, seed, measure_teacher=not args.no_teacher), run_dir=folder / "kd")
    alone = api.run(recipe(args, seed, distillation=False), run_dir=folder / "alone")
    labels = api.load_student(folder / "kd")[0].data.graph.y  # type: ignore[attr-defined]
    found = {"student alone": alone.metrics, "distilled": taught.metrics} | {row["model"]: row for row in taught.rows}
    for name, within in (("distilled, shuffled in class", True), ("distilled, shuffled", False)):
        features = deal_out(folder / "kd", folder / f"states-{within}", labels, seed, within)
        found[name] = api.run(recipe(args, seed, features=features), run_dir=folder / f"kd-{within}").metrics
    return {name: 100 * float(metrics["test/accuracy"]) for name, metrics in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the ind.* files")
    parser.add_argument("--name", default="cora", choices=["cora", "citeseer"])
    parser.add_argument("--split", default="random", choices=["public", "random"])
    parser.add_argument("--gnn", default="gcn", choices=["gcn", "sage", "gat", "gin"])
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=100, help="of each student; the whole graph is a batch")
    parser.add_argument("--steps", type=int, default=300, help="of the language model, 32 prompts each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-teacher", action="store_true", help="do not measure the teacher")
    args = parser.parse_args()
    disable_progress_bars()
    rows: dict[str, list[float]] = {}
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            for name, value in one_seed(args, seed, Path(folder)).items():
                rows.setdefault(name, []).append(value)
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.1f}" for name, values in rows.items()), flush=True)
    print(f"\n| {args.name}, {args.split} split, {args.gnn} | test accuracy | by seed |\n|---|---|---|")
    for name, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {name} | {statistics.mean(values):.1f} ± {spread:.1f} | {', '.join(f'{v:.1f}' for v in values)} |")


if __name__ == "__main__":
    main()
