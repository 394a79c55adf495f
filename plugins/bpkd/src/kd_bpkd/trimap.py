"""Quality at the contours: the usual metrics, measured in a band around the borders of the labels only.

Source: Kohli et al. 2009, "Robust Higher Order Potentials for Enforcing Label Consistency", IJCV 82.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdcore import DataModule, Model
from kdcore.data import IGNORE, to_device
from kdcore.metrics import Metrics


def trimap(labels: Tensor, width: int = 7) -> Tensor:
    """The labels inside the band; everything outside is ignored.

    The band are the pixels in whose `width` x `width` window there are several classes and no ignored pixel: where
    `functional.edge_mask` has an edge of any class.

    Args:
        labels: class indices `[B, H, W]`; -100 does not count.
        width: side of the window in pixels, odd.

    Returns:
        `[B, H, W]`.

    Raises:
        ValueError: if `width` is not odd and positive.
    """
    if width < 1 or width % 2 == 0:
        raise ValueError(f"the width of the band must be odd and positive, not {width}")
    values = labels.float()
    highest, lowest = _highest(values, width), -_highest(-values, width)
    return labels.where((highest != lowest) & (lowest != IGNORE), IGNORE)


@torch.no_grad()
def trimap_scores(
    model: Model, data: DataModule, split: str = "val", *, width: int = 7, batch_size: int = 16
) -> dict[str, float]:
    """`miou` and `pixel-accuracy` inside the band, over a split.

    Args:
        model: gives logits `[B, C, h, w]`; put into evaluation mode.
        data: of a segmentation.
        split: which split.
        width: side of the window that makes the band, in pixels, odd.
        batch_size: images at a time.

    Raises:
        ValueError: if `width` is not odd and positive.
    """
    device = next(model.parameters()).device
    metrics = Metrics(data.task, ("miou", "pixel-accuracy"), device)
    model.eval()
    for batch in data.eval_loader(split, batch_size):
        batch = to_device(batch, device)
        metrics.update(model(batch), {**batch, "mask": trimap(batch["mask"], width)})
    return metrics.compute()


def _highest(values: Tensor, width: int) -> Tensor:
    """The maximum over the window around each pixel of `[B, H, W]`."""
    return F.max_pool2d(values, width, stride=1, padding=width // 2)
