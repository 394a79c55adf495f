"""The training loop: one, over Accelerate, for every stage that trains."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import operator
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from kdcore import checkpoint, sharding
from kdcore.data import derive_seed, to_device
from kdcore.errors import DataError, Interrupted, RecipeError
from kdcore.evaluation import evaluate, lay_out, prepare
from kdcore.guards import Before, first_not_finite, out_of_memory, wrong_numbers
from kdcore.losses import Progress, count_samples
from kdcore.models import Batch
from kdcore.stages import TrainStage
from kdcore.training import schedule_factor

if TYPE_CHECKING:
    from kdcore.runner import Run

logger = logging.getLogger(__name__)

_NORM = "gradient norm"


def train(run: Run, stage: TrainStage, workspace: Path) -> None:
    """Train a stage to its end, from its last checkpoint if there is one.

    Raises:
        RunFailed: if a term becomes NaN or infinite; the last good checkpoint is kept.
        Interrupted: after a signal, with a checkpoint written.
    """
    _Trainer(run, stage, workspace).train()


def write(stage: TrainStage, artifact: Path) -> None:
    """Write what a stage trained, and its exports in their native formats."""
    from safetensors.torch import save_model

    checkpoint.own_storage(stage)
    save_model(stage, str(artifact / "stage.safetensors"))
    for name, model in stage.exports.items():
        model.save(artifact / name)


class _Trainer:
    """One stage's training: everything the loop needs, and the loop."""

    def __init__(self, run: Run, stage: TrainStage, workspace: Path) -> None:
        self.run, self.stage, self.checkpoints = run, stage, workspace / "checkpoints"
        self.accelerator, self.data = run.accelerator, stage.data or run.data
        self.options = options = run.recipe.train_for(stage.name, stage.overrides)
        self.per_epoch = self.data.steps_per_epoch(stage.splits[0], options.batch_size)
        if options.steps is None and self.per_epoch is None:
            raise RecipeError(f"stage {stage.name!r}: the data is a stream without a length: set train.steps")
        self.total = stage.total_steps = options.steps or max(1, round(options.epochs * (self.per_epoch or 0)))
        self._divide()
        if options.batch_size % self.parts:
            raise RecipeError(f"train.batch_size {options.batch_size} does not split into {self.parts} equal parts "
                            "(processes × grad_accumulation)")  # fmt: skip
        self.seed = run.seed if stage.seed is None else stage.seed
        self.sharded = options.shard != "none"
        self.step = self.skipped = 0
        self.pending: list[tuple[int, dict[str, Tensor], list[Any]]] = []
        self.kept: Before | None = None
        self.good, self.changed = True, False  # this step's numbers; whether an optimizer has stepped in it

    def _divide(self) -> None:
        options, world = self.options, self.accelerator.num_processes
        self.parts = world * options.grad_accumulation
        self.sizes = self.data.share_sizes(self.stage.splits[0], options.batch_size, options.grad_accumulation, world)

    def train(self) -> None:
        """Prepare, resume, loop."""
        whole, options = self.stage, self.options
        set_seed(derive_seed(self.seed, whole.name) % 2**31, device_specific=True)
        prepare(self.run, whole)
        if options.channels_last:
            lay_out(whole, torch.channels_last)
        stage = self.stage = sharding.shard(self.run, whole, options.shard == "all") if self.sharded else whole
        if options.compile:
            stage.compile()
        stage.train()
        self.optimizers = stage.optimizers(options)
        self.base_lrs = {o: [g["lr"] for g in opt.param_groups] for o, opt in self.optimizers.items()}
        self._wrap()
        try:
            self._resume()
            with self.run.signals() as signals:
                self._loop(signals)
            if self.sharded:
                sharding.collect(stage, whole, self.accelerator.is_main_process)
        finally:
            self._clear_gradients()
            self.accelerator.free_memory()
            if options.channels_last:
                lay_out(whole, torch.contiguous_format)

    def _wrap(self) -> None:
        """Hand stage and optimizers to Accelerate, unless the stage is divided and looks after its gradients itself."""
        stage = self.stage
        self.module: nn.Module = stage
        self.parameters = [p for p in stage.parameters() if p.requires_grad]
        self.divided = (stage, list(self.optimizers.values())) if self.sharded else None  # for checkpoints
        if self.divided:
            return
        unused = stage.find_unused_parameters or len(stage.objectives) > 1
        settings = {"find_unused_parameters": unused, "gradient_as_bucket_view": True}
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(**settings)
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(stage, list(sharding.alike(stage)))
        self.module, *wrapped = self.accelerator.prepare(stage, *self.optimizers.values())
        self.optimizers = {o: self._without_wrapper(w) for o, w in zip(self.optimizers, wrapped, strict=True)}

    def _without_wrapper(self, optimizer: Any) -> Any:
        """The torch optimizer where Accelerate's wrapper adds nothing but time: its `step` searches the import path."""
        plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        scaled = self.accelerator.scaler is not None
        return optimizer if scaled or self.accelerator.distributed_type not in plain else optimizer.optimizer

    def _whole(self, hook: str) -> contextlib.AbstractContextManager[None]:
        """Inside, every process holds all parameters, where the stage has such a hook; what it changes is kept."""
        wanted = self.sharded and sharding.has(self.stage, hook)
        return sharding.whole(self.stage) if wanted else contextlib.nullcontext()

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _resume(self) -> None:
        noted = self.run.last_checkpoint(self.stage.name)
        found = checkpoint.latest(self.checkpoints, self.run.resolved.fingerprint, noted)
        if found:
            path, facts = found
            checkpoint.restore(self.accelerator, path, self.divided)
            self.step, self.skipped, self.stage.metrics = facts["step"], facts["skipped"], dict(facts["metrics"])
            logger.info("stage %s resumes at step %d of %d", self.stage.name, self.step, self.total)
        self.run.forget_rows_after(self.stage.name, self.step)

    def _loop(self, signals: list[int]) -> None:
        loaders = [self._batches(name) for name in self.stage.splits]
        started, first = time.perf_counter(), self.step
        while self.step < self.total and not self.run.stop_reason:
            try:
                micro = [self._draw(loaders) for _ in range(self.options.grad_accumulation)]
                terms = self._iterate(micro)
            except torch.OutOfMemoryError as error:
                if not self._halve():
                    raise out_of_memory(self.stage.name, self.step + 1, self.options, self.accelerator.num_processes,
                                        self.run.device) from error  # fmt: skip
                loaders = [self._batches(name) for name in self.stage.splits]
                continue
            self.step += 1
            if not self.good:
                self._skip(terms, micro)
            self.run.notify("kd_step_finished", stage=self.stage, step=self.step, terms=terms)
            done = self.step == self.total or bool(self.run.stop_reason)
            if self._due(self.options.log_every) or done:
                self._log()
            if self._due(self.options.eval_every or self.per_epoch) or (done and not self.stage.metrics):
                self._evaluate()
            if self._stop_asked(signals):
                self._save()
                raise Interrupted(f"interrupted in stage {self.stage.name!r} at step {self.step} of {self.total}; "
                                  "the same command goes on from here")  # fmt: skip
            if not done and self._due(self.options.save_every or self.per_epoch):
                self._save()
        self._check()
        self.run.stop_reason = None
        self.run.timings[self.stage.name] = {"seconds": time.perf_counter() - started, "steps": self.step - first}

    def _stop_asked(self, signals: list[int]) -> bool:
        """Whether a signal came; several processes agree on it, at the steps where they wait for each other anyway."""
        if self.accelerator.num_processes == 1:
            return bool(signals)
        if self.pending:
            return False
        asked = torch.tensor(float(bool(signals)), device=self.run.device)
        return bool(self.accelerator.reduce(asked, "sum").item())

    def _batches(self, split: str) -> Iterator[Batch]:
        """A split's micro-batches from the current step to the last, endless for all but the first split."""
        return iter(self.data.train_loader(
            split, self.options.batch_size, seed=self.seed, start=self.step, stop=self.total,
            accumulation=self.options.grad_accumulation, rank=self.accelerator.process_index,
            world=self.accelerator.num_processes, workers=self.options.workers, augment=self.stage.augment,
            pin_memory=self.run.device.type == "cuda",
        ))  # fmt: skip

    def _draw(self, loaders: list[Iterator[Batch]]) -> Batch:
        try:
            batches = [to_device(next(loader), self.run.device) for loader in loaders]
        except DataError as error:  # a worker process wraps it in its traceback
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from None
        return batches[0] if len(batches) == 1 else dict(zip(self.stage.splits, batches, strict=True))

    def _iterate(self, micro: list[Batch]) -> dict[str, Tensor]:
        """One step: for each objective, forward and backward over the micro-batches, then its optimizer."""
        stage, accelerator = self.stage, self.accelerator
        epoch = self.step // (self.per_epoch or self.total)
        progress = [Progress(self.step, epoch, self.step / self.total, sizes) for sizes in self.sizes]
        stage.progress = progress[0]
        careful = self.options.nonfinite == "skip" or self.options.on_oom == "halve"
        self.kept = Before(stage, self.run.device) if careful else None
        self.good, self.changed = True, False
        with accelerator.autocast(), self._whole("before_step"):
            stage.before_step(micro)
        if self.sharded:
            sharding.send_buffers(stage)
        shares = self._shares(micro)
        logged: dict[str, Tensor] = {}
        norms: list[Tensor] = []
        for objective, optimizer in self.optimizers.items():
            schedule = stage.schedules.get(objective, self.options.schedule)
            factor = schedule_factor(schedule, self.step, self.total)
            for group, lr in zip(optimizer.param_groups, self.base_lrs[objective], strict=True):
                group["lr"] = lr * factor
            for i, batch in enumerate(micro):
                stage.progress = progress[i]
                last = i == len(micro) - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(self.module):
                    terms = self._forward(batch, objective)
                    if shares:
                        terms = {name: value * _share_of(shares[i], name) for name, value in terms.items()}
                    if i == 0:  # not earlier: gradients that stay keep the heap from shrinking and growing in each step
                        self._clear_gradients()
                    accelerator.backward(_sum(terms))
                for name, value in terms.items():
                    value = value.detach()
                    logged[name] = logged[name] + value if name in logged else value
            if self.sharded and not self.changed and not self.step:
                sharding.check_reached(stage)
            norms.append(self._norm_gradients(optimizer))
            if self.options.nonfinite == "skip" and not self._all_finite([*logged.values(), *norms]):
                self.good = False
                if self.kept is not None:
                    self.kept.restore()
                return logged
            self.changed = True
            optimizer.step()
        with torch.no_grad(), self._whole("after_step"):
            stage.after_step()
        self.pending.append((self.step + 1, {**logged, _NORM: torch.stack(norms).sum()}, [_index(b) for b in micro]))
        return logged

    def _forward(self, batch: Batch, objective: str) -> dict[str, Tensor]:
        """The terms in float32, whatever they were computed in, as Accelerate sees to it for what it has prepared."""
        if not self.sharded:
            return self.module(batch, objective)  # type: ignore[no-any-return]
        with self.accelerator.autocast():
            return {name: value.float() for name, value in self.module(batch, objective).items()}

    def _norm_gradients(self, optimizer: Any) -> Tensor:
        """The norm of an optimizer's gradients, clipped if that is asked for. Where losses are scaled, the scaler looks
        after gradients that overflow."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.options.clip_norm is not None:
            norm: Tensor = self.accelerator.clip_grad_norm_(parameters, self.options.clip_norm).detach()
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters]).to(self.run.device)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return norm.nan_to_num(0, 0, 0) if self.accelerator.scaler is not None else norm

    def _all_finite(self, values: list[Tensor]) -> bool:
        """Whether terms and gradients of this step are finite in every process."""
        fine = torch.stack([value.float().isfinite() for value in values]).all()
        return bool(self.accelerator.reduce(fine.float(), "sum") == self.accelerator.num_processes)

    def _skip(self, terms: Mapping[str, Tensor], micro: list[Batch]) -> None:
        """Count a step that was not taken, and stop after too many."""
        self.skipped += 1
        bad = first_not_finite(terms.items())
        what = f"the term {bad!r} is not finite" if bad else "a gradient is not finite"
        samples = self._samples([_index(batch) for batch in micro])
        self.run.log({"stage": self.stage.name, "step": self.step, "skipped": what, "samples": samples})
        logger.warning("stage %s: step %d is skipped: %s (%d so far)", self.stage.name, self.step, what, self.skipped)
        if self.skipped > self.options.max_skipped:
            raise wrong_numbers(self.run, self.stage.name, self.step, f"{what}, and {self.skipped} steps were skipped",
                                samples)  # fmt: skip

    def _samples(self, indices: list[Any]) -> list[int]:
        return [i for part in indices for i in self.accelerator.gather(part).tolist()]

    def _halve(self) -> bool:
        """Twice as many micro-batches of half the size from here on, if that is wanted and can be done."""
        parts = 2 * self.options.grad_accumulation
        alone = self.accelerator.num_processes == 1
        if self.options.on_oom != "halve" or not alone or self.changed or self.options.batch_size % parts:
            return False
        self._clear_gradients()
        if self.kept is not None:
            self.kept.restore()
        if self.run.device.type == "cuda":
            torch.cuda.empty_cache()
        self.options = self.options.model_copy(update={"grad_accumulation": parts})
        self._divide()
        logger.warning("stage %s: out of memory at step %d; from here on train.grad_accumulation is %d",
                       self.stage.name, self.step + 1, parts)  # fmt: skip
        return True

    def _shares(self, micro: list[Batch]) -> list[dict[str, Tensor | float]]:
        """What each micro-batch's means count for in the mean of the batch, by term; nothing if it is all there is.

        A mean over c of the C units that all processes and micro-batches hold together has the share c / C; times the
        number of processes, because gradients are averaged over them.
        """
        if self.parts == 1:
            return []
        batches = [b if len(self.stage.splits) == 1 else b[self.stage.splits[0]] for b in micro]
        counts = [{"": count_samples(b), **self.stage.counts(whole)} for b, whole in zip(batches, micro, strict=True)]
        ours = [name for name in counts[0] if all(c[name] is not None for c in counts)]
        local = torch.stack([torch.stack([cast(Tensor, c[name]).double() for c in counts]) for name in ours])
        whole = self.accelerator.reduce(local.sum(1, keepdim=True), "sum").clamp(min=1)
        shares = (local * self.accelerator.num_processes / whole).float()
        alone = dict.fromkeys(counts[0], 1 / len(micro))
        return [{**alone, **dict(zip(ours, column, strict=True))} for column in shares.T]

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _read_terms(self) -> dict[str, float]:
        """The last step's terms and norm of gradients. Those of all steps since the last time are read at once, and
        must be finite."""
        if not self.pending:
            return {}
        names = list(self.pending[0][1])
        values = torch.stack([torch.stack([terms[n].float() for n in names]) for _, terms, _ in self.pending])
        rows = self.accelerator.reduce(values, "mean").tolist()
        for row, (step, _, indices) in zip(rows, self.pending, strict=True):
            for name, value in zip(names, row, strict=True):
                if not math.isfinite(value):
                    what = f"the {name}" if name == _NORM else f"the term {name!r}"
                    raise wrong_numbers(self.run, self.stage.name, step, f"{what} became {value}",
                                        self._samples(indices))  # fmt: skip
        self.pending.clear()
        return dict(zip(names, rows[-1], strict=True))

    def _log(self) -> None:
        lr = next(iter(self.optimizers.values())).param_groups[0]["lr"]
        epoch = self.step / self.per_epoch if self.per_epoch else None
        terms = self._read_terms()
        norm = terms.pop(_NORM, None)
        self.run.log({"stage": self.stage.name, "step": self.step, "epoch": epoch, "lr": lr, "terms": terms,
                      "gradient_norm": norm})  # fmt: skip

    def _evaluate(self) -> None:
        split = self.run.recipe.eval.on[0]
        if type(self.stage).evaluate is TrainStage.evaluate or split not in self.data:
            return
        with self._whole("evaluate"):
            found = evaluate(self.run, self.stage, split, self.options.eval_batch_size or self.options.batch_size)
        self.run.report_metrics(self.stage, self.step, {f"{split}/{name}": value for name, value in found.items()})

    def _check(self) -> None:
        """What went wrong must not become a checkpoint or an artifact."""
        self._read_terms()
        name = first_not_finite((name, sharding.local(p)) for name, p in self.stage.named_parameters())
        if name := sharding.agreed(name) if self.sharded else name:
            raise wrong_numbers(self.run, self.stage.name, self.step, f"the parameter {name!r} is no longer finite: a "
                                "gradient was not")  # fmt: skip

    def _save(self) -> None:
        self._check()
        checkpoint.own_storage(self.stage)
        facts = {"metrics": self.stage.metrics, "skipped": self.skipped}
        path = checkpoint.save(self.accelerator, self.checkpoints, self.step, self.options.keep_checkpoints, facts,
                               self.run.resolved.fingerprint, self.divided)  # fmt: skip
        self.run.note_checkpoint(self.stage.name, self.step)
        self.run.notify("kd_checkpoint_saved", stage=self.stage, path=path)


def _index(batch: Batch) -> Tensor:
    index = batch["index"] if "index" in batch else torch.cat([b["index"] for b in batch.values()])
    return index if isinstance(index, Tensor) else torch.as_tensor(index)


def _share_of(shares: Mapping[str, Tensor | float], term: str) -> Tensor | float:
    return shares.get(term.partition("/")[0], shares[""])


def _sum(terms: Mapping[str, Tensor]) -> Tensor:
    return functools.reduce(operator.add, terms.values())
