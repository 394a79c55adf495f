"""Two processes beside one, on CPUs: `python benchmarks/scale_out.py [--rounds 3] [--steps 40]`.

The same batch in all, each process with one thread, in turn: runs of this project, and a loop by hand over
DistributedDataParallel with gloo. Each measurement is a launch of its own, and the time is that of the loop without its
start. The ratio should be at least 1.7. On a machine with a GPU: fp32, bf16 and compiled runs of the same cases.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loops
import measure
import torch
from torch import distributed
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import kdcore
from kdcore import DataModule, Model
from kdcore.models import Batch

BATCH = 64
Case = tuple[DataModule, Model, Model, list[str], int]
"""Data, teacher, student, losses, and the share of the steps that are taken: slow cases take fewer."""


def small() -> Case:
    """A step of 70 ms: what processes wait for shows most here."""
    from kd_demo.digits import digits
    from kd_demo.models import cnn
    from kd_demo.options import CNNOptions, DigitsOptions

    data = digits(DigitsOptions())
    big, student = (cnn(CNNOptions(width=width, depth=2), data.task) for width in (64, 32))
    return data, big, student, ["cross-entropy", "kd"], 1


def images() -> Case:
    """A step of a second and a half."""
    import timm
    from cache import images as digits

    big, student = (Model(timm.create_model(name, num_classes=10)) for name in ("resnet34", "resnet10t"))
    return digits(64), big, student, ["cross-entropy", "kd"], 4


def texts() -> Case:
    """A step of half a second."""
    from cache import llamas

    return *llamas(1000), ["fkl"], 2


CASES: dict[str, Callable[[], Case]] = {
    "CNN on digits, 8 x 8": small,
    "ResNet-34 to ResNet-10t, 64 x 64": images,
    "Llama on sentences": texts,
}


def by_kd(case: Case, steps: int) -> float:
    """Seconds of a run's loop."""
    data, teacher, student, losses, _ = case
    only = DataModule({"train": data["train"]}, data.task, collate=data.collate)
    train = json.loads(os.environ.get("KD_TRAIN", "{}"))
    train |= {"steps": steps, "batch_size": BATCH, "save_every": steps + 1, "eval_every": steps + 1}
    with tempfile.TemporaryDirectory() as alone:
        where = Path(os.environ.get("SHARED", alone)) / "run"
        kdcore.distill(
            teacher, student, only, "distill", losses=[{"use": loss} for loss in losses], train=train, run_dir=where
        )
        return float(json.loads((where / "run.json").read_text())["timings"]["distill"]["seconds"])


def by_hand(case: Case, steps: int) -> float:
    """Seconds of the same steps over DistributedDataParallel."""
    data, teacher, student, losses, _ = case
    world, module = int(os.environ.get("WORLD_SIZE", "1")), student.train()
    if world > 1:
        distributed.init_process_group("gloo")
        module = DistributedDataParallel(student)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    sampler = DistributedSampler(data["train"], world, distributed.get_rank() if world > 1 else 0, seed=0)
    loader = DataLoader(data["train"], BATCH // world, sampler=sampler, drop_last=True, collate_fn=data.collate)
    start = time.perf_counter()
    for found in loops.endless(loader, steps):
        batch = found if isinstance(found, dict) else dict(zip(("image", "label"), found, strict=True))
        with torch.no_grad():
            theirs = teacher(batch).logits
        ours = module(batch).logits
        loss = objective(ours, theirs, batch, losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    if world > 1:
        distributed.destroy_process_group()
    return seconds


def objective(ours: Any, theirs: Any, batch: Batch, losses: list[str]) -> Any:
    """The terms of a case, as their own formulas have them."""
    if losses == ["fkl"]:
        counts = batch["labels"] != -100
        return F.kl_div(
            ours[counts].log_softmax(-1), theirs[counts].log_softmax(-1), reduction="batchmean", log_target=True
        )
    soft = F.kl_div((ours / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="batchmean") * 16
    return F.cross_entropy(ours, batch["label"]) + soft


SIDES = {"kd": by_kd, "by hand": by_hand}


def launched(side: str, case: str, steps: int, processes: int = 1, **train: Any) -> float:
    """Samples per second, as a launch of its own."""
    with tempfile.TemporaryDirectory() as shared:
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "SHARED": shared, "KD_TRAIN": json.dumps(train)}
        command = [*start, __file__, "--child", side, case, str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
    return float(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("rate ")).split()[1])


def child(side: str, name: str, steps: int) -> None:
    """What is launched."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seconds = SIDES[side](CASES[name](), steps)
    if os.environ.get("RANK", "0") == "0":
        print("rate", BATCH * steps / seconds, flush=True)


def sides(case: str, steps: int) -> Iterator[tuple[str, dict[str, Callable[[], float]]]]:
    """What is compared, by the name of its row."""
    if torch.cuda.is_available():
        bf16 = {"precision": "bf16"}
        kinds: dict[str, dict[str, Any]] = {"bf16, compiled": {**bf16, "compile": True}, "bf16": bf16, "fp32": {}}
        yield case, {name: functools.partial(launched, "kd", case, steps, **more) for name, more in kinds.items()}
        return
    for side in SIDES:
        calls = {"two processes": 2, "one process": 1}
        yield f"{case}: {side}", {n: functools.partial(launched, side, case, steps, p) for n, p in calls.items()}


def main() -> None:
    parser = measure.parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    rows = []
    for case, make in CASES.items():
        if given.only in case:
            for name, calls in sides(case, given.steps // make()[-1]):
                rows.append(measure.row(name, "samples per second", measure.in_turn(calls, given.rounds, warm=0)))
                measure.show(rows[-1])
    measure.write("scale_out", rows, given)


if __name__ == "__main__":
    child(sys.argv[2], sys.argv[3], int(sys.argv[4])) if sys.argv[1:2] == ["--child"] else main()
