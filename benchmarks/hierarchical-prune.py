"""HierarchicalPrune against its parts at equal budget, on the quickstart's transformer and captioned shapes:

    python benchmarks/hierarchical-prune.py --seeds 0 1 2

For every seed one teacher is trained; every line prunes a quarter of its parameters and trains as many steps. The
figure is the mean squared distance to the teacher's predictions on validation pictures (lower is better). Runs that are
done are kept in `--runs` and not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import kdcore

OWN = ["method.l_task=1", "method.l_out=0", "method.l_feat=0"]
VARIANTS: dict[str, list[str]] = {
    "pruned, not trained": ["method.l_out=0", "method.l_feat=0"],
    "pruned, own loss, all weights (the ablation)": [*OWN, "method.pwp=false"],
    "pruned, own loss, late weights": OWN,
    "distilled, features only": ["method.l_out=0", "method.l_feat=1"],
    "distilled, all weights (pwp off)": ["method.pwp=false"],
    "distilled, late weights, outputs only": ["method.l_feat=0"],
    "distilled, late weights (the method)": [],
    "the same, by contribution alone (position_weight off)": ["method.position_weight=false"],
    "the same, inverse guidance (above 20 % pruned)": ["method.sgd_mode=inverse", "method.sgd_threshold=0.2"],
    "the same, the first eligible blocks instead (3, 4)": ["method.cut_blocks='3,4'"],
    "the same, 4-bit weights": ["method.quantize=nf4"],
}


def measure(seed: int, overrides: list[str], where: Path) -> tuple[float, dict[str, float]]:
    """The distance at the end, and the last line of the run's table."""
    shared = [f"seed={seed}", "method.samples=0", "train.log_every=1000"]
    result = kdcore.run("hierarchical-prune", [*shared, *overrides], run_dir=where, resume=True)
    return result.metrics["val/output-distance"], result.rows[-1]


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/hierarchical-prune"))
    parser.add_argument("--only", nargs="+", type=int, help="numbers of lines, from 0")
    given = parser.parse_args()
    chosen = [name for i, name in enumerate(VARIANTS) if given.only is None or i in given.only]
    found: dict[str, list[float]] = {name: [] for name in chosen}
    for seed in given.seeds:
        measure(seed, [], given.runs / f"teacher-{seed}")
        (teacher,) = (given.runs / f"teacher-{seed}" / "stages").glob("*-teacher/artifact/teacher")
        taken = ["method.train_teacher=false", "teacher.architecture=null", "teacher.config={}",
                 f"teacher.checkpoint={teacher}"]  # fmt: skip
        for i, name in enumerate(VARIANTS):
            if name in chosen:
                value, row = measure(seed, [*taken, *VARIANTS[name]], given.runs / f"{i}-{seed}")
                found[name].append(value)
                print(json.dumps({"seed": seed, "variant": name, "distance": value, **row}), flush=True)
    print(
        f"\n| student | distance x 1000, seeds {', '.join(map(str, given.seeds))} | mean ± deviation |\n|---|---|---|"
    )
    for name, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{1000 * v:.1f}" for v in values)
        print(f"| {name} | {each} | {1000 * statistics.mean(values):.1f} ± {1000 * spread:.1f} |")


if __name__ == "__main__":
    main()
