"""Segmentation methods on microscope images of nuclei: `python benchmarks/nuclei.py FOLDER --table cnn --seeds 0 1 2`.

FOLDER holds `dsb2018_106.zip`: 106 images and a map of the nuclei of each (2018 Data Science Bowl, CC0). Three classes:
background, inside of a nucleus, and its border (a pixel with a neighbour above, below, left or right of another value).
The first 80 names are trained on, in crops of 128 x 128 pixels at half to one and a half of their scale; the last 13
are tested on, whole, at their own size.

All rows of a table have the same networks, batches and schedule, and those of a seed the same weights at the start and
the same teacher; none of the networks was trained before. Each is measured at its last step, and no setting was chosen
by the score. `-o KEY=VALUE` changes every recipe; to see that a table works: `--seeds 0 -o train.steps=2`.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import statistics
import sys
import tempfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from PIL import Image

import kdcore

ARCHIVE = "dsb2018_106.zip"
CLASSES = ["background", "inside", "border"]
METRICS = ["test/miou", "test/boundary-f1"]

LARGE = {"use": "smp", "encoder": "resnet18", "pretrained": False,
         "settings": {"upsampling": 1, "decoder_channels": 96}}  # fmt: skip
SMALL = {"use": "smp", "encoder": "mobilenetv3_small_050", "pretrained": False,
         "settings": {"upsampling": 1, "decoder_channels": 48}}  # fmt: skip
TRAINED = {"train": {"steps": 300, "eval_every": 300}}


def segformer(widths: list[int], blocks: int) -> dict[str, Any]:
    """A SegFormer with fresh weights, whose linear layers begin larger than 0.02 because they are narrow."""
    return {"use": "transformers", "config": {
        "model_type": "segformer", "hidden_sizes": widths, "depths": [blocks] * 4, "num_attention_heads": [1, 2, 4, 8],
        "decoder_hidden_size": widths[-1], "initializer_range": 0.1, "drop_path_rate": 0.0}}  # fmt: skip


TABLES: dict[str, dict[str, Any]] = {
    "cnn": {
        "base": {"method": {"use": "distill"}, "teacher": {**LARGE, **TRAINED}, "student": SMALL},
        "rows": {
            "student alone": {"losses": ["cross-entropy"]},
            "KD": {"losses": ["cross-entropy", {"use": "kd", "temperature": 1.0}]},
            "CWD": {"losses": ["cross-entropy", {"use": "cwd", "weight": 3.0}]},
            "BPKD": {"method": {"use": "bpkd"}},
            "ACAM-KD": {"method": {"use": "acam-kd"}},
        },
    },
    "segformer": {
        "base": {
            "method": {"use": "distill"},
            "teacher": {**segformer([32, 64, 80, 128], 2), **TRAINED},
            "student": segformer([16, 32, 40, 64], 1),
            "train": {"optimizer": {"lr": 1e-3}},
        },
        "rows": {
            "student alone": {"losses": ["cross-entropy"]},
            "KD": {"losses": ["cross-entropy", {"use": "kd", "temperature": 1.0}]},
            "CWD": {"losses": ["cross-entropy", {"use": "cwd", "weight": 3.0}]},
            "TransKD": {"losses": ["cross-entropy", {"use": "transkd"}]},
            "TransKD, GL-Mixer": {"losses": ["cross-entropy", {"use": "transkd", "variant": "gl", "gl_heads": 4}]},
            "TransKD, Embedding Assistant": {"losses": ["cross-entropy", {"use": "transkd", "variant": "ea"}]},
        },
    },
}


TABLES["label-assisted"] = {
    "base": {"student": SMALL},
    "rows": {
        "LAD": {"method": "lad", "stages": {"train_teacher_with_labels": {"train": {"steps": 300}}}},
        "LAD whose teacher sees no labels": {
            "method": {"use": "lad", "scale": 0}, "stages": {"train_teacher_with_labels": {"train": {"steps": 300}}}},
        "student alone": {"method": "distill", "losses": ["cross-entropy"]},
        "KD": {"method": "distill", "losses": ["cross-entropy", {"use": "kd", "temperature": 1.0}],
               "teacher": {**SMALL, **TRAINED}},
        "CWD": {"method": "distill", "losses": ["cross-entropy", {"use": "cwd", "weight": 3.0}],
                "teacher": {**SMALL, **TRAINED}},
    },
}  # fmt: skip
"""Teachers of the student's own size, trained twice as long."""
ALONE = {"hfd": "off", "weights": {"region": 0, "pixel": 0}}
TABLES["together"] = {
    "base": {"method": {"use": "gsc-kd"}, "students": {"cnn": SMALL, "vit": segformer([16, 32, 40, 64], 1)},
             "train": {"optimizer": {"lr": 1e-3}}},
    "rows": {
        "students alone": {"method": ALONE},
        "DML": {"method": {"hfd": "off", "weights": {"region": 0}, "selection": "none"}},
        "GSC-KD": {},
    },
    "metrics": ["test/miou-cnn", "test/miou-vit", "test/boundary-f1-cnn", "test/boundary-f1-vit"],
}  # fmt: skip
"""Two students and no teacher."""
FEW = {"data": {"splits": {"train": "train[:20]"}}}
MGD = {"use": "mgd-sss", "labelled_list": "labelled.txt", "lambda_region": 10, "feature_layer": "decoder"}
TABLES["semi"] = {
    "base": {
        "teachers": {
            "deep": {**SMALL, "encoder": "mobilenetv3_large_075"},
            "wide": {**SMALL, "settings": {"upsampling": 1, "decoder_channels": 192}},
        },
        "student": SMALL,
        "train": {"batch_size": 4},
    },
    "rows": {
        "MGD-SSS": {"method": {**MGD, "stage1": "auto"}},
        "MGD-SSS, pixels alone": {"method": {**MGD, "lambda_image": 0, "lambda_region": 0}},
        "student alone": {"method": "distill", "losses": ["cross-entropy"], **FEW},
        "KD": {"method": "distill", "losses": ["cross-entropy", {"use": "kd", "temperature": 1.0, "teacher": "deep"}],
               **FEW},
        "CWD": {"method": "distill", "losses": ["cross-entropy", {"use": "cwd", "weight": 3.0, "teacher": "deep"}],
                **FEW},
    },
}  # fmt: skip
"""The first 20 images are labelled, of the other 60 only MGD-SSS and its teachers make use."""
FINE_TUNING = {"background": "shared", "pseudo_thresh": None, "w_tri": 0, "w_bfd": 0, "w_gkd": 0, "w_bga_bce": 0}
TABLES["incremental"] = {
    "base": {
        "method": {"use": "barm", "task": "1-1", "channels": 48, "lr_backbone": 2e-3, "lr_old": 2e-4,
                   "best_base": False},
        "student": SMALL,
    },
    "rows": {
        "both classes at once": {"method": {"task": "2-1"}},
        "student alone (fine-tuning)": {"method": FINE_TUNING},
        "KD": {"method": {**FINE_TUNING, "w_gkd": 1}},
        "CWD": {"method": {**FINE_TUNING, "use": "barm-cwd"}},
        "BARM": {},
    },
    "metrics": ["test/miou", "test/miou-base", "test/miou-added"],
}  # fmt: skip
"""The inside first, then, with the inside labelled as background, the border."""


class CWDInSteps:
    """Registers a method of the benchmark's own: BARM's steps with the distillation of CWD in place of its own."""

    @staticmethod
    @kdcore.hookimpl
    def kd_register_methods() -> list[kdcore.Component]:
        """`barm-cwd`, with the options of `barm`."""
        from kd_barm.functional import shared_background
        from kd_barm.method import BARM
        from kd_barm.options import BARMOptions
        from kd_barm.stages import LaterStep
        from kd_classic.functional import cwd

        class Step(LaterStep):
            def forward(self, batch: Any, objective: str = "loss") -> Any:
                ours, theirs = (shared_background(net.parts(batch)[0]) for net in (self.net, self.teacher[0]))
                term = 3 * cwd(ours[:, : theirs.shape[1]], theirs, temperature=4)
                return {**super().forward(batch, objective), "cwd": term}

        class Chain(BARM):
            def step(self, *arguments: Any) -> LaterStep:
                return Step(*arguments, self.options)

        return [kdcore.Component("method", "barm-cwd", Chain, BARMOptions, "CWD in steps", ("benchmark",))]


def base(listed: str, steps: int) -> dict[str, Any]:
    """What the recipes of all tables have in common."""
    return {
        "data": {
            "use": "datasets", "path": listed, "image": "image", "mask": "mask", "task": "segmentation",
            "classes": CLASSES, "size": 128, "in_memory": True, "eval_resize": False,
            "augment": [{"random-scale-crop": {"scale": [0.5, 1.5]}}, "flip", "vertical-flip", "color-jitter"],
            "splits": {"train": "train[:80]", "val": "train[80:93]", "test": "train[93:]"},
        },
        "train": {
            "steps": steps, "batch_size": 8, "eval_batch_size": 1, "clip_norm": 5.0, "log_every": 1000,
            "optimizer": {"name": "adamw", "lr": 2e-3}, "schedule": {"name": "polynomial", "power": 0.9},
            "eval_every": 100_000, "save_every": 100_000,
        },
        "eval": {"metrics": ["miou", "boundary-f1"], "on": ["test"]},
        "trackers": [],
    }  # fmt: skip


def unpack(archive: Path, folder: Path) -> Path:
    """Pictures and three-class masks as PNG files, and the list that names them in order."""
    rows = []
    with zipfile.ZipFile(archive) as files:
        for name in sorted(n for n in files.namelist() if n.startswith("images/") and n.endswith(".png")):
            label = f"labels/{Path(name).name}"
            nuclei = np.array(Image.open(io.BytesIO(files.read(label))))
            for path, picture in ((name, Image.open(io.BytesIO(files.read(name)))), (label, three_classes(nuclei))):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                picture.save(folder / path)
            rows.append(json.dumps({"image": name, "mask": label}))
    listed = folder / "pictures.jsonl"
    listed.write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "labelled.txt").write_text("".join(f"{number}\n" for number in range(20)), encoding="utf-8")
    return listed


def three_classes(nuclei: np.ndarray) -> Image.Image:
    """0 background, 1 inside, 2 border, of a map `[H, W]` with a number for each nucleus."""
    around = np.pad(nuclei, 1, mode="edge")
    neighbours = (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:])
    border = np.any([n != nuclei for n in neighbours], axis=0)
    return Image.fromarray(np.where(nuclei == 0, 0, np.where(border, 2, 1)).astype(np.uint8))


def one_seed(listed: str, name: str, seed: int, rows: list[str], steps: int, more: list[str],
             folder: str) -> dict[str, dict[str, float]]:  # fmt: skip
    """The metrics of each row of a table; a teacher that one row has trained serves those after it."""
    manager = kdcore.PluginManager()
    manager.register(CWDInSteps, name="benchmark")
    table, found, trained = TABLES[name], {}, {}
    for number, row in enumerate(rows):
        parts = [base(listed, steps), table["base"], table["rows"][row], trained, {"seed": seed}]
        recipe: Any = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.create, parts)))
        if isinstance(recipe["method"], dict) and "labelled_list" in recipe["method"]:
            recipe["method"]["labelled_list"] = str(Path(listed).with_name("labelled.txt"))
        where = Path(folder) / f"{name}-{seed}-{number}"
        found[row] = kdcore.run(recipe, more, run_dir=where, plugins=manager).metrics
        print(f"{name}, seed {seed}, {row}: {json.dumps(found[row])}", file=sys.stderr, flush=True)
        for artifact in where.glob("stages/*/artifact/*/config.json"):
            role = artifact.parent.name
            key = ("teacher",) if role == "teacher" else ("teachers", role)
            if artifact.parents[2].name.endswith(f"-{role}") and "checkpoint" not in _at(recipe, key):
                _put(trained, key, {"checkpoint": str(artifact.parent), "train": None})
    return found


def _at(recipe: dict[str, Any], key: tuple[str, ...]) -> Any:
    for part in key:
        recipe = recipe.get(part, {})
    return recipe


def _put(recipe: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    for part in key[:-1]:
        recipe = recipe.setdefault(part, {})
    recipe[key[-1]] = value


def show(name: str, rows: list[str], found: list[dict[str, dict[str, float]]]) -> None:
    """The table in Markdown: mean and standard deviation over the seeds, and the first metric of each seed."""
    metrics = TABLES[name].get("metrics", METRICS)
    print("| student | " + " | ".join(m.removeprefix("test/") for m in metrics) + " | by seed |")
    print("|---" * (len(metrics) + 2) + "|")
    for row in rows:
        values = [[100 * seed[row][metric] for seed in found if metric in seed[row]] for metric in metrics]
        seeds = ", ".join(f"{value:.1f}" for value in values[0])
        print(f"| {row} | " + " | ".join(map(cell, values)) + f" | {seeds} |", flush=True)


def cell(values: list[float]) -> str:
    """Mean and standard deviation."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}" if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"where {ARCHIVE} is")
    parser.add_argument("--table", choices=list(TABLES), required=True)
    parser.add_argument("--rows", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200, help="of each student")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at the same time")
    parser.add_argument("-o", "--override", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    if not (given.folder / ARCHIVE).is_file():
        parser.error(f"there is no {ARCHIVE} in {given.folder}")
    rows = given.rows or list(TABLES[given.table]["rows"])
    with tempfile.TemporaryDirectory() as folder:
        listed = str(unpack(given.folder / ARCHIVE, Path(folder)))
        with ProcessPoolExecutor(given.jobs, multiprocessing.get_context("spawn")) as pool:
            jobs = [pool.submit(one_seed, listed, given.table, seed, rows, given.steps, given.override, folder)
                    for seed in given.seeds]  # fmt: skip
            show(given.table, rows, [job.result() for job in jobs])


if __name__ == "__main__":
    main()
