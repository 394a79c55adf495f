"""Segmentations measured: by class, by contour, through a window."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kdcore
from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import RecipeError
from kdcore.evaluation import slid
from kdcore.metrics import BoundaryF1, Metrics
from kdcore.models import Outputs
from kdcore.recipe import EvalOptions

NAMES = ("sky", "road", "tree")
TASK = Task("segmentation", NAMES)


def squares(*corners: int, side: int = 20) -> torch.Tensor:
    """Labels `[B, 40, 40]`: a square of class 1 at each corner."""
    found = torch.zeros(len(corners), 40, 40, dtype=torch.long)
    for labels, corner in zip(found, corners, strict=True):
        labels[corner : corner + side, corner : corner + side] = 1
    return found


def measured(names: list[str], predicted: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    metrics = Metrics(TASK, names)
    for row in range(len(target)):
        logits = F.one_hot(predicted[row : row + 1], 3).movedim(-1, 1).float()
        metrics.update(Outputs(logits=logits), {"mask": target[row : row + 1]})
    return metrics.compute()


def test_every_class_that_occurs_has_its_iou_and_their_mean_is_miou():
    target = squares(0, 10)
    predicted = squares(0, 12)
    found = measured(["class-iou", "miou", "mean-accuracy"], predicted, target)
    overlap, union = 400 + 18 * 18, 400 + 2 * 400 - 18 * 18
    assert found["class-iou/road"] == pytest.approx(overlap / union)
    assert "class-iou/tree" not in found
    assert found["miou"] == pytest.approx((found["class-iou/sky"] + found["class-iou/road"]) / 2)
    assert found["mean-accuracy"] == pytest.approx((overlap / 800 + (3200 - 800 - 76) / 2400) / 2)


def test_contours_that_are_met_score_1_and_those_beyond_the_tolerance_0():
    target = squares(10)
    exact = BoundaryF1(2, tolerance=1 / math.hypot(40, 40))
    assert measured(["boundary-f1"], target, target) == {"boundary-f1": 1.0}
    exact.update(squares(11), target)
    assert exact.compute() > 0.5
    exact.reset()
    exact.update(squares(10, side=4), squares(30, side=4))
    assert exact.compute() == 0


def test_a_wide_mistake_inside_leaves_the_contour_score_lower_than_a_blurred_edge():
    target = squares(10)
    hole = target.clone()
    hole[0, 16:24, 16:24] = 0
    grown = squares(9, side=22)
    scores = [measured(["boundary-f1"], predicted, target)["boundary-f1"] for predicted in (hole, grown)]
    assert scores[0] < scores[1]


def test_ignored_pixels_bound_nothing_and_a_flat_image_has_no_contour():
    target = torch.zeros(1, 40, 40, dtype=torch.long)
    assert math.isnan(measured(["boundary-f1"], target, target)["boundary-f1"])
    target[:, :, 20:] = 1
    target[:, :, 18:22] = IGNORE  # all of the border between the two
    assert math.isnan(measured(["boundary-f1"], torch.zeros_like(target), target)["boundary-f1"])


def test_images_weigh_the_same_in_any_batches():
    generator = torch.Generator().manual_seed(0)
    target, predicted = (torch.randint(0, 3, (6, 40, 40), generator=generator) for _ in range(2))
    whole = BoundaryF1(3)
    whole.update(predicted, target)
    assert measured(["boundary-f1"], predicted, target)["boundary-f1"] == pytest.approx(float(whole.compute()))


def pixelwise(batch: dict[str, torch.Tensor]) -> Outputs:
    """Logits that depend on each pixel alone, and on where it stands in what is seen, if that is marked."""
    assert batch["image"].shape[-2:] == batch["mask"].shape[-2:]
    return Outputs(logits=torch.cat([batch["image"], -batch["image"]], 1))


@pytest.mark.parametrize("size", [(16, 16), (17, 40), (9, 8), (8, 8)])
@pytest.mark.parametrize("stride", [None, (3, 8), (8, 8)])
def test_through_a_window_every_pixel_is_seen_and_overlaps_are_averaged(size, stride):
    batch = {"image": torch.rand(2, 1, *size), "mask": torch.zeros(2, *size), "index": torch.arange(2)}
    seen = []

    def watched(part):
        seen.append(tuple(part["image"].shape[-2:]))
        return pixelwise(part)

    found = slid(watched, EvalOptions(window=(8, 8), stride=stride))(batch)
    torch.testing.assert_close(found.logits, pixelwise(batch).logits)
    assert set(seen) == {(8, 8)}


def test_a_window_is_never_larger_than_the_image_and_coarse_logits_are_enlarged():
    batch = {"image": torch.rand(1, 1, 6, 20), "mask": torch.zeros(1, 6, 20)}
    coarse = lambda part: Outputs(logits=F.avg_pool2d(part["image"], 2))  # noqa: E731
    found = slid(coarse, EvalOptions(window=(8, 8)))(batch)
    assert found.logits.shape == (1, 1, 6, 20)


class Position(nn.Module):
    """Says class 1 right of the middle of whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        place = torch.linspace(-1, 1, image.shape[-1]).expand(len(image), 1, *image.shape[-2:])
        return torch.cat([torch.zeros_like(place), self.scale * place], 1)


def test_a_run_is_measured_through_the_window_of_its_recipe(tmp_path):
    mask = torch.zeros(8, 8, dtype=torch.long)
    mask[:, 4:] = 1
    samples = [{"image": torch.rand(3, 8, 8), "mask": mask} for _ in range(4)]
    data = DataModule({"train": samples, "val": samples}, Task("segmentation", ("left", "right"), image=(3, 8, 8)))
    found = {}
    for name, window in (("whole", {}), ("window", {"window": [8, 4], "stride": [8, 4]})):
        result = kdcore.distill(Position(), Position(), data, "distill", losses=[{"use": "kd"}], eval=window, train={
            "steps": 1, "batch_size": 4, "optimizer": {"lr": 1e-9}}, run_dir=tmp_path / name)  # fmt: skip
        found[name] = result.metrics["val/miou"]
    assert found["whole"] == 1.0
    assert found["window"] == pytest.approx(1 / 3, abs=0.01)


def test_windows_that_cannot_be_are_refused():
    for given in ({"stride": (4, 4)}, {"window": (4, 4), "stride": (5, 4)}):
        with pytest.raises(ValueError, match="stride: it belongs to a window"):
            EvalOptions(**given)
    samples = [{"image": torch.rand(3, 8, 8), "label": 0} for _ in range(4)]
    with pytest.raises(RecipeError, match=r"eval\.window.*'classification'"):
        kdcore.distill(None, nn.Flatten(), DataModule({"train": samples}, Task("classification", ("one",))), "distill",
                       eval={"window": [4, 4]}, losses=[{"use": "cross-entropy"}])  # fmt: skip
