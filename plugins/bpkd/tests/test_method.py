import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_bpkd.functional import bpkd, edge_mask
from kd_bpkd.losses import BPKD
from kd_bpkd.options import BPKDLossOptions
from kd_bpkd.trimap import trimap, trimap_scores
from kdcore import Model, Outputs, api
from kdcore.data import IGNORE, DataModule, Task
from kdcore.errors import DataError, ModelError, RecipeError
from kdcore.losses import Progress, count_samples
from kdcore.testing import effect

CLASSES, SIZE = 3, 16
SHORT = ["train.steps=2", "train.log_every=1", "teachers.teacher.train.epochs=0.04", "data.train=40", "data.test=20"]


class Net(nn.Module):
    """A segmenter of any stride, with an auxiliary head or without."""

    def __init__(self, stride: int, aux: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 8, stride, stride)
        self.head = nn.Conv2d(8, CLASSES, 1)
        self.aux = nn.Conv2d(8, CLASSES, 1) if aux else None

    def forward(self, image: torch.Tensor) -> Outputs:
        hidden = self.encoder(image).relu()
        return Outputs(self.head(hidden), extras={"aux_logits": self.aux(hidden)} if self.aux else {})


def blocks(count: int = 8) -> DataModule:
    """Images whose brightness tells the class of each 5x5 block; the first row of pixels has no label."""
    mask = torch.randint(CLASSES, (count, 4, 4), generator=torch.Generator().manual_seed(0))
    mask = mask.repeat_interleave(5, 1).repeat_interleave(5, 2)[:, :SIZE, :SIZE].contiguous()
    image = (mask / CLASSES)[:, None].expand(-1, 3, -1, -1)
    mask[:, 0] = IGNORE
    samples = [{"image": i, "mask": m} for i, m in zip(image, mask, strict=True)]
    return DataModule(
        {"train": samples, "val": samples}, Task("segmentation", num_classes=CLASSES, image=(3, SIZE, SIZE))
    )


def example(count: int = 4, stride: int = 4) -> tuple[Outputs, Outputs, dict[str, torch.Tensor]]:
    """Outputs of a student of stride 4 and of a teacher, and their batch."""
    batch = blocks().sample("train", count)
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(count, CLASSES, SIZE // s, SIZE // s, generator=generator) for s in (4, stride))
    return Outputs(student), Outputs(teacher), batch


def rows(path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line["terms"] for line in lines if line["stage"] == "distill" and "terms" in line]


def distill(
    path, student: nn.Module, teacher: nn.Module, data: DataModule | None = None, **options
) -> list[dict[str, float]]:
    train = {"steps": 1, "batch_size": 4}
    api.distill(teacher, student, data or blocks(), "bpkd", train=train, run_dir=path, **options)
    return rows(path)


def test_run_logs_the_weighted_terms(tmp_path):
    api.run("bpkd", SHORT, run_dir=tmp_path)
    found = rows(tmp_path)
    assert [set(terms) for terms in found] == [{"cross-entropy", "bpkd/edge", "bpkd/body"}] * 2
    assert all(value > 0 for terms in found for value in terms.values())


def test_ablation_is_cross_entropy_alone(tmp_path):
    (terms,) = distill(tmp_path, Net(4), Net(4), lambda_edge=0, lambda_body=0)
    assert terms.pop("cross-entropy") > 0
    assert terms == {"bpkd/edge": 0, "bpkd/body": 0}


def test_auxiliary_head_learns_the_labels_with_its_weight(tmp_path):
    student = Net(4, aux=True)
    student.aux.load_state_dict(student.head.state_dict())
    (terms,) = distill(tmp_path, student, Net(4))
    assert terms["auxiliary"] == pytest.approx(0.4 * terms["cross-entropy"])


def test_weights_enter_the_terms():
    inputs = example()
    plain = bpkd(inputs[0].logits, inputs[1].logits, inputs[2]["mask"], ignore_index=IGNORE, width=5, alpha=3.0)
    found = BPKD(BPKDLossOptions(edge_width=5, alpha=3.0))(*inputs)
    torch.testing.assert_close(found, {"edge": 50 * plain["edge"], "body": 20 * plain["body"]})


@pytest.mark.parametrize("post_mask", [True, False])
def test_ignored_pixels_do_not_count(post_mask):
    student, teacher, batch = example()
    batch["mask"][:, 4:12] = IGNORE
    loss = BPKD(BPKDLossOptions(post_mask=post_mask, edge_width=3))
    changed = Outputs(student.logits.clone())
    changed.logits[:, :, 1:3] += torch.randn(4, CLASSES, 2, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss(changed, teacher, batch), loss(student, teacher, batch))
    changed.logits[:, :, 3] += torch.arange(CLASSES)[:, None]
    assert loss(changed, teacher, batch)["edge"] != loss(student, teacher, batch)["edge"]


@pytest.mark.parametrize("options", [{}, {"post_mask": False}, {"edge_norm": "total"}])
def test_terms_of_parts_combine_to_those_of_the_whole(options):
    student, teacher, batch = example()
    batch["mask"][0, :12] = IGNORE
    loss = BPKD(BPKDLossOptions(**options))
    assert loss.count(batch) == count_samples(batch) == 4
    whole = loss(student, teacher, batch)
    parts = []
    for part in (slice(0, 1), slice(1, 4)):
        inputs = {key: value[part] for key, value in batch.items()}
        terms = loss(Outputs(student.logits[part]), Outputs(teacher.logits[part]), inputs)
        parts.append({name: value * loss.count(inputs) / 4 for name, value in terms.items()})
    torch.testing.assert_close({name: parts[0][name] + parts[1][name] for name in whole}, whole)


@pytest.mark.parametrize("align_corners", [True, False])
def test_teacher_of_another_stride_is_resized(align_corners):
    student, teacher, batch = example(stride=8)
    resized = F.interpolate(teacher.logits, (4, 4), mode="bilinear", align_corners=align_corners)
    loss = BPKD(BPKDLossOptions(align_corners=align_corners))
    torch.testing.assert_close(loss(student, teacher, batch), loss(student, Outputs(resized), batch))


def test_teacher_of_another_stride_distils(tmp_path):
    (terms,) = distill(tmp_path, Net(4), Net(2))
    assert min(terms.values()) > 0


def test_edge_weight_rises_over_the_ramp_and_the_body_weight_does_not():
    inputs = example()
    full = BPKD()(*inputs)
    loss = BPKD(BPKDLossOptions(ramp=0.5))
    for fraction, factor in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.75, 1.0)):
        loss.progress = Progress(fraction=fraction)
        torch.testing.assert_close(loss(*inputs), {"edge": factor * full["edge"], "body": full["body"]})


def test_trimap_keeps_the_labels_where_there_is_an_edge():
    labels = blocks().sample("train", 4)["mask"]
    band = edge_mask(labels, CLASSES, (SIZE, SIZE), width=3, ignore_index=IGNORE).any(1)
    assert torch.equal(trimap(labels, 3), labels.where(band, IGNORE))
    assert 0.2 < band.float().mean() < 0.9


def test_trimap_scores_see_the_band_only():
    data = blocks()
    right = F.one_hot(torch.stack([s["mask"] for s in data["val"]]).clamp(min=0), CLASSES).movedim(-1, 1).float()
    outside = (trimap(torch.stack([s["mask"] for s in data["val"]]), 3) == IGNORE)[:, None]
    wrong_outside = right.where(~outside, right.roll(1, 1))
    net = nn.Conv2d(3, CLASSES, 1)
    model = Model(net, call=lambda net, batch: wrong_outside[batch["index"]])
    assert trimap_scores(model, data, width=3, batch_size=3) == {"miou": 1.0, "pixel-accuracy": 1.0}
    assert trimap_scores(model, data, width=5)["pixel-accuracy"] < 1.0
    with pytest.raises(ValueError, match="odd"):
        trimap_scores(model, data, width=4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("edge_width=4", "edge_width.*odd"),
        ("temperature=0", "temperature"),
        ("lambda_edge=-1", "lambda_edge"),
        ("alpha=[1,-1]", "alpha"),
        ("edge_norm=per_image", "edge_norm"),
        ("ramp=2", "ramp"),
        ("lambda=1", "lambda.*lambda_edge"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(override, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("bpkd", [f"method.{override}"])


def test_alpha_needs_a_weight_for_every_class(tmp_path):
    with pytest.raises(ModelError, match=r"one per class \(3\)"):
        distill(tmp_path, Net(4), Net(4), alpha=[1.0, 2.0])


def test_data_without_pixel_labels_are_refused(tmp_path):
    samples = [(torch.rand(3, SIZE, SIZE), 1)] * 4
    with pytest.raises(DataError, match="segmentation"):
        distill(tmp_path, Net(4), Net(4), DataModule({"train": samples}, Task("classification", num_classes=CLASSES)))
    student, teacher, batch = example()
    with pytest.raises(DataError, match="`mask`"):
        BPKD()(student, teacher, {"index": batch["index"]})


def test_paper_recipe_runs_on_a_local_copy_with_tiny_models(tmp_path):
    transformers, datasets = pytest.importorskip("transformers"), pytest.importorskip("datasets")
    pytest.importorskip("kd_transformers")
    pytest.importorskip("kd_datasets")
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        image, mask = (torch.randint(0, 151, (4, 64, 48, c), generator=generator).byte().numpy() for c in (3, 1))
        columns = {
            "image": [Image.fromarray(i) for i in image],
            "annotation": [Image.fromarray(m[..., 0]) for m in mask],
        }
        features = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
        (tmp_path / "ade20k" / split).mkdir(parents=True)
        datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "ade20k" / split / "0000.parquet")
    for role, width in (("teacher", 16), ("student", 8)):
        config = transformers.SegformerConfig(
            num_labels=150,
            depths=[1] * 4,
            hidden_sizes=[width] * 4,
            num_attention_heads=[1] * 4,
            decoder_hidden_size=width,
        )
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / role)
    api.run("bpkd/paper", [
        *(f"{role}s.{role}.model={tmp_path / role}" for role in ("teacher", "student")),
        f"data.path={tmp_path / 'ade20k'}", "data.name=null", "data.size=64", "train.steps=2", "train.batch_size=2",
        "train.workers=0", "train.log_every=1",
    ], run_dir=tmp_path / "run")  # fmt: skip
    assert all(set(terms) == {"cross-entropy", "bpkd/edge", "bpkd/body"} for terms in rows(tmp_path / "run"))
    transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "run" / "student")


def test_distilled_students_beat_students_of_the_labels_alone(tmp_path):
    assert effect("bpkd", tmp_path, seeds=(0, 1, 2)) > 0.03  # measured: 0.057
