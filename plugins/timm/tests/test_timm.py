import json
import os
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kd_timm.models import timm_model
from kd_timm.options import TimmOptions, TimmTeacherOptions
from kdcore import PluginManager, folder
from kdcore.data import Task
from kdcore.errors import ModelError

CLASSES = ("cat", "dog", "owl")
TASK = Task("classification", CLASSES, image=(3, 32, 32))
SMALL = ["resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "test_vit"]
DISTILLED = "deit_tiny_distilled_patch16_224"


def build(name, task=TASK, **options):
    torch.manual_seed(0)
    return timm_model(TimmOptions(model=name, **options), task).eval()


def images(channels=3, side=32):
    return torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def by_hand(image, mean, std):
    return (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def without_core(code, *arguments):
    """Runs code in a process in which kdcore cannot be imported."""
    blocked = "import sys; sys.modules['kdcore'] = None\n" + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", blocked, *map(str, arguments)], capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plugin_loads_without_torch_and_offers_a_teacher_and_a_student():
    code = """
        import sys
        import kd_timm.plugin as p, kd_timm.options
        assert not {"torch", "timm"} & set(sys.modules)
        print([c.kind for c in (*p.kd_register_teachers(), *p.kd_register_students())])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.strip() == "['teacher', 'student']", done.stderr
    manager = PluginManager()
    assert manager.get("teacher", "timm").load_options() is TimmTeacherOptions
    assert manager.get("student", "timm").load_target() is timm_model


@pytest.mark.parametrize("name", [*SMALL, DISTILLED])
def test_logits_are_timms_own_and_the_classifier_makes_them_from_the_embedding(name):
    model = build(name)
    cfg = model.module.pretrained_cfg
    with torch.no_grad():
        outputs = model({"image": images()})
        expected = model.module(by_hand(images(), cfg["mean"], cfg["std"]))
    assert torch.equal(outputs.logits, expected)
    assert outputs.logits.shape == (2, 3)
    if name != DISTILLED:
        head = model.module.get_classifier()
        assert torch.allclose(head(outputs.embedding), outputs.logits, atol=1e-6)


@pytest.mark.parametrize("name", [*SMALL, DISTILLED])
def test_every_stage_can_be_tapped_and_gets_a_gradient(name):
    model = build(name)
    model.tap("@all")
    outputs = model({"image": images()})
    assert list(outputs.features) == list(model.stages)
    last = outputs.features[model.stages[-1]]
    [gradient] = torch.autograd.grad(outputs.logits.square().sum(), last)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_a_distilled_transformer_gives_both_heads_whatever_its_mode(training, pair):
    model = build(DISTILLED).train(training)
    model.module.set_distilled_training(pair)
    outputs = model({"image": images()})
    heads = outputs.extras["cls_logits"], outputs.extras["dist_logits"]
    assert not torch.equal(*heads)
    assert torch.equal(outputs.logits, (heads[0] + heads[1]) / 2)
    assert outputs.embedding.shape == (2, 192)


def test_grey_images_are_normalised_by_the_averaged_mean_and_deviation():
    model = build("resnet10t", Task("classification", CLASSES, image=(1, 32, 32)))
    cfg = model.module.pretrained_cfg
    mean, std = [sum(cfg["mean"]) / 3], [sum(cfg["std"]) / 3]
    with torch.no_grad():
        expected = model.module(by_hand(images(1), mean, std))
        assert torch.equal(model({"image": images(1)}).logits, expected)


def test_the_input_is_resized_to_the_asked_side():
    model = build("test_vit", image_size=64)
    assert model.module.patch_embed.img_size == (64, 64)
    assert model({"image": images()}).logits.shape == (2, 3)


def test_normalisation_is_no_part_of_the_state():
    model = build("resnet10t")
    assert set(model.module.state_dict()) == set(timm.create_model("resnet10t").state_dict())


def test_saved_models_load_in_timm_alone_with_equal_outputs(tmp_path):
    models = {"resnet10t": 1, "vit_tiny_patch16_224": 3, "mobilenetv3_small_050": 3, DISTILLED: 3}
    for name, channels in models.items():
        model = build(name, Task("classification", CLASSES, image=(channels, 32, 32)))
        model.save(tmp_path / name)
        with torch.no_grad():
            logits = model({"image": images(channels)}).logits
        save_file({"image": images(channels), "logits": logits}, tmp_path / f"{name}.safetensors")
    printed = without_core(
        """
        import sys, json, timm, torch
        from safetensors.torch import load_file
        for name in sys.argv[2:]:
            folder = f"{sys.argv[1]}/{name}"
            expected = load_file(f"{folder}.safetensors")
            network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
            cfg = timm.data.resolve_model_data_config(network)
            mean, std = (torch.tensor(cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
            args = json.load(open(f"{folder}/config.json"))["model_args"]
            again = timm.create_model(name, checkpoint_path=f"{folder}/model.safetensors", **args).eval()
            with torch.no_grad():
                for loaded in (network, again):
                    assert torch.equal(loaded((expected["image"] - mean) / std), expected["logits"]), name
            print(network.pretrained_cfg["label_names"], tuple(cfg["input_size"]))
        """,
        tmp_path,
        *models,
    )
    assert printed.splitlines() == [f"{list(CLASSES)} {(channels, 32, 32)}" for channels in models.values()]


@pytest.mark.parametrize("where", ["student", "", "student/model.safetensors", "weights.pth"])
def test_a_checkpoint_comes_back_from_a_folder_a_run_or_a_file(tmp_path, where):
    model = build("test_resnet")
    model.save(tmp_path / "made")
    folder.commit(tmp_path / "made", tmp_path / "student")
    (tmp_path / "run.json").write_text(json.dumps(folder._sealed({"status": "finished"})))
    torch.save({"state_dict": model.module.state_dict()}, tmp_path / "weights.pth")
    options = TimmTeacherOptions(model="test_resnet", checkpoint=str(tmp_path / where))
    again = timm_model(options, TASK).eval()
    with torch.no_grad():
        assert torch.equal(again({"image": images()}).logits, model({"image": images()}).logits)
    assert again.labels.names == CLASSES


def test_a_local_folder_of_timm_is_a_model_name_whose_classifier_is_replaced(tmp_path):
    build("test_resnet").save(tmp_path)
    name = f"local-dir:{tmp_path}"
    five = Task("classification", num_classes=5, image=(3, 32, 32))
    student = timm_model(TimmOptions(model=name, pretrained=True), five)
    stored = load_file(tmp_path / "model.safetensors")
    assert student.module.num_classes == 5
    assert torch.equal(student.module.conv1[0].weight, stored["conv1.0.weight"])
    with pytest.raises(ModelError, match=r"are for 3 classes, the data has 5.*new_head"):
        timm_model(TimmTeacherOptions(model=name), five)
    assert timm_model(TimmTeacherOptions(model=name, new_head=True), five).module.num_classes == 5


def test_class_names_of_a_checkpoint_are_kept_so_that_another_order_is_found(tmp_path):
    build("test_resnet").save(tmp_path)
    other = Task("classification", CLASSES[::-1], image=(3, 32, 32))
    assert build("test_resnet", other, checkpoint=str(tmp_path)).labels.names == CLASSES


def refusal(task=TASK, **options):
    with pytest.raises(ModelError) as caught:
        timm_model(TimmOptions(**options), task)
    return str(caught.value)


def test_unknown_names_offer_the_nearest():
    assert "did you mean 'resnet50'" in refusal(model="resnet5O")
    assert "timm has no weights 'a1' of 'resnet18'" in refusal(model="resnet18.a1")
    assert "hf-hub:timm/resnet18" in refusal(model="timm/resnet18")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    build("test_resnet").save(tmp_path / "ok")
    five = Task("classification", num_classes=5)
    folder, file = str(tmp_path / "ok"), str(tmp_path / "ok/model.safetensors")
    for checkpoint in (folder, file):
        assert "has 3 classes, the data has 5" in refusal(five, model="test_resnet", checkpoint=checkpoint)
    assert "set `model: test_resnet`" in refusal(model="test_vit", checkpoint=folder)
    assert "cannot be loaded" in refusal(model="test_vit", checkpoint=file)
    assert "no such file" in refusal(model="test_vit", checkpoint=str(tmp_path / "none.pth"))
    assert "no config.json" in refusal(model="test_vit", checkpoint=str(tmp_path))


def test_damaged_and_unsafe_checkpoints_are_refused(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    assert "cut.safetensors cannot be loaded" in refusal(model="test_vit", checkpoint=str(tmp_path / "cut.safetensors"))
    torch.save({"model": os.system}, tmp_path / "code.pth")
    assert "weights_only" in refusal(model="test_vit", checkpoint=str(tmp_path / "code.pth"))


def test_tasks_and_arguments_that_do_not_fit_are_refused():
    assert "task of kind 'segmentation'" in refusal(Task("segmentation", CLASSES), model="test_vit")
    assert "drop_path_rate" in refusal(model="ghostnet_050", drop_path_rate=0.1)
    with pytest.raises(ModelError, match="read the batch entry 'image'"):
        build("test_resnet")({"text": ["a"]})


def test_published_weights_without_network_say_what_is_missing_and_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"the weights of 'test_resnet' could not be fetched.*`checkpoint:`"):
        timm_model(TimmTeacherOptions(model="test_resnet"), Task("classification", num_classes=1000))


def test_downloads_name_the_weights_and_their_size():
    [download] = TimmTeacherOptions(model="resnet50.a1_in1k").downloads()
    assert (download.name, download.source) == ("timm/resnet50.a1_in1k", "Hugging Face Hub")
    published = 102_469_840  # size of the file on the Hub
    assert download.size == pytest.approx(published, rel=1e-3)
    assert TimmTeacherOptions(model="resnet50", checkpoint="x").downloads() == []
    assert TimmOptions(model="resnet50").downloads() == []
    with pytest.raises(ModelError, match="did you mean"):
        TimmTeacherOptions(model="resnet5O").downloads()


def test_weights_in_the_cache_are_no_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *a, **k: "/cache/model.safetensors")
    assert TimmTeacherOptions(model="resnet50.a1_in1k").downloads() == []


def test_saved_configuration_is_plain_json(tmp_path):
    build("test_resnet").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["label_names"] == list(CLASSES)
