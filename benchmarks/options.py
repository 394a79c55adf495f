"""What an option of a run gains: runs with it beside runs without, in turn.

    python benchmarks/options.py [--rounds 3] [--steps 12]

Each run is a process of its own. Its time is the median of its steps but the first three, in which a compiler works;
its memory is what the peak of resident memory rises above what stood before the models were made (on a GPU, torch's own
peak). The last losses say how far an option changes what is computed.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loops
import measure
import timm
import torch

import kdcore
from kd_demo.columns import Columns
from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore import DataModule, Model, Task, hookimpl

Options = Mapping[str, Mapping[str, Any]]
"""Of `train`, `teacher` and `student`."""
Made = tuple[Model, Model, DataModule]
WARM = 3
CLASSES, TOKENS, LENGTH = 100, 1000, 128
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": TOKENS,
         "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An option, and what is trained with and without it."""

    name: str
    make: Callable[[Options], Made]
    on: Options
    off: Options
    losses: tuple[str, str] = ("cross-entropy", "kd")
    batch: int = 64


class Clock:
    """When each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @hookimpl
    def kd_step_finished(self) -> None:
        """Look at the clock; on a GPU, when the step is done there."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def images(big: str, small: str, side: int, _: Options) -> Made:
    """Two networks of timm on random pictures."""
    data = loops.random_pictures(256, side, CLASSES)
    return *(Model(timm.create_model(name, num_classes=CLASSES)) for name in (big, small)), data  # type: ignore[return-value]


def texts(widths: tuple[int, int], given: Options) -> Made:
    """Two Llamas of four layers on random tokens."""
    ids = torch.randint(3, TOKENS, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    data = DataModule({"train": Columns(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)},
                      Task("causal-lm", num_classes=TOKENS))  # fmt: skip
    models = []
    for role, width in zip(("teacher", "student"), widths, strict=True):
        config = {**LLAMA, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4}
        models.append(build(TransformersOptions(config=config, **given.get(role, {})), data.task))
    return *models, data  # type: ignore[return-value]


RESNETS, MOBILENETS = (
    functools.partial(images, *names)
    for names in (("resnet34", "resnet18", 32), ("mobilenetv3_large_100", "mobilenetv3_small_100", 64))
)
LLAMAS, LARGE_TEACHER = (functools.partial(texts, widths) for widths in ((384, 256), (1024, 128)))
OF_TEXTS: dict[str, Any] = {"losses": ("next-token", "fkl"), "batch": 16}
BF16 = {"train": {"precision": "bf16"}}
CASES = [
    Case("optimizer.fused, ResNet", RESNETS, {}, {"train": {"optimizer": {"fused": False}}}),
    Case("channels_last, ResNet", RESNETS, {"train": {"channels_last": True}}, {}),
    Case("channels_last, MobileNetV3", MOBILENETS, {"train": {"channels_last": True}}, {}),
    Case("compile, ResNet", RESNETS, {"train": {"compile": True}}, {}),
    Case("compile, Llama", LLAMAS, {"train": {"compile": True}}, {}, **OF_TEXTS),
    Case("precision bf16, ResNet", RESNETS, BF16, {}),
    Case("precision bf16, Llama", LLAMAS, BF16, {}, **OF_TEXTS),
    Case("grad_accumulation 4, Llama", LLAMAS, {"train": {"grad_accumulation": 4}}, {}, **OF_TEXTS),
    Case("gradient_checkpointing, Llama", LLAMAS, {"student": {"gradient_checkpointing": True}}, {}, **OF_TEXTS),
    Case(
        "dtype bf16 of the teacher, Llama", LARGE_TEACHER, {"teacher": {"dtype": "bf16"}}, {}, ("next-token", "fkl"), 4
    ),
]


def run(case: Case, given: Options, steps: int) -> tuple[float, float, float]:
    """Milliseconds per step, bytes, and the last loss."""
    before = measure.reset_peak()
    torch.manual_seed(0)
    teacher, student, data = case.make(given)
    train = {"steps": steps, "batch_size": case.batch, "save_every": steps + 1, "eval_every": steps + 1,
             "optimizer": {}, **given.get("train", {})}  # fmt: skip
    train["optimizer"] = {"name": "adamw", "lr": 1e-4, **train["optimizer"]}
    manager, clock = kdcore.PluginManager(), Clock()
    manager.register(clock, name="clock")
    with tempfile.TemporaryDirectory() as folder:
        path = kdcore.distill(teacher, student, data, "distill", losses=[{"use": name} for name in case.losses],
                              train=train, run_dir=Path(folder) / "run", plugins=manager).path  # fmt: skip
        loss = sum(measure.last_terms(path).values())
    each = [after - start for start, after in zip(clock.times[WARM:], clock.times[WARM + 1 :], strict=False)]
    rise = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else measure.peak() - before
    return 1e3 * statistics.median(each), float(rise), loss


def compare(case: Case, rounds: int, steps: int) -> list[measure.Row]:
    """Time and memory with the option over those without."""
    sides = {name: functools.partial(measure.forked, run, case, given, steps)
             for name, given in (("with", case.on), ("without", case.off))}  # fmt: skip
    found = measure.in_turn(sides, rounds, warm=0)
    said = ", ".join(f"{name} {values[-1][2]:.5g}" for name, values in found.items())
    times, memory = ({name: [value[i] for value in values] for name, values in found.items()} for i in (0, 1))
    memory = {name: [value / 2**20 for value in values] for name, values in memory.items()}
    return [measure.row(f"{case.name}: step", "ms", times, **{"last losses": said}),
            measure.row(f"{case.name}: memory", "MiB", memory)]  # fmt: skip


def main() -> None:
    parser = measure.parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=12)
    given = measure.begin(parser)
    rows = []
    for case in CASES:
        if given.only in case.name:
            rows += compare(case, given.rounds, given.steps)
            for made in rows[-2:]:
                measure.show(made)
    measure.write("options", rows, given)


if __name__ == "__main__":
    main()
