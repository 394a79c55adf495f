import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
import torch
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

from kd_diffusers import build as builder
from kd_diffusers.build import build, load_denoiser
from kd_diffusers.calls import pack, unpack
from kd_diffusers.denoiser import Denoiser, as_denoiser, one_caption
from kd_diffusers.options import DiffusersOptions
from kd_diffusers.sampling import sample, save_grid
from kdcore.data import Task
from kdcore.errors import ModelError
from kdcore.models import Model

UNLABELLED = Task("unlabelled")


def denoiser(name: str = "SD3Transformer2DModel", **options: Any) -> Denoiser:
    torch.manual_seed(0)
    made = build(DiffusersOptions(architecture=name, config=tiny.ARCHITECTURES[name], **options), UNLABELLED)
    for parameter in made.parameters():  # output layers that start at zero would hide every mistake
        if not parameter.abs().sum():
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny.sd3_pipeline(folder)
    return folder


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_every_architecture_predicts_saves_and_loads(name, tmp_path):
    model, batch = denoiser(name), tiny.batch()
    with torch.no_grad():
        found = model(batch).extras["prediction"]
        assert found.shape == batch["latents"].shape
        model.save(tmp_path / "saved")
        loaded = load_denoiser(tmp_path / "saved").eval()
        torch.testing.assert_close(loaded(batch).extras["prediction"], found)
    plain = getattr(diffusers, name).from_pretrained(tmp_path / "saved")
    assert {k for k, _ in plain.named_parameters()} == {k for k, _ in model.module.named_parameters()}


@pytest.mark.parametrize("name", ["SD3Transformer2DModel", "UNet2DConditionModel", "DiTTransformer2DModel"])
def test_every_condition_reaches_the_network(name):
    model, batch = denoiser(name), tiny.batch()
    noised = model.noised(batch)
    read = ["label"] if name.startswith("DiT") else ["prompt_embeds"]
    read += ["pooled_prompt_embeds"] if name.startswith("SD3") else []
    with torch.no_grad():
        plain = model(noised).extras["prediction"]
        for key in [*read, "timestep", "noised"]:
            changed = {**noised, key: noised[key].flip(0)}
            assert not torch.allclose(model(changed).extras["prediction"], plain), key


def test_taps_of_blocks_are_features():
    model = denoiser()
    model.tap("transformer_blocks.*.attn.to_q", "@-1")
    features = model(tiny.batch()).features
    assert [n for n in features if n.endswith("to_q")] == [f"transformer_blocks.{i}.attn.to_q" for i in range(3)]
    assert features["transformer_blocks.0.attn.to_q"].shape == (3, 16, 16)


def test_level_and_noise_depend_on_key_and_sample_only():
    model, batch = denoiser(), tiny.batch(4)
    whole = model.noised(batch, 0, 7)
    part = model.noised({k: v[2:] for k, v in batch.items()}, 0, 7)
    for key in ("timestep", "noise", "noised"):
        torch.testing.assert_close(whole[key][2:], part[key], rtol=0, atol=0)
        assert not torch.equal(model.noised(batch, 0, 8)[key], whole[key])
    assert len(set(whole["timestep"].tolist())) == 4
    torch.testing.assert_close(
        whole["noised"], model.process.noised(batch["latents"], whole["noise"], whole["timestep"])
    )


def test_flux_patches_are_those_of_its_pipeline():
    latents = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    packed = pack(latents)
    torch.testing.assert_close(packed, diffusers.FluxPipeline._pack_latents(latents, 2, 4, 6, 8), rtol=0, atol=0)
    torch.testing.assert_close(unpack(packed, 6, 8), latents, rtol=0, atol=0)
    with pytest.raises(ModelError, match="5 x 8 do not split"):
        pack(latents[..., :5, :])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_pipeline_draws_the_same(pipeline, guidance):
    model = build(DiffusersOptions(model=str(pipeline)), UNLABELLED).eval()
    batch = {"latents": torch.zeros(2, 4, 8, 8), "text": ["a cat", "dogs"], "index": torch.tensor([3, 9])}
    found = sample(model, batch, steps=3, guidance=guidance, seed=5)
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(pipeline, text_encoder_3=None, tokenizer_3=None)
    from kdcore.data import derive_seed

    seeds = [derive_seed("sample", 5, i) for i in (3, 9)]
    start = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in seeds])
    wanted = pipe(["a cat", "dogs"], latents=start, num_inference_steps=3, guidance_scale=guidance, height=16, width=16,
                  output_type="latent", negative_prompt=["", ""]).images  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    pictures = model.decode(found)
    assert pictures.shape == (2, 3, 8 * model.rest.pipe.vae_scale_factor, 8 * model.rest.pipe.vae_scale_factor)
    assert 0 <= pictures.min() <= pictures.max() <= 1


def test_images_and_captions_are_encoded_by_the_frozen_rest(pipeline):
    model = build(DiffusersOptions(model=str(pipeline)), UNLABELLED)
    batch = {"image": torch.rand(2, 3, 16, 16), "text": ["a", "b"], "index": torch.arange(2)}
    noised = model.noised(batch, "key")
    assert noised["latents"].shape == (2, 4, *(16 // model.rest.pipe.vae_scale_factor,) * 2)
    assert not any("vae" in name or "text_encoder" in name for name, _ in model.named_parameters())
    assert not any(p.requires_grad for p in model.rest.pipe.vae.parameters())
    assert not noised["latents"].requires_grad
    again = model.noised({k: v[1:] for k, v in batch.items()}, "key")
    torch.testing.assert_close(again["latents"], noised["latents"][1:])
    torch.testing.assert_close(again["prompt_embeds"], noised["prompt_embeds"][1:])
    mean = model.rest.encode_images(batch["image"])
    assert (mean - noised["latents"]).abs().max() > 0


def test_a_saved_denoiser_finds_the_rest_of_its_pipeline(pipeline, tmp_path):
    model = build(DiffusersOptions(model=str(pipeline), timestep_mean=0.3), UNLABELLED)
    model.save(tmp_path / "student")
    loaded = build(DiffusersOptions(checkpoint=str(tmp_path / "student")), UNLABELLED)
    assert loaded.rest is not None
    assert loaded.rest.where == str(pipeline)
    assert loaded.process.mean == 0.3
    assert loaded.process.scheduler.config.shift == 3.0


def test_weights_can_be_left_out(pipeline):
    torch.manual_seed(1)
    model = build(DiffusersOptions(model=str(pipeline), pretrained=False, config={"num_layers": 1}), UNLABELLED)
    assert len(model.module.transformer_blocks) == 1


def test_one_of_two_captions_is_drawn_by_sample_and_key():
    batch = {"text": ["a"] * 40, "text_pair": ["b"] * 40, "index": torch.arange(40)}
    drawn = one_caption(batch, 0, 1)
    assert 8 < drawn.count("a") < 32
    assert drawn == one_caption(batch, 0, 1) != one_caption(batch, 0, 2)


def test_gradient_checkpointing_gives_the_same_gradients():
    batch, gradients = tiny.batch(), []
    for checkpointing in (False, True):
        model = denoiser(gradient_checkpointing=checkpointing).train()
        model(batch).extras["prediction"].square().sum().backward()
        gradients.append(model.module.transformer_blocks[0].ff.net[2].weight.grad)
    torch.testing.assert_close(*gradients)


def test_grid_has_a_row_per_model_and_a_column_per_sample(tmp_path):
    from PIL import Image

    rows = {"teacher": torch.rand(3, 3, 8, 8), "student": torch.rand(3, 3, 8, 8)}
    save_grid(rows, tmp_path / "grid.png", ["a", "b", "c"])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.size == (120 + 3 * 100, 16 + 2 * 100)
    save_grid({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_gated_models_name_their_licence_page(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        try:
            raise GatedRepoError.__new__(GatedRepoError)
        except GatedRepoError as error:
            raise OSError("not a valid model identifier") from error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", refuse)
    with pytest.raises(ModelError, match=r"gated: accept its licence at https://huggingface.co/owner/name .*hf auth"):
        build(DiffusersOptions(model="owner/name"), UNLABELLED)


def test_a_denoiser_alone_on_the_hub_has_no_index(monkeypatch, tmp_path):
    def absent(*_: Any, **__: Any) -> None:
        raise OSError("no file named model_index.json") from EntryNotFoundError("404")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", absent)
    assert builder.pipeline_index("owner/name", None) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "SD3TransformerModel"}, r"did you mean .*'SD3Transformer2DModel'"),
        ({"architecture": "SD3Transformer2DModel", "config": {"num_layer": 2}}, r"config.num_layer: .*'num_layers'"),
        ({"architecture": "SD3Transformer2DModel", "config": {"num_layers": "two"}}, "cannot be built"),
        ({"checkpoint": "/nowhere"}, "holds no denoiser"),
        ({"model": "/nowhere/at/all"}, "cannot be loaded"),
    ],
)
def test_wrong_models_get_a_clear_sentence(options, message):
    with pytest.raises(ModelError, match=message):
        build(DiffusersOptions(**options), UNLABELLED)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "give `model`"), ({"model": "a/b", "architecture": "UNet2DModel"}, "leave `architecture` out")],
)
def test_wrong_options_get_a_clear_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusersOptions(**options)


def test_a_pipeline_without_a_denoiser_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ModelError, match="neither a transformer nor a unet"):
        build(DiffusersOptions(model=str(tmp_path)), UNLABELLED)


@pytest.mark.parametrize(
    ("name", "key"),
    [("SD3Transformer2DModel", "prompt_embeds"), ("SD3Transformer2DModel", "pooled_prompt_embeds"),
     ("DiTTransformer2DModel", "label"), ("UNet2DConditionModel", "prompt_embeds"), ("UNet2DModel", "label")],
)  # fmt: skip
def test_a_missing_condition_is_named(name, key):
    batch = {k: v for k, v in tiny.batch().items() if k != key}
    with pytest.raises(ModelError, match=f"reads the batch entry '{key}'"):
        denoiser(name)(batch)


def test_data_without_pictures_is_refused():
    with pytest.raises(ModelError, match=r"'image' \[B, 3, H, W\].*the data gives: index"):
        denoiser()({"index": torch.arange(2)})
    with pytest.raises(ModelError, match="is no denoiser"):
        as_denoiser(Model(torch.nn.Linear(2, 2)), "teachers.teacher")
