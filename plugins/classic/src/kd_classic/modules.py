"""Trainable parts of the classic methods: they learn with the student and stay out of the exported model."""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Regressor(nn.Module):
    """Convolution, batch norm and ReLU that bring a student's feature map to the teacher's shape.

    Source: Romero et al. 2015, FitNets (arXiv 1412.6550), section 2.2, in the form of the usual CIFAR benchmarks. The
    kernel follows from the two sizes: stride 2 to halve, a transposed convolution to double, otherwise an unpadded
    kernel that takes off the surplus rows and columns. A student's map that is smaller in another proportion keeps its
    size (kernel 1).

    Args:
        student_shape: ``(B, Ch, H, W)`` of the student's features; the batch size does not matter.
        teacher_shape: ``(B, Ch, H, W)`` of the teacher's.
        relu: end with a ReLU, for teacher features taken after theirs.

    Raises:
        ValueError: if a shape is not four-dimensional.

    Example:
        >>> regressor = Regressor((64, 8, 16, 16), (64, 32, 8, 8))
        >>> regressor(torch.zeros(2, 8, 16, 16)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(self, student_shape: Sequence[int], teacher_shape: Sequence[int], *, relu: bool = True) -> None:
        super().__init__()
        self.conv = _matching_convolution(tuple(student_shape), tuple(teacher_shape))
        self.bn = nn.BatchNorm2d(teacher_shape[1])
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """``[B, Ch_s, H_s, W_s]`` to ``[B, Ch_t, H_t, W_t]``, or ``[B, Ch_t, H_s, W_s]`` where no kernel enlarges."""
        projected: Tensor = self.activation(self.bn(self.conv(features)))
        return projected


def _matching_convolution(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Conv2d | nn.ConvTranspose2d:
    if len(student) != 4 or len(teacher) != 4:
        raise ValueError(f"FitNets needs feature maps (B, Ch, H, W), but got shapes {student} and {teacher}")
    (_, channels_in, height, width), (_, channels_out, out_height, out_width) = student, teacher
    # A 3x3 kernel of stride 2 and padding 1 rounds an odd width up.
    if height == 2 * out_height and (width + 1) // 2 == out_width:
        return nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1)
    if (2 * height, 2 * width) == (out_height, out_width):
        return nn.ConvTranspose2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)
    if height >= out_height and width >= out_width:
        return nn.Conv2d(channels_in, channels_out, kernel_size=(1 + height - out_height, 1 + width - out_width))
    # Smaller, but not by half: the teacher's map is pooled to the student's size instead.
    return nn.Conv2d(channels_in, channels_out, kernel_size=1)


class Connector(nn.Sequential):
    """1x1 convolution without bias and batch norm, from the student's channels to the teacher's: the connector of OFD.

    Source: Heo et al. 2019, section 3.2 (arXiv 1904.01866). ``[B, Ch_s, H, W]`` to ``[B, Ch_t, H, W]``.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))
        nn.init.normal_(self[0].weight, std=math.sqrt(2 / channels_out))


class VariationalRegressor(nn.Module):
    """Predicts mean and (per channel) scale of the teacher's features. Source: Ahn et al. 2019 (arXiv 1904.05835).

    Args:
        channels_in, channels_out: of student and teacher.
        init_variance: of every channel at the start.
        eps: least variance.
    """

    def __init__(self, channels_in: int, channels_out: int, *, init_variance: float = 5.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 1, bias=False), nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 1, bias=False),
        )  # fmt: skip
        self.log_scale = nn.Parameter(torch.full((channels_out,), math.log(math.expm1(init_variance - eps))))

    def forward(self, features: Tensor) -> Tensor:
        """The mean, ``[B, Ch_s, H, W]`` to ``[B, Ch_t, H, W]``."""
        mean: Tensor = self.regressor(features)
        return mean


class Projector(nn.Module):
    """Brings the student's last map to the teacher's channels, through a bottleneck of ``channels_out / factor``.

    Source: Chen et al. 2022, "Knowledge Distillation with the Reused Teacher Classifier", section 3.2 (arXiv
    2203.14001).
    """

    def __init__(self, channels_in: int, channels_out: int, *, factor: int = 2) -> None:
        super().__init__()
        middle = max(channels_out // factor, 1)
        layers: list[nn.Module] = []
        for ins, outs, kernel in ((channels_in, middle, 1), (middle, middle, 3), (middle, channels_out, 1)):
            conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(outs), nn.ReLU()]
        self.transfer = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, Ch_s, H, W]`` to ``[B, Ch_t, H, W]``."""
        projected: Tensor = self.transfer(features)
        return projected


class ABF(nn.Module):
    """Attention-based fusion of ReviewKD: a level's features and the residual of the level below it.

    Source: Chen et al. 2021, figure 4a (arXiv 2104.09044).

    Args:
        channels_in: of the student's features.
        channels_mid: of the residual that levels hand on.
        channels_out: of the teacher's features.
        fuse: whether a residual arrives; not at the deepest level.
    """

    def __init__(self, channels_in: int, channels_mid: int, channels_out: int, *, fuse: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(channels_in, channels_mid, 1, bias=False), nn.BatchNorm2d(channels_mid))
        self.conv2 = nn.Sequential(
            nn.Conv2d(channels_mid, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)
        )
        self.att_conv = nn.Sequential(nn.Conv2d(2 * channels_mid, 2, 1), nn.Sigmoid()) if fuse else None
        for sequence in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(sequence[0].weight, a=1)

    def forward(self, features: Tensor, residual: Tensor | None, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Features for the teacher's level and the residual for the next one, both of the teacher's ``size``."""
        x = self.conv1(features)
        if self.att_conv is not None:
            assert residual is not None
            residual = F.interpolate(residual, x.shape[-2:], mode="nearest")
            attention = self.att_conv(torch.cat([x, residual], dim=1))
            x = x * attention[:, :1] + residual * attention[:, 1:]
        x = F.interpolate(x, list(size), mode="nearest")
        return self.conv2(x), x


class MaskedGenerator(nn.Module):
    """Generates the teacher's features from the student's, part of which is masked.

    Source: Yang et al. 2022, "Masked Generative Distillation", section 3 (arXiv 2205.01529).

    Args:
        channels_in, channels_out: of student and teacher.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.align = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.generation = nn.Sequential(
            nn.Conv2d(channels_out, channels_out, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
        )  # fmt: skip

    def forward(self, features: Tensor, keep: Tensor) -> Tensor:
        """``[B, Ch_s, H, W]`` and a mask that broadcasts to ``[B, Ch_t, H, W]``, to ``[B, Ch_t, H, W]``."""
        generated: Tensor = self.generation(self.align(features) * keep)
        return generated


class Exit(nn.Module):
    """A shallow exit of BYOT: bottlenecks bring a stage's map to the width and size of the deepest one.

    Source: Zhang et al. 2019, "Be Your Own Teacher", section 3.1 (arXiv 1905.08094).

    Args:
        channels_in: of the stage.
        channels_out: of the deepest features.
        stride: how many times larger the stage's map is than the deepest one.
        classes: number of classes.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, classes: int) -> None:
        super().__init__()
        middle = max(channels_in // 2, 1)
        layers: list[nn.Module] = []
        for ins, outs, kernel in ((channels_in, middle, 1), (middle, middle, stride), (middle, channels_out, 1)):
            conv = nn.Conv2d(ins, outs, kernel, stride=kernel, bias=False)
            layers += [conv, nn.BatchNorm2d(outs), nn.ReLU()]
        self.bottleneck = nn.Sequential(*layers)
        self.fc = nn.Linear(channels_out, classes)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, C]`` and pooled features ``[B, Ch_out]`` of a map ``[B, Ch_in, H, W]``."""
        pooled = self.bottleneck(features).mean((2, 3))
        return self.fc(pooled), pooled


class ContrastMemory(nn.Module):
    """The two memory banks of CRD with their embeddings: row i of a bank belongs to sample i of the training split.

    Source: Tian et al. 2020, "Contrastive Representation Distillation" (arXiv 1910.10699), sections 3.2 and 4, as in
    the authors' code: both embeddings are trained, each side is contrasted with the other's bank, and the normalising
    constants are fixed by the first batch.

    Args:
        student_width, teacher_width: of the features ``[B, D]``.
        size: samples in the training split.
        width: of the embeddings.
        temperature: of the scores.
        momentum: share of a row that stays when its sample is seen.
    """

    same_everywhere = True  # every process sees the whole batch; the banks need not be sent around

    def __init__(self, student_width: int, teacher_width: int, size: int, *, width: int = 128,
                 temperature: float = 0.07, momentum: float = 0.5) -> None:  # fmt: skip
        super().__init__()
        self.size, self.temperature, self.momentum = size, temperature, momentum
        self.embed_student, self.embed_teacher = nn.Linear(student_width, width), nn.Linear(teacher_width, width)
        bound = 1 / math.sqrt(width / 3)
        for name in ("student_bank", "teacher_bank"):
            self.register_buffer(name, torch.empty(size, width).uniform_(-bound, bound))
        for name in ("student_z", "teacher_z"):
            self.register_buffer(name, torch.tensor(-1.0))

    student_bank: Tensor
    teacher_bank: Tensor
    student_z: Tensor
    teacher_z: Tensor

    def forward(self, student: Tensor, teacher: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores ``[B, 1 + K]`` of both sides, and the embeddings to `update` the banks with.

        Args:
            student, teacher: features ``[B, D]``.
            rows: ``[B, 1 + K]``: the sample itself, then its negatives.
        """
        ours, theirs = (F.normalize(layer(f), dim=1) for layer, f in
                        ((self.embed_student, student), (self.embed_teacher, teacher.detach())))  # fmt: skip
        scores = [self._scores(anchor, bank, rows) for anchor, bank in
                  ((ours, self.teacher_bank), (theirs, self.student_bank))]  # fmt: skip
        z = self._normalizers(scores)
        return scores[0] / z[0], scores[1] / z[1], ours, theirs

    @torch.no_grad()
    def _normalizers(self, scores: Sequence[Tensor]) -> list[Tensor]:
        """The constants; estimated from these scores where there are none yet, and kept if this is training."""
        found = []
        for z, score in ((self.student_z, scores[0]), (self.teacher_z, scores[1])):
            found.append(torch.where(z < 0, score.mean() * self.size, z))  # a branch would wait for the device
            if self.training:
                z.copy_(found[-1])
        return found

    def _scores(self, anchors: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
        candidates = bank[rows].detach()
        return torch.bmm(candidates, anchors[:, :, None]).squeeze(2).div(self.temperature).exp()

    @torch.no_grad()
    def update(self, ours: Tensor, theirs: Tensor, index: Tensor) -> None:
        """Move the rows of these samples towards their embeddings."""
        for bank, new in ((self.student_bank, ours), (self.teacher_bank, theirs)):
            mixed = self.momentum * bank[index] + (1 - self.momentum) * new
            bank[index] = F.normalize(mixed, dim=1)


class Discriminator(nn.Module):
    """Scores segmentation maps together with their image, for the holistic term of structured distillation.

    Fully convolutional, with self-attention between its last layers. Source: Liu et al. 2019, section 3.3 (arXiv
    1903.04197).

    Args:
        channels_in: classes plus channels of the image.
        width: channels of the first layer.
    """

    def __init__(self, channels_in: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for ins, outs in itertools.pairwise([channels_in, width, 2 * width, 4 * width]):
            layers += [nn.Conv2d(ins, outs, 4, stride=2, padding=1), nn.LeakyReLU(0.1)]
        deep = 4 * width
        layers += [SelfAttention(deep), nn.Conv2d(deep, deep, 3, padding=1), nn.LeakyReLU(0.1), SelfAttention(deep)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(deep, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """``[B, Ch, H, W]``, at least 8 pixels each way, to ``[B]``."""
        score: Tensor = self.layers(maps).mean((1, 2, 3))
        return score


class SelfAttention(nn.Module):
    """Self-attention over positions with a residual gate that starts closed (Zhang et al. 2019, SAGAN, section 3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value, self.gate = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, Ch, H, W]`` to the same shape."""
        attention = torch.bmm(self.query(x).flatten(2).transpose(1, 2), self.key(x).flatten(2)).softmax(dim=2)
        mixed = torch.bmm(self.value(x).flatten(2), attention.transpose(1, 2)).view_as(x)
        out: Tensor = x + self.gate * mixed
        return out


def generation_mask(draw: Tensor, share: float, kind: str) -> Tensor:
    """What MGD keeps (1) and masks (0), from a uniform draw.

    Args:
        draw: ``[B, 1, H, W]`` for kind ``"dense"``, ``[B, Ch, 1, 1]`` for ``"cls"``.
        share: lambda, the share that is masked.
        kind: which positions, or which channels, are masked: ``u > 1 - lambda`` or ``u < lambda``.

    Raises:
        ValueError: if `kind` is unknown or `share` is not in [0, 1].
    """
    if kind not in ("cls", "dense") or not 0 <= share <= 1:
        raise ValueError(f"the kind is 'cls' or 'dense' and the share in [0, 1], not {kind!r} and {share}")
    masked = draw > 1 - share if kind == "dense" else draw < share
    return (~masked).to(draw.dtype)
