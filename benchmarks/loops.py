"""The loops that `overhead.py` compares with: by hand, by hand over Accelerate, and torchdistill's box.

Each takes networks, a loader and a number of steps, does what a step of the run does (teacher without gradient,
student, terms, backward, AdamW, a cosine schedule; the loss looked at every tenth step), and says the seconds per step
and the last loss. Setting up is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from kd_demo.columns import Columns
from kdcore import DataModule, Task
from kdcore.models import Batch

LR = 1e-3
Objective = Callable[[Batch], Tensor]
Parts = Callable[[Any, Any], tuple[Objective, list[nn.Parameter]]]
"""Teacher and student -> the objective of a batch, and further parameters that it trains."""
Found = tuple[float, float]
"""Seconds per step, and the last loss."""


def order(size: int) -> Callable[[int], list[int]]:
    """Epoch -> indices: the same on all sides, so that they see the same batches."""
    return lambda epoch: torch.randperm(size, generator=torch.Generator().manual_seed(epoch)).tolist()


def random_pictures(count: int, side: int, classes: int) -> DataModule:
    """So many squares of noise in three channels, with labels at random."""
    made = torch.Generator().manual_seed(0)
    found = Columns(image=torch.rand(count, 3, side, side, generator=made),
                    label=torch.randint(0, classes, (count,), generator=made))  # fmt: skip
    return DataModule({"train": found}, Task("classification", num_classes=classes, image=(3, side, side)))


class Epochs(Sampler[int]):
    """That order, an epoch each time it is iterated."""

    def __init__(self, size: int) -> None:
        self.size, self.epoch = size, -1

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        return iter(order(self.size)(self.epoch))


def loader(data: DataModule, batch: int, collate: Callable[[list[Any]], Any] | None = None) -> DataLoader[Any]:
    split = data["train"]
    return DataLoader(split, batch, sampler=Epochs(len(split)), drop_last=True, collate_fn=collate or data.collate)


def endless(batches: DataLoader[Any], steps: int) -> Iterator[Any]:
    done = 0
    while True:
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return


def by_hand(
    teacher: Any, student: Any, parts: Parts, batches: DataLoader[Any], steps: int, fused: bool | None = None
) -> Found:
    """Plain PyTorch."""
    objective, more = parts(teacher, student)
    optimizer = torch.optim.AdamW([*student.parameters(), *more], lr=LR, fused=fused)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    teacher.eval().requires_grad_(False)
    student.train()
    start = time.perf_counter()
    for number, batch in enumerate(endless(batches, steps)):
        loss = objective(batch)
        if number % 10 == 0 and not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - start) / steps, loss.item()


def by_accelerate(teacher: Any, student: Any, parts: Parts, batches: DataLoader[Any], steps: int) -> Found:
    """The same over Accelerate, as its documentation writes it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    objective, more = parts(teacher, student)
    optimizer = torch.optim.AdamW([*student.parameters(), *more], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    teacher.eval().requires_grad_(False)
    student, optimizer, batches, schedule = accelerator.prepare(student, optimizer, batches, schedule)
    student.train()
    start = time.perf_counter()
    for number, batch in enumerate(endless(batches, steps)):
        with accelerator.accumulate(student):
            loss = objective(batch)
            if number % 10 == 0 and not torch.isfinite(loss):
                raise RuntimeError("the loss is not finite")
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    found = (time.perf_counter() - start) / steps, loss.item()
    accelerator.free_memory()
    return found


def by_torchdistill(
    teacher: nn.Module,
    student: nn.Module,
    terms: dict[str, Any],
    taps: list[str],
    data: DataModule,
    batch: int,
    steps: int,
) -> Found:
    """torchdistill's `DistillationBox`, with the loop of its examples less their meters."""
    from torchdistill.core.distillation import DistillationBox

    batches = loader(data, batch, _with_supplement)
    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_hook": {"output": taps}, "forward_proc": "forward_batch_only"},
        "student": {"forward_hook": {"output": taps}, "forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LR}},
        "scheduler": {"key": "CosineAnnealingLR", "kwargs": {"T_max": steps}, "scheduling_step": 1},
    }
    cpu = torch.device("cpu")
    box = DistillationBox(teacher.eval(), student, {}, config, cpu, None, False, 1)
    box.train_data_loader = batches
    start = time.perf_counter()
    box.pre_epoch_process(epoch=0)
    for number, (sample, targets, supplement) in enumerate(endless(box.train_data_loader, steps)):
        sample, targets = sample.to(cpu), targets.to(cpu)
        loss = box.forward_process(sample, targets, supplement)
        box.post_forward_process(loss=loss)
        if number % 10 == 0 and not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")
    return (time.perf_counter() - start) / steps, loss.item()


def _with_supplement(samples: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    image, label = (torch.stack([sample[key] for sample in samples]) for key in ("image", "label"))
    return image, label, {}


def soft(ours: Tensor, theirs: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy and KD, as the method `kd` weighs them."""
    target = (theirs / 4).softmax(1)
    return 0.1 * F.cross_entropy(ours, label) + 0.9 * 16 * F.kl_div(
        (ours / 4).log_softmax(1), target, reduction="batchmean"
    )


def kd_by_hand(teacher: nn.Module, student: nn.Module) -> tuple[Objective, list[nn.Parameter]]:
    """Of classifiers of images."""

    def objective(batch: Batch) -> Tensor:
        with torch.no_grad():
            theirs = _logits(teacher(batch["image"]))
        return soft(_logits(student(batch["image"])), theirs, batch["label"])

    return objective, []


def _logits(found: Any) -> Tensor:
    """Of a network that gives them alone, or by name."""
    return found if isinstance(found, Tensor) else found["logits"]


def text_kd_by_hand(teacher: nn.Module, student: nn.Module) -> tuple[Objective, list[nn.Parameter]]:
    """Of classifiers of texts."""

    def objective(batch: Batch) -> Tensor:
        with torch.no_grad():
            theirs = teacher(batch["input_ids"], batch["attention_mask"])["logits"]
        return soft(student(batch["input_ids"], batch["attention_mask"])["logits"], theirs, batch["label"])

    return objective, []


def at_by_hand(teacher: nn.Module, student: nn.Module) -> tuple[Objective, list[nn.Parameter]]:
    """Attention transfer of three stages, read by forward hooks."""
    seen: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for who, net in (("teacher", teacher), ("student", student)):
        for stage in net.stages:  # type: ignore[union-attr]
            net.get_submodule(stage).register_forward_hook(lambda _m, _i, out, who=who: seen[who].append(out))

    def attention(features: Tensor) -> Tensor:
        return F.normalize(features.pow(2).mean(1).flatten(1))

    def objective(batch: Batch) -> Tensor:
        for kept in seen.values():
            kept.clear()
        with torch.no_grad():
            teacher(batch["image"])
        loss = F.cross_entropy(student(batch["image"])["logits"], batch["label"])
        for ours, theirs in zip(seen["student"], seen["teacher"], strict=True):
            loss = loss + 1000 * (attention(ours) - attention(theirs)).pow(2).mean()
        return loss

    return objective, []
