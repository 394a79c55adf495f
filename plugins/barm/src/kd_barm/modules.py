"""The head that grows: optional ASPP, and a branch with a classifier for each step.

Sources: Zhang and Gao 2024 (arXiv 2407.09838) for the branches; Chen et al. 2017, "Rethinking Atrous Convolution for
Semantic Image Segmentation" (arXiv 1706.05587) for ASPP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

DROPOUT = 0.1
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: a 1x1 convolution, a dilated 3x3 one for each rate and the mean of the image side
    by side, then projected: `[B, D, h, w]` to `[B, channels, h, w]`."""

    def __init__(self, in_channels: int, channels: int, rates: Sequence[int]) -> None:
        super().__init__()
        local = [conv_bn_relu(in_channels, channels, 1)]
        local += [conv_bn_relu(in_channels, channels, 3, rate) for rate in rates]
        self.local = nn.ModuleList(local)
        self.whole = conv_bn_relu(in_channels, channels, 1)
        self.project = nn.Sequential(conv_bn_relu((len(rates) + 2) * channels, channels, 1), nn.Dropout(DROPOUT))

    def forward(self, features: Tensor) -> Tensor:
        """The pooled map."""
        whole = self.whole(features.mean((2, 3), keepdim=True)).expand(-1, -1, *features.shape[-2:])
        pooled: Tensor = self.project(torch.cat([*(branch(features) for branch in self.local), whole], 1))
        return pooled


class BackgroundResidualHead(nn.Module):
    """A branch (3x3 convolution, batch norm, ReLU) and a classifier (1x1 convolution) for every step.

    Args:
        in_channels: of the map that it reads.
        channels: of ASPP and the branches.
        num_classes: `[1, n_0, n_1, ...]`: the background, then the new classes of each step so far.
        rates: dilations of ASPP; none for no ASPP.
    """

    def __init__(self, in_channels: int, channels: int, num_classes: Sequence[int], rates: Sequence[int] = ()) -> None:
        super().__init__()
        self.config = {"in_channels": in_channels, "channels": channels, "rates": list(rates)}
        self.num_classes = [1]
        self.aspp: nn.Module = ASPP(in_channels, channels, rates) if rates else nn.Identity()
        self._width = channels if rates else in_channels
        self._channels = channels
        self.branches = nn.ModuleList()
        self.classifiers = nn.ModuleList()
        initialise(self.aspp)
        for count in num_classes[1:]:
            self._add(count)

    def forward(self, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Raw logits of each group `[B, 1 + n_k, h, w]`, and the branch features `[B, channels, h, w]` they read."""
        pooled = self.aspp(features)
        read = [branch(pooled) for branch in self.branches]
        return [classifier(branch) for classifier, branch in zip(self.classifiers, read, strict=True)], read

    def grow(self, count: int, copy_statistics: bool = False) -> None:
        """Add a branch and a classifier for `count` new classes. The branch starts as a copy of the first one, except
        for the running statistics of its batch norm, unless these are asked for too."""
        self._add(count)
        kept = () if copy_statistics else STATISTICS
        first = {name: value for name, value in self.branches[0].state_dict().items() if not name.endswith(kept)}
        self.branches[-1].load_state_dict(first, strict=False)

    def _add(self, count: int) -> None:
        self.num_classes.append(count)
        self.branches.append(initialise(conv_bn_relu(self._width, self._channels, 3)))
        self.classifiers.append(initialise(nn.Conv2d(self._channels, 1 + count, 1)))


def conv_bn_relu(in_channels: int, channels: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """A convolution that keeps the size, batch norm and ReLU."""
    padding = dilation * (kernel // 2)
    conv = nn.Conv2d(in_channels, channels, kernel, padding=padding, dilation=dilation, bias=False)
    return nn.Sequential(conv, PooledBatchNorm(channels), nn.ReLU())


class PooledBatchNorm(nn.BatchNorm2d):
    """Batch norm that takes a batch of one value per channel as it is: the mean of one image, in the pooling of ASPP,
    which torch refuses to normalise in training."""

    def forward(self, input: Tensor) -> Tensor:
        """The normalised map; by the running statistics where there is one value alone."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)
        return super().forward(input)


def initialise(module: nn.Module) -> nn.Module:
    """Weights of every convolution after He et al. 2015; batch norms start at 1 and 0 by themselves."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    return module


def freeze_batch_norms(module: nn.Module) -> None:
    """Stored statistics from now on, and no gradient for scale and shift; `train()` undoes the first."""
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.eval()
            part.requires_grad_(False)
