"""The matching objectives, the selectors and the scores, as functions of tensors.

Sources: Zhao, Mopuri, Bilen 2021 (DC, arXiv 2006.05929), Zhao and Bilen 2021 and 2023 (DSA, arXiv 2102.08259; DM, arXiv
2110.04181), Cazenavette et al. 2022 (MTT, arXiv 2203.11932), Maekawa et al. 2024 (DiLM, arXiv 2404.00264), Xia et al.
2024 (LESS, arXiv 2402.04333), Welling 2009 (herding).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Parameters = dict[str, Tensor]
Forward = Callable[[Parameters, Tensor], Tensor]
"""Logits or embeddings `[B, D]` of inputs `[B, ...]` under explicit parameters."""

Metric = Literal["ours", "mse", "cos"]


def gradient_distance(synthetic: Sequence[Tensor], real: Sequence[Tensor], metric: Metric = "ours") -> Tensor:
    """How far the gradients on synthetic data are from those on real data (DC, equation 7 and appendix).

    `ours` sums `1 - cosine` over the output rows of every weight, a weight being seen as `[out, -1]` and a tensor of
    three dimensions as `[C, H * W]`; tensors of one dimension (biases, affine norms) add nothing. `mse` is the squared
    distance of all gradients together, `cos` is 1 - their cosine.

    Args:
        synthetic, real: gradients of the same parameters, in the same order.
        metric: which distance.

    Raises:
        ValueError: if the gradients do not fit each other, or there is no such metric.
    """
    if [g.shape for g in synthetic] != [g.shape for g in real]:
        raise ValueError("synthetic and real gradients must be those of the same parameters, in the same order")
    if metric == "ours":
        zero = torch.zeros((), device=synthetic[0].device)
        return sum((_rowwise(s, r) for s, r in zip(synthetic, real, strict=True) if s.ndim > 1), zero)
    ours, theirs = (torch.cat([g.flatten() for g in gradients]) for gradients in (synthetic, real))
    if metric == "mse":
        return (ours - theirs).square().sum()
    if metric == "cos":
        return 1 - (ours * theirs).sum() / (ours.norm() * theirs.norm() + 1e-6)
    raise ValueError(f"there is no metric {metric!r}: ours, mse or cos")


def _rowwise(synthetic: Tensor, real: Tensor) -> Tensor:
    ours, theirs = synthetic.flatten(1), real.flatten(1)
    cosine = (ours * theirs).sum(1) / (ours.norm(dim=1) * theirs.norm(dim=1) + 1e-6)
    return (1 - cosine).sum()


def class_gradients(forward: Forward, parameters: Parameters, inputs: Tensor, label: Tensor, *,
                    create_graph: bool = False) -> list[Tensor]:  # fmt: skip
    """Gradients of the mean cross-entropy of `inputs` `[B, ...]` with labels `[B]`, in the order of the parameters."""
    loss = F.cross_entropy(forward(parameters, inputs), label)
    wanted = list(parameters.values())
    return list(torch.autograd.grad(loss, wanted, create_graph=create_graph, allow_unused=True, materialize_grads=True))


def gradient_matching(
    forward: Forward,
    parameters: Parameters,
    real: Sequence[Tensor],
    synthetic: Sequence[Tensor],
    labels: Sequence[int],
    metric: Metric = "ours",
) -> Tensor:
    """DC, equation 7: the distance of the gradients of each class, summed over classes; gradient to `synthetic`.

    Args:
        forward: the network; it is the same for all classes.
        parameters: a leaf each, requiring gradient.
        real, synthetic: by class, inputs `[B, ...]` and `[N, ...]`.
        labels: the label of each class given.
        metric: see `gradient_distance`.
    """
    total = torch.zeros((), device=synthetic[0].device)
    for theirs, ours, label in zip(real, synthetic, labels, strict=True):
        target = class_gradients(forward, parameters, theirs, _full(theirs, label))
        found = class_gradients(forward, parameters, ours, _full(ours, label), create_graph=True)
        total = total + gradient_distance(found, [g.detach() for g in target], metric)
    return total


def distribution_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor]) -> Tensor:
    """DM, equation 5: the squared distance between the class means of embeddings `[B, D]` and `[N, D]`, summed over
    classes. The real side gets no gradient."""
    pairs = zip(real, synthetic, strict=True)
    return torch.stack([(r.detach().mean(0) - s.mean(0)).square().sum() for r, s in pairs]).sum()


def unroll(
    forward: Forward,
    parameters: Parameters,
    batches: Sequence[tuple[Tensor, Tensor]],
    rate: Tensor,
) -> Parameters:
    """Plain gradient descent that can be differentiated: `theta <- theta - rate * grad CE` for each batch.

    Args:
        forward: the network.
        parameters: where it starts; requiring gradient.
        batches: inputs `[B, ...]` and labels `[B]` of each step.
        rate: scalar; gradient reaches it and the inputs.
    """
    for inputs, labels in batches:
        gradients = class_gradients(forward, parameters, inputs, labels, create_graph=True)
        steps = zip(parameters.items(), gradients, strict=True)
        parameters = {name: value - rate * gradient for (name, value), gradient in steps}
    return parameters


def trajectory_distance(final: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """MTT, equation 2: `|final - target|^2 / |start - target|^2` of flat parameters `[P]`."""
    return (final - target).square().sum() / (start - target).square().sum()


def minibatches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of minibatches without end: a permutation in chunks of `size`, taken from the last one, then another."""
    while True:
        yield from reversed(torch.randperm(count, generator=generator).split(size))


def flat(parameters: Mapping[str, Tensor]) -> Tensor:
    """Parameters as one vector `[P]`, in their order."""
    return torch.cat([value.reshape(-1) for value in parameters.values()])


def unflat(vector: Tensor, like: Mapping[str, Tensor]) -> Parameters:
    """The parts of a vector `[P]` in the shapes of `like`, in its order."""
    parts = vector.split([value.numel() for value in like.values()])
    return {name: part.view_as(value) for (name, value), part in zip(like.items(), parts, strict=True)}


def generation_loss(logits: Tensor, labels: Tensor, *, padded: bool = False) -> Tensor:
    """Mean cross-entropy of each text's tokens `[B]`, of logits `[B, T, V]` and labels `[B, T]` aligned with them (-100
    where nothing counts). `padded` divides by T instead of the text's own length, as DiLM's code does."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    length = labels.shape[1] if padded else (labels != -100).sum(1).clamp(min=1)
    return losses.sum(1) / length


def generation_weights(losses: Tensor, tau: float = 1.0) -> Tensor:
    """DiLM, equation 5: how much each of B texts weighs, `softmax(-losses / tau)`: the likelier, the more."""
    return (-losses / tau).softmax(0)


def weighted_gradient(losses: Tensor, weights: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The flat gradient of `sum_i weights_i * losses_i`, differentiable in the weights."""
    gradients = torch.autograd.grad((losses * weights).sum(), list(parameters), create_graph=True)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def adam_move(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, *, beta1: float = 0.9,
              beta2: float = 0.999, eps: float = 1e-8) -> Tensor:  # fmt: skip
    """Adam's move against a gradient, before its rate; both moments are brought up to date in place.

    Args:
        gradient: ``[P]``.
        exp_avg: ``[P]``, mean of the gradients.
        exp_avg_sq: ``[P]``, mean of their squares.
        step: steps taken before this one.
        beta1: decay of the mean.
        beta2: decay of the mean of squares.
        eps: added to the root.
    """
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.lerp_(gradient.square(), 1 - beta2)
    unbiased, square = exp_avg / (1 - beta1 ** (step + 1)), exp_avg_sq / (1 - beta2 ** (step + 1))
    return unbiased / (square.sqrt() + eps)


def warmed_cosine(step: int, steps: int, warm_up: float = 0.5) -> float:
    """DiLM's factor of a learner's rate at a step: up in a line over a share of the steps, then down as a cosine."""
    rise = warm_up * steps
    return step / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
) -> Tensor:
    """LESS, section 3.1: the step Adam would take for each sample, from the moments that training left.

    There is no bias correction, and eps stands inside the root.

    Args:
        gradient: `[N, P]`.
        exp_avg, exp_avg_sq: `[P]`.
    """
    first = beta1 * exp_avg + (1 - beta1) * gradient
    second = beta2 * exp_avg_sq + (1 - beta2) * gradient.square()
    return first / (second + eps).sqrt()


def influence(train: Tensor, target: Tensor, weights: Sequence[float] | Tensor, subtasks: Tensor) -> Tensor:
    """LESS, definition 3.1: for each training sample, the largest over subtasks of the mean similarity to its rows,
    summed over checkpoints with weights that are brought to sum 1.

    Args:
        train: features `[K, N, D]` at K checkpoints, of length one.
        target: features `[K, M, D]` of the target's samples, of length one.
        weights: of the checkpoints, `[K]`.
        subtasks: which subtask each of the M samples belongs to.

    Returns:
        Scores `[N]`.
    """
    weight = torch.as_tensor(weights, dtype=train.dtype, device=train.device)
    weight = weight / weight.sum()
    similarity = torch.einsum("k,knd,kmd->nm", weight, train, target)
    means = [similarity[:, (subtasks == task).to(similarity.device)].mean(1) for task in subtasks.unique()]
    return torch.stack(means).amax(0)


def herding(embedding: Tensor, count: int) -> Tensor:
    """Indices `[count]` of `[N, D]`: greedily, the sample that brings the mean of the chosen nearest to that of all."""
    mean, chosen, total = embedding.mean(0), [], torch.zeros_like(embedding[0])
    free = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device)
    for number in range(_checked(embedding, count)):
        distance = ((number + 1) * mean - (total + embedding)).norm(dim=1)
        best = int(distance.masked_fill(~free, torch.inf).argmin())
        free[best] = False
        total = total + embedding[best]
        chosen.append(best)
    return torch.tensor(chosen)


def k_centers(embedding: Tensor, count: int, seed: int = 0) -> Tensor:
    """Indices `[count]`: the sample nearest to each centroid of k-means with `count` clusters of `[N, D]`.

    Where samples are so alike that a cluster has none of its own, the samples farthest from those chosen fill up.
    """
    from sklearn.cluster import KMeans

    points = embedding.detach().cpu().double()
    means = KMeans(_checked(embedding, count), n_init=1, random_state=seed % 2**32).fit(points.numpy())
    distance = torch.cdist(torch.from_numpy(means.cluster_centers_), points)
    chosen: list[int] = []
    for row in distance:
        row[chosen] = torch.inf
        chosen.append(int(row.argmin()))
    return torch.tensor(chosen)


def _checked(embedding: Tensor, count: int) -> int:
    if not 0 < count <= len(embedding):
        raise ValueError(f"{count} of {len(embedding)} samples cannot be chosen")
    return count


def _full(inputs: Tensor, label: int) -> Tensor:
    return torch.full((len(inputs),), label, device=inputs.device)
