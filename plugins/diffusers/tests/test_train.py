from typing import Any

import torch

from kd_diffusers.denoiser import Denoiser
from kd_diffusers.options import MixtureOptions, ShapesOptions
from kd_diffusers.toy import CAPTIONS, captioned_shapes, mixture
from kdcore import api
from kdcore.testing.conformance import run_cut

SMALL = {"sample_size": 1, "patch_size": 1, "in_channels": 2, "out_channels": 2, "num_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 2, "num_embeds_ada_norm": 5}  # fmt: skip


def recipe(steps: int = 60, **changes: Any) -> dict[str, Any]:
    model = {"use": "diffusers", "architecture": "DiTTransformer2DModel", "config": SMALL}
    return {
        "method": {"use": "denoise", "samples": 0},
        "student": model,
        "data": {"use": "mixture-2d", "train": 256, "val": 64},
        "train": {"steps": steps, "batch_size": 32, "optimizer": {"name": "adamw", "lr": 3e-3}},
    } | changes


def test_training_lowers_the_loss_and_a_teacher_draws_the_student_near(tmp_path):
    first = api.run(recipe(steps=1), run_dir=tmp_path / "first")
    longer = api.run(recipe(), run_dir=tmp_path / "longer")
    assert longer.metrics["val/denoising-loss"] < 0.7 * first.metrics["val/denoising-loss"]
    teacher = {"use": "diffusers", "checkpoint": str(longer.path / "student")}
    method = {"use": "denoise", "samples": 0, "task_weight": 0.0}
    near, far = (
        api.run(recipe(steps, teacher=teacher, method=method), run_dir=tmp_path / str(steps)) for steps in (40, 1)
    )
    assert near.metrics["val/output-distance"] < 0.3 * far.metrics["val/output-distance"]


def test_quickstart_writes_pictures_and_a_student_that_reloads(tmp_path):
    run = run_cut("denoise", tmp_path / "run")
    assert (run.path / "stages" / "02-samples" / "artifact" / "samples.png").is_file()
    _, loaded = api.load_student(run.path)
    assert isinstance(loaded, Denoiser)
    assert loaded.rest is None


def test_shapes_have_the_embeddings_of_their_words():
    data = captioned_shapes(ShapesOptions(train=40, val=8))
    samples = [data["train"][i] for i in range(40)]
    for sample in samples:
        assert sample["image"].shape == (3, 8, 8)
        assert CAPTIONS[int(sample["label"])] == sample["text"]
        torch.testing.assert_close(sample["pooled_prompt_embeds"], sample["prompt_embeds"].mean(0))
    same = [s["prompt_embeds"][0] for s in samples if s["text"].startswith("red")]
    assert len(same) > 1
    assert all(torch.equal(one, same[0]) for one in same)


def test_mixture_lies_around_its_centres():
    data = mixture(MixtureOptions(train=400, components=4, spread=0.1))
    points = torch.stack([data["train"][i]["latents"].flatten() for i in range(400)])
    label = data.labels("train")
    centres = torch.stack([points[label == c].mean(0) for c in range(4)])
    torch.testing.assert_close(centres, torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]), atol=0.05, rtol=0)
