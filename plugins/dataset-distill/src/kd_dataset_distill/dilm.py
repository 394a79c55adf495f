"""DiLM: a language model is tuned until its texts give a learner the gradients that real texts give.

Source: Maekawa et al. 2024, "DiLM: Distilling Dataset into Language Model for Text-level Dataset Distillation"
(arXiv 2404.00264), algorithm 1. Gradient reaches the generator through the weights of its texts alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from kd_dataset_distill.artifact import WriteData, as_data, selection
from kd_dataset_distill.evaluation import embeddings, train_networks
from kd_dataset_distill.functional import (
    adam_move,
    flat,
    generation_loss,
    generation_weights,
    k_centers,
    warmed_cosine,
    weighted_gradient,
)
from kd_dataset_distill.generator import Text
from kd_dataset_distill.networks import Held, architectures, draw
from kd_dataset_distill.options import DiLMOptions
from kd_dataset_distill.real import by_class, class_rows
from kd_dataset_distill.texts import Seen, as_columns, learner_batch, nearest, read_texts
from kdcore import FitStage, Method, Model, Roles, Run, Stage, TrainStage
from kdcore.data import DataModule, Task, derive_seed, to_device
from kdcore.errors import ModelError
from kdcore.models import Batch

GRADIENT_NORM = 1.0
"""To which the gradients of generator and learner are clipped (DiLM's configuration)."""
DECAY = 0.01
"""Weight decay of generator and learner."""


class RealTexts:
    """The training texts with their labels, and the positions of each class.

    Args:
        run: the run.
        method: who asks, for errors.
    """

    def __init__(self, run: Run, method: str) -> None:
        self.rows = class_rows(run.data, method)
        self.texts = read_texts(run.data, "train")
        self.labels = run.data.labels("train").tolist()
        self.paired = self.texts[0][1] is not None


class Tokens(Dataset[dict[str, Any]]):
    """The training texts as the generator's tokens."""

    def __init__(self, real: RealTexts, generator: Any, longest: int) -> None:
        self.real, self.generator, self.longest = real, generator, longest

    def __len__(self) -> int:
        return len(self.real.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"ids": self.generator.ids(self.real.texts[index], self.real.labels[index], self.longest)}


class LanguageModelling(TrainStage):
    """The generator learns to write texts of each class: stage (a)."""

    def __init__(self, generator: Model, real: RealTexts, options: DiLMOptions, save_every: int | None) -> None:
        super().__init__("lm")
        self.generator, self.options = generator, options
        self.exports = {"generator": generator}
        module: Any = generator.module
        self.data = DataModule({"train": Tokens(real, module, options.max_length)}, Task("unlabelled"),
                               collate=lambda samples: module.batch([sample["ids"] for sample in samples]))  # fmt: skip
        adam = {"name": "adamw", "lr": options.lm_lr, "weight_decay": DECAY}
        self.overrides = {
            "steps": options.lm_steps,
            "batch_size": min(options.lm_batch, len(real.texts)),
            "optimizer": adam,
            "save_every": save_every or max(1, options.lm_steps // 10),
        }

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The mean over texts of their generation loss."""
        logits = self.generator(batch).need("logits")
        return {"lm": generation_loss(logits.float(), batch["labels"], padded=self.options.padded_loss).mean()}

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Texts."""
        return {"lm": torch.tensor(float(len(batch["input_ids"])), device=batch["input_ids"].device)}


class Representatives(FitStage):
    """Several sets of real texts of each class, nearest to k-means centres of the learner's embeddings."""

    name = "representatives"

    def __init__(self, real: RealTexts, options: DiLMOptions) -> None:
        self.real, self.options = real, options

    def fit(self, run: Run) -> dict[str, Tensor]:
        """`index` `[sets, C, size]`: positions in the training split; -1 where a class has not so many."""
        o, learner = self.options, draw(run, architectures(run)[0], "representatives")
        index = torch.full((o.real_sets, len(self.real.rows), o.batch_real), -1)
        for label, rows in enumerate(self.real.rows):
            points = embeddings(run, as_data(selection(run.data, rows), run.data), learner)
            count = min(o.batch_real, len(rows))
            for number in range(o.real_sets):
                seed = derive_seed(run.seed, self.name, number, label)
                index[number, label, :count] = rows[k_centers(points, count, seed)]
        return {"index": index}


class RealSide(Dataset[dict[str, Any]]):
    """Sample `step * C + c`: positions of the real texts of class c in a step."""

    def __init__(self, real: RealTexts, options: DiLMOptions, sets: Tensor | None, seed: int) -> None:
        self.real, self.options, self.sets, self.seed = real, options, sets, seed

    def __len__(self) -> int:
        return len(self.real.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, label = divmod(index, len(self))
        if self.sets is not None:
            rows = self.sets[step % len(self.sets), label]
            return {"rows": rows[rows >= 0].cpu(), "label": label}
        rows, generator = self.real.rows[label], torch.Generator().manual_seed(derive_seed(self.seed, "real", index))
        return {"rows": rows[torch.randperm(len(rows), generator=generator)[: self.options.batch_real]], "label": label}


class TextMatching(TrainStage):
    """Gradient matching of the generator: stage (b). Learner, its optimizer and the generated texts are in the state.

    Args:
        run: the run; its first student is the learner.
        real: the real texts.
        options: of the method.
        sets: the representative sets `[sets, C, size]`, or `None` for random texts.
    """

    shardable = False

    def __init__(self, run: Run, real: RealTexts, options: DiLMOptions, sets: Tensor | None) -> None:
        super().__init__("match")
        self.run, self.real, self.options, o = run, real, options, options
        self.generator = run.model("generator")
        self.exports = {"generator": self.generator}
        self.role, self.classes = architectures(run)[0], len(real.rows)
        self.learner = Held(draw(run, self.role, 0))
        self.prefix = f"module.{self.learner.model.head[0]}." if o.classifier_only else ""
        size = len(flat(dict(self.learner.model.named_parameters())))
        self.register_buffer("moments", torch.zeros(2, size))
        self.register_buffer(
            "written", torch.zeros(self.classes, o.interval * o.inner * o.batch_syn, o.max_length).long()
        )
        self.data = by_class(RealSide(real, o, sets, run.seed), self.classes, run.data.task)
        world = run.accelerator.num_processes
        adam = {"name": "adamw", "lr": o.lr, "weight_decay": DECAY}
        self.overrides = {"steps": o.iterations, "batch_size": -(-self.classes // world) * world, "optimizer": adam,
                          "schedule": "cosine", "clip_norm": GRADIENT_NORM, "grad_accumulation": 1, "workers": 0,
                          "compile": False,
                          "save_every": run.recipe.train.save_every or max(1, o.iterations // 10)}  # fmt: skip

    def prepare(self, batch: Batch) -> None:
        """There are no adapters to make."""

    def before_step(self, batches: list[Batch]) -> None:
        """New texts after every `interval` learners, in clusters that the last learner sees; then a fresh learner after
        every `inner` steps."""
        o, step = self.options, self.progress.step
        if o.lm_lambda == 1:
            return
        self.learner.model.eval()
        if step % (o.inner * o.interval) == 0:
            for label in range(self.classes):
                self.written[label] = self._write(label)
        if step % o.inner == 0:
            self.learner.refresh(draw(self.run, self.role, step // o.inner))
            self.moments.zero_()

    def _write(self, label: int) -> Tensor:
        """New texts of a class `[interval * inner * batch_syn, T]`, in the order in which the steps take them."""
        o = self.options
        module: Any = self.generator.module
        seed = derive_seed(self.run.seed, "write", self.progress.step, label)
        ids = module.write(label, self.written.shape[1], longest=o.max_length, top_p=o.top_p, seed=seed % 2**63,
                           paired=self.real.paired)  # fmt: skip
        if not o.diverse:
            return ids
        points = torch.cat([self._embedding(part, label) for part in ids.split(256)])
        means = KMeans(o.batch_syn, n_init=1, random_state=seed % 2**32).fit(points.double().numpy())
        clusters = [(torch.from_numpy(means.labels_) == k).nonzero().flatten() for k in range(o.batch_syn)]
        clusters = [rows for rows in clusters if len(rows)]
        turns = [
            clusters[i % len(clusters)][i // len(clusters) % len(clusters[i % len(clusters)])] for i in range(len(ids))
        ]
        return ids[torch.stack(turns)]

    def _embedding(self, ids: Tensor, label: int) -> Tensor:
        with torch.no_grad():
            return self.learner({}, self._batch(self._texts(ids), [label] * len(ids)), "embedding").float().cpu()

    def _texts(self, ids: Tensor) -> list[Text]:
        """What the generator wrote; an empty text is a full stop, so that the learner has something to read."""
        module: Any = self.generator.module
        paired = self.real.paired
        return [module.text(row, paired) or (".", "." if paired else None) for row in ids.tolist()]

    def _batch(self, texts: list[Text], labels: list[int]) -> Batch:
        return to_device(learner_batch(self.run.data, texts, labels), self.moments.device)

    def _losses(self, leaves: dict[str, Tensor], batch: Batch) -> Tensor:
        """The learner's cross-entropy of each text `[B]`."""
        return F.cross_entropy(self.learner(leaves, batch).float(), batch["label"], reduction="none")

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """`match`, and with lm_lambda > 0 `lm`: means over the classes of this batch, already weighted."""
        share, labels = self.options.lm_lambda, batch["label"].tolist()
        terms = {}
        if share < 1:
            distances = [self._distance(label, rows) for label, rows in zip(labels, batch["rows"], strict=True)]
            terms["match"] = (1 - share) * torch.stack(distances).mean()
        if share > 0:
            terms["lm"] = share * torch.stack([self._language(label) for label in labels]).mean()
        return terms

    def _distance(self, label: int, rows: Tensor) -> Tensor:
        """1 - the cosine of the gradients on real and on generated texts of a class (equations 4 to 6)."""
        leaves = self.learner.leaves(self.prefix)
        texts = [self.real.texts[i] for i in rows.tolist()]
        with sdpa_kernel(SDPBackend.MATH):  # the faster kernels cannot be differentiated twice
            losses = self._losses(leaves, self._batch(texts, [label] * len(texts)))
            target = weighted_gradient(losses, torch.full_like(losses, 1 / len(texts)), list(leaves.values())).detach()
            ids = self._generated(label)
            weights = generation_weights(self._generation_losses(list(ids)), self.options.tau)
            losses = self._losses(leaves, self._batch(self._texts(ids), [label] * len(ids)))
            found = weighted_gradient(losses, weights, list(leaves.values()))
        return 1 - F.cosine_similarity(target, found, dim=0)

    def _generated(self, label: int) -> Tensor:
        """This step's texts of a class `[batch_syn, T]`."""
        o = self.options
        turn = self.progress.step % (o.inner * o.interval)
        return self.written[label, turn * o.batch_syn : (turn + 1) * o.batch_syn]

    def _generation_losses(self, rows: list[Tensor]) -> Tensor:
        module: Any = self.generator.module
        ended = [torch.cat([row[row != module.padding], row.new_tensor([module.end])])[: self.options.max_length]
                 if row[-1] == module.padding and module.end not in row else row[row != module.padding]
                 for row in rows]  # fmt: skip
        batch = to_device(module.batch(ended), self.moments.device)
        logits = self.generator(batch).need("logits").float()
        return generation_loss(logits, batch["labels"], padded=self.options.padded_loss)

    def _language(self, label: int) -> Tensor:
        """The generation loss of a class's share of the step's random real texts."""
        o = self.options
        module: Any = self.generator.module
        rows = self._random(o.lm_batch, "lm")
        part = rows[label * len(rows) // self.classes : (label + 1) * len(rows) // self.classes] or rows[:1]
        return self._generation_losses(
            [module.ids(self.real.texts[i], self.real.labels[i], o.max_length).to(self.moments.device) for i in part]
        ).mean()

    def _random(self, count: int, *key: object) -> list[int]:
        seed = derive_seed(self.run.seed, self.name, self.progress.step, *key)
        order = torch.randperm(len(self.real.texts), generator=torch.Generator().manual_seed(seed))
        return [int(i) for i in order[:count]]

    def after_step(self) -> None:
        """Train the learner on real texts, but not after its last step, nor where there is nothing to match."""
        o, turn = self.options, self.progress.step % self.options.inner
        if turn + 1 == o.inner or o.lm_lambda == 1:
            return
        for number in range(o.learner_steps):
            rows = self._random(o.learner_batch, "learner", number)
            batch = self._batch([self.real.texts[i] for i in rows], [self.real.labels[i] for i in rows])
            leaves = self.learner.leaves()
            with torch.enable_grad():
                loss = self._losses(leaves, batch).mean()
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
            step = turn * o.learner_steps + number
            rate = o.learner_lr * warmed_cosine(step, o.inner * o.learner_steps)
            self.learner.take(self._adamw(leaves, torch.cat([g.reshape(-1) for g in found]), step, rate))

    def _adamw(self, leaves: dict[str, Tensor], gradient: Tensor, step: int, rate: float) -> dict[str, Tensor]:
        """The parameters after a step with the clipped gradient `[P]`; the moments are updated in place."""
        gradient = gradient * (GRADIENT_NORM / (gradient.norm() + 1e-6)).clamp(max=1)
        parts = adam_move(gradient, *self.moments, step).split([leaf.numel() for leaf in leaves.values()])
        return {name: (1 - rate * DECAY) * leaf.detach() - rate * part.view_as(leaf)
                for (name, leaf), part in zip(leaves.items(), parts, strict=True)}  # fmt: skip


class DiLM(Method):
    """Stages: `lm`, `representatives`, `match`, `data`, then a stage per network trained on each set.

    The ablation goes on with language modelling for as many steps, in place of matching.
    """

    roles = Roles(teachers=("generator",), students=None)
    ablation: Mapping[str, Any] = {"method.lm_lambda": 1, "method.baselines": []}
    cut: Mapping[str, Any] = {
        "method.lm_steps": 4,
        "method.iterations": 4,
        "method.inner": 2,
        "method.interval": 1,
        "method.batch_syn": 4,
        "method.learner_steps": 1,
        "method.eval_networks": 1,
        "method.ipc": 2,
        "method.over_generate": 4,
        "method.baselines": [],
    }
    options: DiLMOptions

    def stages(self, run: Run) -> Generator[Stage, Any, None]:
        """The stages. Raises `DataError` where the data is no classification of texts, `ModelError` for a generator of
        another kind."""
        o, sets = self.options, None
        real, generator = RealTexts(run, "dilm"), run.model("generator")
        if not hasattr(generator, "module") or not hasattr(generator.module, "write"):
            raise ModelError(
                "dilm needs `teachers.generator: {use: dd-generator, …}`, a language model with start tokens of "
                "the classes"
            )
        yield LanguageModelling(generator, real, o, run.recipe.train.save_every)
        if o.iterations:
            if o.real_sets:
                sets = (yield Representatives(real, o))["index"]
            yield TextMatching(run, real, o, sets)
        rows = yield WriteData(lambda: written(run, real, o), o, run.data.task)
        yield from train_networks(run, o, rows)


def written(run: Run, real: RealTexts, options: DiLMOptions) -> dict[str, Any]:
    """Of many texts that the generator writes, those nearest to k-means centres of a learner's embeddings, as columns.

    Texts that stand in another split than `train` are left out, as are repetitions.

    Raises:
        RunFailed: if a class has too few different texts.
    """
    generator: Any = run.model("generator").to(run.device).module
    seen, learner = Seen(run.data), draw(run, architectures(run)[0], "selection")
    found: list[tuple[Text, int]] = []
    for label in range(len(real.rows)):
        seed = derive_seed(run.seed, "data", label) % 2**63
        ids = generator.write(
            label,
            options.ipc * options.over_generate,
            longest=options.max_length,
            top_p=options.top_p,
            seed=seed,
            paired=real.paired,
        )
        texts = [text for row in ids.tolist() if (text := generator.text(row, real.paired)) and seen.new(text)]
        found += [(text, label) for text in nearest(run, learner, texts, label, options.ipc)]
    return as_columns(found)
