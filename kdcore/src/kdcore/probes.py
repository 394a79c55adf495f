"""What an embedding is worth to someone who has labels: nearest neighbours, and a linear classifier on top.

For methods that learn without labels. Source of the weighted vote: Wu et al. 2018 (arXiv 1805.01978), section 3.4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torchmetrics.functional.classification as tmf
from torch import Tensor
from torch.nn import functional as F

from kdcore.data import DataModule, to_device
from kdcore.errors import DataError
from kdcore.models import Model

if TYPE_CHECKING:
    from kdcore.runner import Run

Probe = Literal["knn", "linear"]


def embeddings(run: Run, model: Model, split: str, data: DataModule | None = None) -> tuple[Tensor, Tensor]:
    """Embeddings `[N, D]` and labels `[N]` of a split, in its order, on the CPU; the same on every process.

    Args:
        run: whose device, precision and batch size are used.
        model: in evaluation mode meanwhile.
        split: of the data.
        data: where it is not the run's.

    Raises:
        DataError: if the samples have no label, or are a stream.
        ModelError: if the model gives no embedding.
    """
    data, accelerator = data or run.data, run.accelerator
    size = run.recipe.train.eval_batch_size or run.recipe.train.batch_size
    if (data.size(split) or 0) < accelerator.num_processes:
        raise DataError(f"split {split!r} has no samples for each of {accelerator.num_processes} processes to probe")
    was_training, found = model.training, []
    model.to(run.device).eval()
    with torch.no_grad(), accelerator.autocast():
        for batch in data.eval_loader(split, size, accelerator.process_index, accelerator.num_processes):
            if "label" not in batch:
                raise DataError(f"the samples of split {split!r} have no label, which a probe needs")
            batch = to_device(batch, run.device)
            found.append((model(batch).need("embedding").float(), batch["label"], batch["index"]))
    model.train(was_training)
    columns = [torch.cat(column) for column in zip(*found, strict=True)]
    embedding, label, index = (
        accelerator.gather(accelerator.pad_across_processes(column, pad_index=-1)).cpu() for column in columns
    )
    order = index.argsort()
    order = order[index[order] >= 0]
    return embedding[order], label[order]


def knn(reference: Tensor, labels: Tensor, query: Tensor, k: int = 20, temperature: float = 0.07) -> Tensor:
    """Votes `[M, C]` of the k nearest neighbours by cosine, each with the weight exp(cosine / temperature).

    Args:
        reference: `[N, D]`, with labels `[N]` in 0 to C - 1.
        query: `[M, D]`.
    """
    reference, votes = F.normalize(reference.float()), []
    for part in torch.split(F.normalize(query.float()), 1024):
        near, which = (part @ reference.T).topk(min(k, len(reference)))
        vote = near.new_zeros(len(part), int(labels.max()) + 1)
        votes.append(vote.scatter_add_(1, labels[which], (near / temperature).exp()))
    return torch.cat(votes)


def linear(reference: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Probabilities `[M, C]` of a logistic regression on the standardised reference. Arguments as for `knn`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(reference.numpy(), labels.numpy())
    scores = torch.zeros(len(query), int(labels.max()) + 1)
    scores[:, model.classes_] = torch.from_numpy(model.predict_proba(query.numpy())).float()
    return scores


def probe(
    run: Run, model: Model, reference: str = "train", query: str = "val", *, kinds: Sequence[Probe] = ("knn", "linear"),
    k: int = 20, temperature: float = 0.07, data: DataModule | None = None,
) -> dict[str, float]:  # fmt: skip
    """How well the embedding of one split tells the labels of another: accuracy, its mean over classes
    (`balanced-accuracy`) and the mean F1 over classes, as `query/kind-metric`.

    Raises:
        DataError, ModelError: as `embeddings`.
    """
    known, labels = embeddings(run, model, reference, data)
    asked, truth = embeddings(run, model, query, data)
    classes = int(max(labels.max(), truth.max())) + 1
    found = {}
    for kind in kinds:
        scores = knn(known, labels, asked, k, temperature) if kind == "knn" else linear(known, labels, asked)
        guess = scores.argmax(1)
        found[f"{query}/{kind}-accuracy"] = tmf.multiclass_accuracy(guess, truth, classes, average="micro")
        found[f"{query}/{kind}-balanced-accuracy"] = tmf.multiclass_accuracy(guess, truth, classes, average="macro")
        found[f"{query}/{kind}-f1"] = tmf.multiclass_f1_score(guess, truth, classes, average="macro")
    return {name: float(value) for name, value in found.items()}
