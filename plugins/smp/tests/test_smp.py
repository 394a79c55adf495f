"""Networks of segmentation_models_pytorch as models, and pictures of what they predict."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from PIL import Image

import kdcore
from kd_smp import overlays
from kd_smp.models import published_weights, segmenter
from kd_smp.options import SMPOptions, SMPTeacherOptions
from kdcore import PluginManager
from kdcore.data import IGNORE, Task
from kdcore.errors import ModelError

CLASSES = ("sky", "road", "tree")
TASK = Task("segmentation", CLASSES, image=(3, 64, 64))
PAIRS = [
    ("deeplabv3plus", "resnet18"),
    ("deeplabv3plus", "mobilenetv2_100"),
    ("pspnet", "resnet18d"),
    ("fpn", "mit_b0"),
]


def build(arch="fpn", encoder="resnet18", task=TASK, **options):
    torch.manual_seed(0)
    return segmenter(SMPOptions(arch=arch, encoder=encoder, **options), task).eval()


def images(*size):
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))


def test_the_plugin_loads_without_torch_and_offers_a_teacher_and_a_student():
    code = """
        import sys
        import kd_smp.plugin as p, kd_smp.options
        assert not {"torch", "timm", "segmentation_models_pytorch", "matplotlib"} & set(sys.modules)
        print([c.kind for c in (*p.kd_register_teachers(), *p.kd_register_students())])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.strip() == "['teacher', 'student']", done.stderr
    assert PluginManager().get("teacher", "smp").load_options() is SMPTeacherOptions


@pytest.mark.parametrize(("arch", "encoder"), PAIRS)
def test_logits_are_the_librarys_own_at_the_size_of_the_image(arch, encoder):
    model = build(arch, encoder)
    network, image = model.module, images(64, 96)
    with torch.no_grad():
        expected = network((image - network.input_mean) / network.input_std)
        assert torch.equal(model({"image": image}).logits, expected)
        assert model({"image": images(70, 45)}).logits.shape == (2, 3, 70, 45)


def test_an_image_of_any_size_is_seen_as_if_grey_went_on_beside_it():
    model = build()
    image = images(70, 64)
    filled = torch.nn.functional.pad(image - model.module.input_mean, (0, 0, 0, 26)) + model.module.input_mean
    with torch.no_grad():
        found, wanted = model({"image": image}).logits, model({"image": filled}).logits[..., :70, :]
    torch.testing.assert_close(found, wanted)


def test_logits_at_the_decoders_stride_are_cut_in_proportion():
    model = build("deeplabv3plus", settings={"upsampling": 1})
    with torch.no_grad():
        assert model({"image": images(72, 64)}).logits.shape == (2, 3, 18, 16)


@pytest.mark.parametrize(("arch", "encoder"), PAIRS)
def test_every_stage_can_be_tapped_and_gets_a_gradient(arch, encoder):
    model = build(arch, encoder)
    model.tap("@all", "decoder")
    outputs = model({"image": images(64, 64)})
    assert list(outputs.features) == [*model.stages, "decoder"]
    assert len(model.stages) >= 2
    last = outputs.features["decoder"]
    assert torch.autograd.grad(last.sum(), next(model.module.encoder.parameters()))[0].abs().sum() > 0


@pytest.mark.parametrize(("arch", "encoder"), PAIRS)
def test_a_saved_student_loads_with_the_library_alone_and_is_the_same(arch, encoder, tmp_path):
    model = build(arch, encoder, settings={"decoder_channels": 32} if arch.startswith("deep") else {})
    model.save(tmp_path)
    network = smp.from_pretrained(str(tmp_path)).eval()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_classes"] == list(CLASSES)
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) for key in ("_mean", "_std"))
    image = images(64, 64)
    again = build(arch, encoder, checkpoint=str(tmp_path))
    assert again.labels.names == CLASSES
    with torch.no_grad():
        wanted = model({"image": image}).logits
        torch.testing.assert_close(network((image - mean) / std), wanted)
        assert torch.equal(again({"image": image}).logits, wanted)


def test_what_cannot_be_built_is_refused_with_the_way_out(tmp_path):
    build().save(tmp_path / "fpn")
    four = Task("segmentation", (*CLASSES, "car"), image=(3, 64, 64))
    for options, task, message in (
        ({"encoder": "resnet81"}, TASK, "resnet18"),
        ({"settings": {"decoder_chanels": 8}}, TASK, "no.* 'decoder_chanels'"),
        ({"settings": {"classes": 8}}, TASK, "'classes'"),
        ({"arch": "deeplabv3plus", "encoder": "pvt_v2_b0"}, TASK, "cannot be built over 'pvt_v2_b0'"),
        ({"checkpoint": str(tmp_path / "nothing")}, TASK, "no config.json"),
        ({"checkpoint": str(tmp_path / "fpn"), "encoder": "resnet34"}, TASK, "set `arch: fpn` and `encoder: resnet18`"),
        ({"checkpoint": str(tmp_path / "fpn")}, four, "has 3 classes, the data has 4"),
        ({}, Task("classification", CLASSES, image=(3, 64, 64)), "segment images"),
    ):
        with pytest.raises(ModelError, match=message):
            build(task=task, **options)


def test_downloads_name_the_backbones_weights_and_no_local_ones():
    [found] = SMPTeacherOptions(encoder="resnet18").downloads()
    assert found.name == "smp-hub/resnet18.imagenet"
    assert 44e6 < found.size < 46e6
    assert published_weights("mit_b0")[0].name == "smp-hub/mit_b0.imagenet"
    [found] = published_weights("mobilenetv2_100")
    assert "mobilenetv2" in found.name
    assert found.size > 1e6
    assert SMPOptions(encoder="resnet18").downloads() == []
    assert SMPTeacherOptions(encoder="resnet18", checkpoint="here").downloads() == []


def test_a_run_is_pictured_with_labels_teacher_and_student(tmp_path):
    recipe = {
        "method": "distill",
        "teacher": {"use": "smp", "arch": "fpn", "pretrained": False},
        "student": {"use": "demo-segmenter"},
        "data": {"use": "shapes", "train": 8, "val": 6},
        "losses": ["cross-entropy", "kd"],
        "train": {"steps": 1, "batch_size": 4},
        "eval": {"metrics": ["miou", "boundary-f1", "class-iou"]},
        "trackers": [],
    }
    result = kdcore.run(recipe, run_dir=tmp_path / "run")
    assert "samples.png" in (tmp_path / "run" / "README.md").read_text()
    picture = Image.open(tmp_path / "run" / "samples.png")
    assert picture.width > picture.height / 2
    assert len([name for name in result.metrics if name.startswith("val/class-iou/")]) >= 2


def test_classes_are_laid_over_the_picture_and_ignored_pixels_are_left():
    picture = np.full((2, 3, 3), 0.5)
    labels = torch.tensor([[0, 1, IGNORE], [1, 1, 0]])
    colours = np.array([[1.0, 0, 0], [0, 1, 0]])
    found = overlays._over(picture, labels, colours)
    assert np.array_equal(found[0, 2], [0.5] * 3)
    assert np.array_equal(found[0, 0], found[1, 2])
    assert found[0, 0, 0] > found[0, 0, 1]
    assert found[0, 1, 1] > found[0, 1, 0]
    larger = overlays._over(picture, torch.zeros(4, 6, dtype=torch.long), colours)
    assert larger.shape == (4, 6, 3)
