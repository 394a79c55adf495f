"""The teacher's side of LELP: directions inside each class, fitted once on the teacher's embeddings.

Source: Loo et al. 2024, "Linear Projections of Teacher Embeddings for Few-Class Distillation" (arXiv 2409.20449).
D is the width of the embedding that enters the teacher's final linear layer, C the number of classes and S the number
of pseudo-subclasses of a class.
"""

import logging
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor, nn

from kd_lelp.functional import as_class_logits, pseudo_subclass_targets

Directions = Literal["pca", "random", "kmeans"]
Rotation = Literal["random", "none"]
Scale = Literal["class_std", "per_direction", "none"]
ClassSource = Literal["label", "teacher"]

logger = logging.getLogger(__name__)


class SubclassProjector(nn.Module):
    """Embeddings and logits of the teacher to probabilities of C * S pseudo-subclasses.

    Holds buffers only. Fit it once and save it with the run: the directions are arbitrary up to a rotation, so a
    second fit would change the meaning of every pseudo-subclass. An instance of the same three sizes takes the
    ``state_dict`` of a fitted one.

    Args:
        num_classes: C.
        embedding_dim: D.
        num_subclasses: S.

    Buffers:
        mean: ``[C, D]``, mean of each class, within the null space of the teacher's head if that was asked for.
        directions: ``[C, S, D]``, unit length, already rotated, within the same space.
        scale: ``[C, S]``, divides the projections.

    Example:
        >>> head = torch.nn.Linear(20, 2)
        >>> embeddings = torch.randn(100, 20)
        >>> projector = SubclassProjector.fit(embeddings, head(embeddings), None, head.weight, num_subclasses=4)
        >>> projector(embeddings, head(embeddings)).shape
        torch.Size([100, 8])
    """

    mean: Tensor
    directions: Tensor
    scale: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, num_subclasses: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes, embedding_dim))
        self.register_buffer("directions", torch.zeros(num_classes, num_subclasses, embedding_dim))
        self.register_buffer("scale", torch.ones(num_classes, num_subclasses))

    @property
    def num_subclasses(self) -> int:
        """S; smaller than what `fit` was asked for if the embeddings had no room for more."""
        return self.directions.shape[1]

    @classmethod
    def fit(
        cls,
        embeddings: Tensor,
        logits: Tensor,
        labels: Tensor | None,
        head_weight: Tensor | None,
        *,
        num_subclasses: int = 4,
        null_space: bool = True,
        directions: Directions = "pca",
        rotation: Rotation = "random",
        scale: Scale = "class_std",
        class_source: ClassSource = "label",
        max_fit_samples: int = 50_000,
        seed: int = 0,
    ) -> Self:
        """Find S directions inside each class.

        Runs in float64 on the CPU and depends on nothing but the arguments. What had to give way is logged as a
        warning: fewer subclasses where the null space is too small, random directions where a class spans too few.

        Args:
            embeddings: ``[N, D]`` of the frozen teacher, without augmentation.
            logits: ``[N, C]``, or ``[N, 1]`` of a binary single-output head.
            labels: class indices ``[N]``, negative where unknown. None takes the teacher's predictions.
            head_weight: ``[C, D]`` (``[1, D]``) of the teacher's final linear layer; only for `null_space`.
            num_subclasses: S.
            null_space: first remove what the head reads, which the logits tell already.
            directions: ``"pca"`` principal directions; ``"random"`` orthonormal ones; ``"kmeans"`` from the mean of
                the class to its S cluster centres.
            rotation: ``"random"`` mixes the principal directions, whose variances decay, into S of equal expected
                variance; leaves the other kinds of directions alone.
            scale: divide projections by one deviation per class, by one per direction, or not at all.
            class_source: ``"label"`` uses `labels` where there are any, ``"teacher"`` always the prediction.
            max_fit_samples: fit on a random subset of at most this size.
            seed: of subset, rotation, random directions and k-means.

        Raises:
            ValueError: if shapes do not fit, an option is unknown, or `null_space` lacks `head_weight`.
        """
        _check_options(directions=directions, rotation=rotation, scale=scale, class_source=class_source)
        logits = as_class_logits(logits.detach()).cpu()
        _check_sizes(embeddings, logits, labels, num_subclasses, max_fit_samples)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(embeddings), generator=generator)[:max_fit_samples]
        classes = _assign_classes(logits, labels if class_source == "label" else None)[rows]
        samples = embeddings.detach().cpu()[rows].double()
        basis = _head_basis(head_weight, logits.shape[1], samples.shape[1]) if null_space else samples[:0]
        samples = project_out(samples, basis)
        size = _affordable_subclasses(num_subclasses, samples.shape[1] - len(basis))

        projector = cls(logits.shape[1], samples.shape[1], size)
        finder = _DirectionFinder(size, directions, rotation, basis, generator, seed)
        for index in range(logits.shape[1]):
            members = samples[classes == index]
            mean = members.mean(dim=0) if len(members) else samples.mean(dim=0)
            found = finder(members - mean, index)
            projector.mean[index] = mean
            projector.directions[index] = found
            projector.scale[index] = _deviation((members - mean) @ found.T, scale)
        return projector

    def subclass_logits(self, embedding: Tensor) -> Tensor:
        """Scaled projections ``[B, D]`` to ``[B, C, S]``, in float32 even under autocast."""
        with torch.autocast(embedding.device.type, enabled=False):
            # The directions lie in the null space of the head already, so the embedding needs no projection.
            hidden = embedding.to(self.directions.dtype)
            offset = torch.einsum("csd,cd->cs", self.directions, self.mean)
            return (torch.einsum("csd,bd->bcs", self.directions, hidden) - offset) / self.scale

    @torch.no_grad()
    def forward(self, embedding: Tensor, logits: Tensor, tau: float = 1.0, beta: float = 0.5) -> Tensor:
        """Targets for the student.

        Args:
            embedding: teacher ``[B, D]``.
            logits: teacher ``[B, C]``, or ``[B, 1]`` of a binary single-output head.
            tau: temperature of the classes.
            beta: temperature of the subclasses.

        Returns:
            Probabilities ``[B, C * S]`` in class-major order.

        Raises:
            ValueError: if the shapes do not fit or a temperature is not positive.
        """
        if embedding.ndim != 2 or embedding.shape[1] != self.mean.shape[1]:
            raise ValueError(
                f"the projector was fitted on embeddings [B, {self.mean.shape[1]}], not {list(embedding.shape)}"
            )
        return pseudo_subclass_targets(logits, self.subclass_logits(embedding), tau=tau, beta=beta)


def row_space_basis(matrix: Tensor) -> Tensor:
    """Orthonormal float64 rows ``[r, D]`` that span the rows of ``[K, D]``; r is the numerical rank in float32."""
    _, values, rows = torch.linalg.svd(matrix.detach().cpu().double(), full_matrices=False)
    tolerance = values.amax().item() * max(matrix.shape) * torch.finfo(torch.float32).eps if len(values) else 0.0
    basis: Tensor = rows[values > tolerance]
    return basis


def project_out(vectors: Tensor, basis: Tensor) -> Tensor:
    """Remove from ``[N, D]`` what lies in the span of orthonormal (or zero) rows ``[r, D]``."""
    return vectors - (vectors @ basis.T) @ basis


def random_directions(count: int, avoid: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal float64 ``[count, D]`` at random, orthogonal to the rows ``[m, D]`` of `avoid`."""
    draw = torch.randn(count, avoid.shape[1], generator=generator, dtype=torch.float64)
    directions: Tensor = torch.linalg.qr(project_out(draw, row_space_basis(avoid)).T).Q.T
    return directions


@dataclass(frozen=True)
class _DirectionFinder:
    """Directions ``[S, D]`` of one class from its centred samples ``[n, D]``."""

    size: int
    kind: Directions
    rotation: Rotation
    basis: Tensor
    generator: torch.Generator
    seed: int

    def __call__(self, centred: Tensor, class_index: int) -> Tensor:
        found = self._from_data(centred.numpy())
        missing = self.size - len(found)
        if missing and self.kind != "random":
            logger.warning(
                "class %d: %d samples give only %d of %d directions; the rest are random",
                class_index,
                len(centred),
                len(found),
                self.size,
            )
        extra = random_directions(missing, torch.cat([self.basis, found]), self.generator)
        found = torch.cat([found, extra])
        if self.kind == "pca" and self.rotation == "random":
            found = _random_rotation(self.size, self.generator) @ found
        return found

    def _from_data(self, centred: NDArray[np.float64]) -> Tensor:
        # Neither PCA nor k-means has anything to find in equal samples.
        if self.kind == "random" or len(centred) < 2 or np.abs(centred).max() < 1e-9:
            return self.basis.new_empty(0, centred.shape[1])
        find = _principal_directions if self.kind == "pca" else _cluster_directions
        return torch.from_numpy(find(centred, self.size, self.seed))


def _principal_directions(centred: NDArray[np.float64], size: int, seed: int) -> NDArray[np.float64]:
    # n samples span n - 1 directions around their mean, and directions without variance are arbitrary.
    pca = PCA(min(size, len(centred) - 1, centred.shape[1]), random_state=seed).fit(centred)
    return np.asarray(pca.components_[pca.explained_variance_ > 1e-10 * pca.explained_variance_[0]])


def _cluster_directions(centred: NDArray[np.float64], size: int, seed: int) -> NDArray[np.float64]:
    centres = KMeans(min(size, len(centred)), n_init=10, random_state=seed).fit(centred).cluster_centers_
    lengths = np.linalg.norm(centres, axis=1)
    # A cluster centred on the mean of the class points nowhere.
    apart = lengths > 1e-6 * centred.std()
    return np.asarray(centres[apart] / lengths[apart, None])


def _random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """Orthonormal ``[S, S]``, uniformly distributed: the signs of QR would otherwise favour some."""
    factors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = factors.Q * factors.R.diagonal().sign()
    return rotation


def _deviation(projections: Tensor, scale: Scale) -> Tensor:
    """Standard deviation ``[S]`` of centred projections ``[n, S]``; 1 where there is no variance to divide by."""
    size = projections.shape[1]
    if scale == "none" or not len(projections):
        return projections.new_ones(size)
    variance = projections.square().mean(dim=0)
    if scale == "class_std":
        variance = variance.mean().expand(size)
    return variance.sqrt().where(variance > 1e-10 * variance.mean() + 1e-20, 1.0)


def _head_basis(head_weight: Tensor | None, num_classes: int, dim: int) -> Tensor:
    """Row space of the teacher's head, empty if nothing is outside it."""
    if head_weight is None:
        raise ValueError("null_space needs the weight of the teacher's final layer; pass head_weight or switch it off")
    if head_weight.ndim != 2 or len(head_weight) not in (1, num_classes) or head_weight.shape[1] != dim:
        raise ValueError(f"the head's weight must be [{num_classes}, {dim}], but has shape {list(head_weight.shape)}")
    basis = row_space_basis(head_weight)
    if len(basis) < dim:
        return basis
    logger.warning("the head reads all %d directions of the embedding; the null-space projection is skipped", dim)
    return basis[:0]


def _affordable_subclasses(asked: int, dimensions: int) -> int:
    if asked > dimensions:
        logger.warning("%d dimensions are left for %d subclasses; every class gets %d", dimensions, asked, dimensions)
    return min(asked, dimensions)


def _assign_classes(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Class of each sample: its label, or the teacher's prediction where there is none."""
    predicted = logits.argmax(dim=1)
    if labels is None:
        return predicted
    labels = labels.detach().cpu()
    if labels.max() >= logits.shape[1]:
        raise ValueError(f"label {int(labels.max())} does not fit a teacher of {logits.shape[1]} classes")
    return labels.where(labels >= 0, predicted)


def _check_options(**chosen: str) -> None:
    allowed = {"directions": Directions, "rotation": Rotation, "scale": Scale, "class_source": ClassSource}
    for name, value in chosen.items():
        if value not in get_args(allowed[name]):
            raise ValueError(f"{name} must be one of {', '.join(get_args(allowed[name]))}, not {value!r}")


def _check_sizes(embeddings: Tensor, logits: Tensor, labels: Tensor | None, subclasses: int, samples: int) -> None:
    if embeddings.ndim != 2 or len(embeddings) != len(logits) or not len(logits):
        raise ValueError(
            f"embeddings {list(embeddings.shape)} and logits {list(logits.shape)} must be [N, D] and [N, C]"
        )
    if labels is not None and labels.shape != logits.shape[:1]:
        raise ValueError(f"labels must be [{len(logits)}], but have shape {list(labels.shape)}")
    if subclasses < 1 or samples < 1:
        raise ValueError(f"num_subclasses and max_fit_samples must be positive, but are {subclasses} and {samples}")
