"""The critic: an encoder with a small head that says whether a triple holds, how it is trained, and its scores.

Source: section 4 of West et al. 2022. The official code reads padding along with the text; here it is masked.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import CatMetric

from kd_symbolic_kd.data import Triple
from kd_symbolic_kd.functional import cut_off
from kd_symbolic_kd.options import CriticOptions, SymbolicKDOptions
from kd_symbolic_kd.prompts import critic_pair
from kd_transformers.build import build
from kd_transformers.source import find_source
from kdcore import Run, TrainStage
from kdcore.data import DataModule, Task, derive_seed, to_device
from kdcore.metrics import Metrics
from kdcore.models import Batch, Model, Outputs
from kdcore.recipe import TrainOptions

SPLIT = "labelled"
PRECISION = "precision-at-recall"


class Critic(nn.Module):
    """Encoder, tanh pooler, dropout, hidden layer with GELU, dropout, one logit.

    Args:
        encoder: a model that gives an embedding.
        width: of the embedding.
        options: of the head.
        prior: share of valid triples, whose logit the last bias starts from.
    """

    def __init__(self, encoder: Model, width: int, options: CriticOptions, prior: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.head = nn.Sequential(
            nn.Dropout(options.dropout), nn.Linear(width, options.hidden), nn.GELU(),
            nn.Dropout(options.dropout), nn.Linear(options.hidden, 1),
        )  # fmt: skip
        nn.init.constant_(self.head[-1].bias, torch.tensor(prior).logit().item())  # type: ignore[arg-type]

    def forward(self, batch: Batch) -> Tensor:
        """Logits `[B]`."""
        logits: Tensor = self.head(self.pooler(self.encoder(batch).need("embedding"))).squeeze(1)
        return logits


class Reader:
    """Triples as pairs of texts with names, tokenised for the critic.

    Args:
        tokenizer: the critic's.
        options: names and connectors, and how long a pair may be.
        seed: of the names of a triple.
    """

    def __init__(self, tokenizer: Any, options: SymbolicKDOptions, seed: int) -> None:
        self.tokenizer, self.options, self.seed = tokenizer, options, seed
        self.connectors = {name: relation.connector for name, relation in options.words.items()}

    def name(self, row: Triple) -> Triple:
        """With names drawn from Python's global generator: an augmentation."""
        return {**row, "names": random.sample(self.options.names, 2)}

    def batch(self, rows: Sequence[Triple], number: int = 0) -> Batch:
        """Tokens `[B, T]` of each pair, and `label` `[B]` where the rows are labelled. Rows without names get some that
        depend on the triple and the `number` of the pass only."""
        pairs = [self._pair(row, number) for row in rows]
        encoded = self.tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, truncation=True,
                                 max_length=self.options.critic.max_length, return_tensors="pt")  # fmt: skip
        labels = {"label": torch.tensor([row["valid"] for row in rows])} if "valid" in rows[0] else {}
        return {**encoded, **labels}

    def _pair(self, row: Triple, number: int) -> tuple[str, str]:
        names = row.get("names")
        if names is None:
            rng = random.Random(derive_seed(self.seed, row["head"], row["relation"], row["tail"], number))
            names = rng.sample(self.options.names, 2)
        return critic_pair(self.connectors[row["relation"]], row["head"], row["tail"], names)


def make_critic(options: SymbolicKDOptions, task: Task, labelled: Sequence[Triple], seed: int) -> tuple[Critic, Reader]:
    """A critic with a fresh head, and what reads triples for it: with the encoder's own tokenizer, or the data's where
    the encoder is fresh too.

    Raises:
        ModelError: if the encoder cannot be had.
    """
    source = find_source(options.critic)
    tokenizer = (source.tokenizer() if source else None) or task.tokenizer
    encoder = build(options.critic, Task("unlabelled", tokenizer=tokenizer))
    prior = options.critic.prior
    if prior is None:
        prior = sum(row["valid"] for row in labelled) / len(labelled)
    config: Any = encoder.module.config
    width = config.get_text_config().hidden_size
    return Critic(encoder, width, options.critic, prior), Reader(tokenizer, options, seed)


class TrainCritic(TrainStage):
    """Binary cross-entropy on labelled triples, each time read with other names.

    After every evaluation the precision at a given recall is looked at: the best weights are kept, the rate falls on a
    plateau, and training stops when nothing better has come for long. All of it is in the checkpoints.

    Args:
        critic: what is trained.
        reader: of its triples.
        train, val: labelled triples.
        split: the split that the run evaluates on while it trains; here it stands for `val`.
    """

    splits = (SPLIT,)
    best_score: Tensor
    waited: Tensor
    rate: Tensor

    def __init__(
        self, critic: Critic, reader: Reader, train: Sequence[Triple], val: Sequence[Triple], split: str
    ) -> None:
        super().__init__("critic")
        self.options = reader.options.critic
        self.critic, self.best = critic, copy.deepcopy(critic).requires_grad_(False)
        self.register_buffer("best_score", torch.tensor(-1.0))
        self.register_buffer("waited", torch.tensor(0))
        self.register_buffer("rate", torch.tensor(1.0))
        self.measured = f"{split}/{PRECISION}"
        self.data = DataModule({SPLIT: train, split: val}, Task("unlabelled"), collate=reader.batch,
                               augment=reader.name)  # fmt: skip
        self._rate: float | None = None

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """The mean over the batch."""
        return {"critic": F.binary_cross_entropy_with_logits(self.critic(batch), batch["label"].float())}

    def optimizers(self, train: TrainOptions) -> dict[str, Optimizer]:
        """The recipe's optimizer; each of its steps is scaled by what is left of the rate."""
        made = super().optimizers(train)
        for optimizer in made.values():
            optimizer.register_step_pre_hook(self._scale)
        return made

    def _scale(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._rate is None:
            self._rate = float(self.rate)
        for group in optimizer.param_groups:
            group["lr"] *= self._rate  # the engine sets it anew in every step

    def evaluate(self, batch: Batch) -> Outputs:
        """Logits `[B]`."""
        return Outputs(logits=self.critic(batch))

    def make_metrics(self, task: Task, names: Sequence[str], device: torch.device) -> Metrics:
        """Area under the ROC curve, and precision at the recall of the options."""
        return CriticMetrics(self.options.recall, device)

    def judge_evaluation(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Keep the best weights, lower the rate, stop: called after every evaluation, on every process."""
        stopped = int(self.waited) >= self.options.patience  # killed after it had stopped, before the result was kept
        if not stopped and metrics[self.measured] > float(self.best_score):
            self.best_score.fill_(metrics[self.measured])
            self.waited.zero_()
            self.best.load_state_dict(self.critic.state_dict())
        elif not stopped:
            self.waited += 1
            if int(self.waited) % self.options.plateau == 0:
                self.rate *= self.options.plateau_factor
            self._rate = None
        if int(self.waited) >= self.options.patience:
            run.request_stop("the critic has stopped getting better")

    def chosen(self) -> Critic:
        """The best critic, frozen; the last where none was ever evaluated."""
        found = self.best if float(self.best_score) >= 0 else self.critic
        return found.requires_grad_(False).eval()


class CriticMetrics(Metrics):
    """Scores and labels of all processes, and what they make together."""

    def __init__(self, recall: float, device: torch.device | str) -> None:
        self.recall = recall
        self.scores, self.labels = CatMetric().to(device), CatMetric().to(device)

    def update(self, outputs: Outputs, batch: Batch) -> None:
        """Add one batch."""
        self.scores.update(outputs.need("logits").float())
        self.labels.update(batch["label"])

    def compute(self) -> dict[str, float]:
        """`auroc` and the precision at the recall; 0 where no threshold gives it."""
        scores, labels = self.scores.compute().cpu().numpy(), self.labels.compute().cpu().numpy()
        try:
            precision = cut_off(labels, scores, self.recall).precision
        except ValueError:
            precision = 0.0
        return {"auroc": float(roc_auc_score(labels, scores)), PRECISION: precision}


@torch.no_grad()
def score(critic: Critic, reader: Reader, rows: Sequence[Triple], device: torch.device) -> list[float]:
    """The probability that each triple holds: the mean over passes, in each of which it is read with other names."""
    critic.to(device)
    batches = (to_device(reader.batch(rows, number), device) for number in range(reader.options.critic.passes))
    scores = torch.stack([critic(batch).double().sigmoid() for batch in batches])
    return [float(value) for value in scores.mean(0)]
