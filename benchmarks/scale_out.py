"""Two processes beside one, on CPUs: `python benchmarks/scale_out.py [--rounds 3] [--steps 60]`.

`kd run` with the same recipe and the same batch, each process with one thread, in turn; the time is the run's own, of
the loop without its start. The ratio should be at least 1.7. On a machine with a GPU: fp32, bf16 and compiled.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import measure
import torch

BATCH = 64
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 2,
         "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip


def llama(width: int, layers: int) -> dict[str, Any]:
    """A model with fresh weights."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return {"use": "transformers", "config": {**LLAMA, **sizes}}


RECIPES: dict[str, dict[str, Any]] = {
    "CNN on digits": {
        "data": "digits", "losses": [{"use": "cross-entropy"}, {"use": "kd"}],
        "teacher": {"use": "demo-cnn", "width": 64, "depth": 2},
        "student": {"use": "demo-cnn", "width": 32, "depth": 2},
    },
    "Llama on sentences": {
        "data": {"use": "sentences", "prompt": 2}, "losses": [{"use": "fkl"}], "eval": {"metrics": ["perplexity"]},
        "teacher": llama(256, 4), "student": llama(128, 4),
    },
}  # fmt: skip


def run(recipe: dict[str, Any], steps: int, more: tuple[str, ...]) -> float:
    """Samples per second."""
    train = {"steps": steps, "batch_size": BATCH, "save_every": steps + 1, "eval_every": steps + 1}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps({"method": "distill", "trackers": [], **recipe, "train": train}))
        command = [sys.executable, "-m", "kd_cli", "run", str(path), "--run-dir", f"{folder}/run", "--json", *more]
        one = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=one)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        timing = json.loads(Path(folder, "run", "run.json").read_text())["timings"]["distill"]
    return float(BATCH * timing["steps"] / timing["seconds"])


def sides() -> dict[str, tuple[str, ...]]:
    """What is compared here, by what it adds to the command."""
    if torch.cuda.is_available():
        bf16 = ("train.precision=bf16",)
        return {"bf16, compiled": (*bf16, "train.compile=true"), "bf16": bf16, "fp32": ()}
    return {"two processes": ("--processes", "2"), "one process": ()}


def main() -> None:
    parser = measure.parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    rows = []
    for case, recipe in RECIPES.items():
        if given.only not in case:
            continue
        calls = {name: functools.partial(run, recipe, given.steps, more) for name, more in sides().items()}
        rows.append(measure.row(case, "samples per second", measure.in_turn(calls, given.rounds, warm=0)))
        measure.show(rows[-1])
    measure.write("scale_out", rows, given)


if __name__ == "__main__":
    main()
