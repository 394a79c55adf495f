"""What the parts of DISCOVR are worth on generated clips: `python benchmarks/discovr.py --seeds 0 1 2`.

Every row is the quickstart (400 unlabelled clips of a beating ellipse, the same steps, batches and weights to start
from) with some parts switched off or exchanged; the embedding is then read by nearest neighbours and by a linear probe
on 1,000 test clips. Other data or lengths: `-o data.train=1000 -o train.epochs=30`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import kdcore

VARIANTS = {
    "one step (untrained encoder)": ["train.steps=1"],
    "video branch alone (ablation)": ["method.image_weight=0", "method.scd_weight=0"],
    "video and image branch, no clusters": ["method.scd_weight=0"],
    "clusters alone (no class tokens)": ["method.image_weight=0", "method.video_weight=0"],
    "DISCOVR": [],
    "DISCOVR, pairs of the official code": ["method.token_alignment=code"],
    "DISCOVR, student kept": ["method.keep=student"],
}
COLUMNS = ("knn-accuracy", "knn-f1", "linear-accuracy", "linear-f1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    print("| variant | " + " | ".join(COLUMNS) + " |\n" + "|---" * (1 + len(COLUMNS)) + "|")
    for variant in arguments.variants:
        found = [measure(seed, [*arguments.override, *VARIANTS[variant]]) for seed in arguments.seeds]
        cells = [cell([metrics[f"test/{name}"] for metrics in found]) for name in COLUMNS]
        print(f"| {variant} | " + " | ".join(cells) + " |", flush=True)


def measure(seed: int, overrides: list[str]) -> dict[str, float]:
    shared = [f"seed={seed}", "method.probes=[knn,linear]", "trackers=[]", "train.log_every=1000"]
    with tempfile.TemporaryDirectory() as folder:
        return kdcore.run("discovr", [*shared, *overrides], run_dir=Path(folder) / "run").metrics


def cell(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
