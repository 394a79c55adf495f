import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_acam_kd.losses import ACAM
from kd_acam_kd.options import ACAMLossOptions
from kdcore import Model, Outputs, api
from kdcore.data import DataModule, Task
from kdcore.errors import DataError, ModelError, RecipeError
from kdcore.losses import Weighted
from kdcore.stages import Distill
from kdcore.testing import effect

CLASSES, SIZE = 3, 16
SHORT = ["train.steps=2", "train.log_every=1", "teachers.teacher.train.epochs=0.04", "data.train=40", "data.test=20"]


class Net(nn.Module):
    """A segmenter of any stride and width, with an auxiliary head or without."""

    def __init__(self, stride: int, width: int = 8, aux: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, width, stride, stride)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flat = nn.Flatten()
        self.head = nn.Conv2d(width, CLASSES, 1)
        self.aux = nn.Conv2d(width, CLASSES, 1) if aux else None

    def forward(self, image: torch.Tensor) -> Outputs:
        hidden = self.encoder(image).relu()
        self.flat(self.pool(hidden))
        return Outputs(self.head(hidden), extras={"aux_logits": self.aux(hidden)} if self.aux else {})


def blocks(count: int = 8) -> DataModule:
    """Images whose brightness tells the class of each 4x4 block."""
    mask = torch.randint(CLASSES, (count, 4, 4), generator=torch.Generator().manual_seed(0))
    mask = mask.repeat_interleave(4, 1).repeat_interleave(4, 2)
    image = (mask / CLASSES)[:, None].expand(-1, 3, -1, -1)
    samples = [{"image": i, "mask": m} for i, m in zip(image, mask, strict=True)]
    task = Task("segmentation", num_classes=CLASSES, image=(3, SIZE, SIZE))
    return DataModule({"train": samples, "val": samples}, task)


def rows(path) -> list[dict]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == "distill"]


def distill(path, student: nn.Module, teacher: nn.Module, data: DataModule | None = None, steps: int = 1, **options):
    """The terms of each step."""
    train = {"steps": steps, "batch_size": 4, "log_every": 1, "optimizer": {"name": "adamw", "lr": 1e-2}}
    api.distill(teacher, student, data or blocks(), "acam-kd", train=train, run_dir=path, **options)
    return [row["terms"] for row in rows(path) if "terms" in row]


def test_run_logs_the_terms_and_the_means_of_the_masks(tmp_path):
    api.run("acam-kd", SHORT, run_dir=tmp_path)
    terms = [row["terms"] for row in rows(tmp_path) if "terms" in row]
    assert [set(t) for t in terms] == [
        {"cross-entropy", *(f"acam-kd/{t}" for t in ("channel", "spatial", "diversity"))}
    ] * 2
    means = [row["metrics"] for row in rows(tmp_path) if "mask/channel" in row.get("metrics", {})]
    assert len(means) == 2
    assert all(0.4 < value < 0.6 for mean in means for value in (mean["mask/channel"], mean["mask/spatial"]))


def test_ablation_is_cross_entropy_alone(tmp_path):
    (terms,) = distill(tmp_path, Net(4), Net(4), alpha=0, lambda_div=0)
    assert terms.pop("cross-entropy") > 0
    assert set(terms.values()) == {0}


def test_auxiliary_head_learns_the_labels_with_its_weight(tmp_path):
    student = Net(4, aux=True)
    student.aux.load_state_dict(student.head.state_dict())
    (terms,) = distill(tmp_path, student, Net(4))
    assert terms["auxiliary"] == pytest.approx(0.4 * terms["cross-entropy"])


@pytest.mark.parametrize(
    "levels",
    [
        {"levels": ["logits", "encoder"]},
        {"levels": ["encoder"]},
        {"levels": ["encoder", "logits"], "teacher_levels": ["encoder", "logits"]},
    ],
)
def test_levels_of_other_widths_and_strides(tmp_path, levels):
    student = Net(4, width=6)
    parameters = {name: value.clone() for name, value in student.state_dict().items()}
    (terms,) = distill(tmp_path, student, Net(2, width=12), **levels)
    assert min(terms.values()) > 0
    assert any((value != parameters[name]).any() for name, value in student.state_dict().items())
    assert student.state_dict().keys() == parameters.keys()


def test_student_follows_the_teacher_and_plain_training_does_not(tmp_path):
    torch.manual_seed(0)
    teacher, start, data = Net(4, width=12), Net(4).state_dict(), blocks()
    distances = {}
    for name, options in (("alone", {"alpha": 0, "lambda_div": 0}), ("distilled", {})):
        student = Net(4)
        student.load_state_dict(start)
        distill(tmp_path / name, student, teacher, data, steps=60, **options)
        image = torch.stack([sample["image"] for sample in data["val"]])
        with torch.no_grad():
            distances[name] = F.mse_loss(student(image).logits, teacher(image).logits).item()
    assert distances["distilled"] < 0.7 * distances["alone"]


def test_other_counts_of_levels_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"student has 1 \(logits\) and the teacher 2 \(logits, encoder\)"):
        distill(tmp_path, Net(4), Net(4), levels=["logits"], teacher_levels=["logits", "encoder"])


def test_levels_that_are_no_map_or_not_there_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"student's level flat: gives \[\d, 8\].*name other levels"):
        distill(tmp_path / "a", Net(4), Net(4), levels=["flat"])
    with pytest.raises(ModelError, match=r"encoderr.*did you mean 'encoder'"):
        distill(tmp_path / "b", Net(4), Net(4), levels=["encoderr"])


def test_classes_that_there_are_not_are_refused(tmp_path):
    data = blocks()
    data["train"][3]["mask"][0, 0] = CLASSES
    with pytest.raises(DataError, match=str(CLASSES)):
        distill(tmp_path, Net(4), Net(4), data, steps=4)


def test_teacher_of_other_classes_is_refused(tmp_path):
    teacher = Net(4)
    teacher.head = nn.Conv2d(8, CLASSES + 1, 1)
    with pytest.raises(ModelError, match="classes"):
        distill(tmp_path, Net(4), teacher)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("levels=[]", "levels"),
        ("masks=[spatial,spatial]", "masks.*twice"),
        ("masks=[rows]", "masks"),
        ("num_masks=1", "num_masks"),
        ("alpha=-1", "alpha"),
        ("qk_ratio=0", "qk_ratio"),
        ("max_tokens=0", "max_tokens"),
        ("mask_grad=none", "mask_grad"),
        ("lambda=1", "lambda.*lambda_div"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(override, message):
    with pytest.raises(RecipeError, match=message):
        api.plan("acam-kd", [f"method.{override}"])


def test_data_without_pixel_labels_are_refused(tmp_path):
    samples = [(torch.rand(3, SIZE, SIZE), 1)] * 4
    with pytest.raises(DataError, match=r"kind 'classification'.*method: distill"):
        distill(tmp_path, Net(4), Net(4), DataModule({"train": samples}, Task("classification", num_classes=CLASSES)))


def detector(width: int) -> Model:
    """A tiny RT-DETR, whose encoder is a pyramid of maps of this width."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[8, 8, 16], encoder_hidden_dim=width, d_model=width,
        decoder_in_channels=[width] * 3, encoder_ffn_dim=16, decoder_ffn_dim=16, decoder_layers=1, num_queries=5,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    net = transformers.RTDetrForObjectDetection(config)
    return Model(net, lambda net, batch: Outputs(extras={"found": net(pixel_values=batch["image"])}))


def test_loss_takes_the_maps_of_a_detector():
    loss = ACAM(ACAMLossOptions(levels=["model.encoder.pan_blocks.?"]))
    student = detector(16)
    stage = Distill(student, [Weighted(loss, name="acam-kd")], detector(32))
    batch = {"image": torch.rand(2, 3, 128, 128), "index": torch.arange(2)}
    stage.prepare(batch)
    sum(stage(batch).values()).backward()
    assert [len(level.selection.units["spatial"]) for level in loss.levels] == [6, 6]
    (first,) = (p for name, p in student.module.named_parameters() if name == "model.encoder_input_proj.0.0.weight")
    assert first.grad.abs().max() > 0


def test_paper_recipe_runs_on_local_pictures_with_tiny_models(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("kd_transformers")
    pytest.importorskip("kd_datasets")
    from PIL import Image

    generator, table = torch.Generator().manual_seed(0), ["image,mask"]
    for i in range(4):
        image, mask = (torch.randint(0, 19, (32, 64, c), generator=generator).byte().numpy() for c in (3, 1))
        Image.fromarray(image).save(tmp_path / f"image{i}.png")
        Image.fromarray(mask[..., 0]).save(tmp_path / f"mask{i}.png")
        table.append(f"image{i}.png,mask{i}.png")
    (tmp_path / "pictures.csv").write_text("\n".join(table) + "\n")
    for role, width in (("teacher", 16), ("student", 8)):
        config = transformers.SegformerConfig(
            num_labels=19,
            depths=[1] * 4,
            hidden_sizes=[width] * 4,
            num_attention_heads=[1] * 4,
            decoder_hidden_size=width,
        )
        transformers.SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / role)
    api.run("acam-kd/paper", [
        *(f"{role}s.{role}.model={tmp_path / role}" for role in ("teacher", "student")),
        f"data.path={tmp_path / 'pictures.csv'}", "data.splits={train: 'train[:2]', val: 'train[2:]'}",
        "data.size=[64,128]", "train.steps=2", "train.batch_size=2", "train.workers=0", "train.log_every=1",
        "method.max_tokens=64",
    ], run_dir=tmp_path / "run")  # fmt: skip
    terms = [row["terms"] for row in rows(tmp_path / "run") if "terms" in row]
    assert len(terms) == 2
    assert all(min(values.values()) > 0 for values in terms)
    transformers.SegformerForSemanticSegmentation.from_pretrained(tmp_path / "run" / "student")


def test_distilled_students_beat_students_of_the_labels_alone(tmp_path):
    assert effect("acam-kd", tmp_path, seeds=(0, 1, 2)) > 0.01  # measured: 0.021
