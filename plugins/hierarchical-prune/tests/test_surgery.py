from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kd_diffusers.build import build
from kd_diffusers.denoiser import Denoiser
from kd_diffusers.options import DiffusersOptions
from kd_hierarchical_prune import nf4, surgery
from kd_hierarchical_prune.blocks import PassAttention, Recorder, Replacement, count, find_blocks, joined, without
from kd_hierarchical_prune.distill import PruneDistill, rates
from kd_hierarchical_prune.options import HierarchicalPruneOptions
from kdcore.data import Task
from kdcore.errors import ModelError

SD3 = {"sample_size": 4, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 4, "attention_head_dim": 8,
       "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
       "pos_embed_max_size": 4, "dual_attention_layers": (0, 1, 2)}  # fmt: skip
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2,
        "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 2, 2)}  # fmt: skip
SMALL = {"sample_size": 4, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2}
OTHERS = {
    "DiTTransformer2DModel": {**SMALL, "out_channels": 8, "num_embeds_ada_norm": 4},
    "PixArtTransformer2DModel": {**SMALL, "out_channels": 8, "cross_attention_dim": 16, "caption_channels": 16,
                                 "use_additional_conditions": False},
    "SanaTransformer2DModel": {**SMALL, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_dim": 16,
                               "cross_attention_head_dim": 8, "caption_channels": 16, "patch_size": 1},
}  # fmt: skip


def denoiser(name: str, config: dict[str, Any], **options: Any) -> Denoiser:
    torch.manual_seed(0)
    made = build(DiffusersOptions(architecture=name, config=config, **options), Task("unlabelled"))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


def sd3(**options: Any) -> Denoiser:
    return denoiser("SD3Transformer2DModel", SD3, **options)


def flux() -> Denoiser:
    return denoiser("FluxTransformer2DModel", FLUX)


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return {"latents": draw(2, 4, 4, 4), "prompt_embeds": draw(2, 3, 16), "pooled_prompt_embeds": draw(2, 16),
            "label": torch.arange(2), "index": torch.arange(2)}  # fmt: skip


def predict(model: Denoiser) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch()).extras["prediction"]


@pytest.mark.parametrize(("make", "block"), [(sd3, 0), (sd3, 2), (sd3, 3), (flux, 0), (flux, 1), (flux, 3)])
def test_a_removed_block_hands_on_what_it_gets_and_the_student_is_plain_diffusers(make, block, tmp_path):
    teacher = make()
    blocks = find_blocks(teacher.module)
    with without(teacher.module, blocks[block], None, Replacement()):
        wanted = predict(teacher)
    assert not torch.allclose(predict(teacher), wanted)
    found = surgery.cut(teacher, [(block, None)])
    torch.testing.assert_close(predict(found.model), wanted)
    found.model.save(tmp_path / "student")
    plain = type(teacher.module).from_pretrained(tmp_path / "student")
    torch.testing.assert_close(predict(teacher.like(plain)), wanted)
    if (make, block) != (sd3, 3):
        assert count(found.model.module) == count(teacher.module) - count(teacher.module, [blocks[block].path])
    kept = [(path, found.blocks[b.index].path) for b, path in ((b, b.path) for b in blocks) if b.index != block]
    if (make, block) == (sd3, 3):
        kept = kept[:-1]  # in what is now the last block the text stream ends
    for old, new in kept:
        ours, theirs = (m.module.get_submodule(p).state_dict() for m, p in ((found.model, new), (teacher, old)))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_blocks_are_numbered_through_both_lists():
    blocks = find_blocks(flux().module)
    assert [b.path for b in blocks] == [*(f"transformer_blocks.{i}" for i in range(2)),
                                        *(f"single_transformer_blocks.{i}" for i in range(3))]  # fmt: skip
    assert list(blocks[0].components) == ["norm1", "norm1_context", "attention", "feed-forward", "context-feed-forward"]
    assert list(blocks[4].components) == ["norm", "attention", "mlp"]
    assert find_blocks(sd3().module)[0].components["attention"] == ("attn", "attn2")
    assert "context-feed-forward" not in find_blocks(sd3().module)[3].components


PARTS = [(make, i, name) for make in (sd3, flux) for i in (0, 3) for name in find_blocks(make().module)[i].components]


@pytest.mark.parametrize(("make", "block", "component"), PARTS)
@pytest.mark.parametrize("how", [Replacement(), Replacement(zero=True, normalize=False)])
def test_a_student_without_a_component_saves_and_loads(make, block, component, how, tmp_path):
    teacher = make()
    before, blocks = predict(teacher), find_blocks(teacher.module)
    with without(teacher.module, blocks[block], component, how):
        wanted = predict(teacher)
    torch.testing.assert_close(predict(teacher), before)
    assert wanted.isfinite().all()
    found = surgery.cut(teacher, [(block, component)], how=how)
    torch.testing.assert_close(predict(found.model), wanted)
    gone = count(teacher.module, blocks[block].paths(component))
    assert count(found.model.module) == count(teacher.module) - gone < count(teacher.module)
    (tmp_path / "student").mkdir()
    found.model.save(tmp_path / "student")
    torch.testing.assert_close(predict(surgery.load(tmp_path / "student")), wanted)
    with pytest.raises(OSError, match="config"):
        type(teacher.module).from_pretrained(tmp_path / "student")


def test_pass_through_is_not_the_same_as_dropping_the_branch():
    teacher = sd3()
    block = find_blocks(teacher.module)[1]
    outputs = []
    for how in (Replacement(), Replacement(zero=True)):
        with without(teacher.module, block, "feed-forward", how):
            outputs.append(predict(teacher))
    assert not torch.allclose(*outputs)


def test_a_passed_feed_forward_adds_its_gated_normed_input():
    teacher = sd3()
    inner = teacher.module.transformer_blocks[3]
    hidden, text, temb = torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(2, 16)
    _, gate_msa, shift, scale, gate = inner.norm1(hidden, emb=temb)
    with torch.no_grad(), without(teacher.module, find_blocks(teacher.module)[3], "feed-forward", Replacement()):
        _, found = inner(hidden, text, temb)
    normed, *_ = inner.norm1(hidden, emb=temb)
    attended, _ = inner.attn(hidden_states=normed, encoder_hidden_states=inner.norm1_context(text, temb))
    middle = hidden + gate_msa[:, None] * attended
    wanted = middle + gate[:, None] * (inner.norm2(middle) * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(found, wanted)


def test_a_block_without_any_component_left_is_removed_whole():
    blocks = find_blocks(flux().module)
    parts = [(3, "norm"), (3, "attention"), (3, "mlp"), (0, "attention")]
    assert joined(parts, blocks) == [(0, "attention"), (3, None)]
    student = surgery.cut(flux(), parts).model.module
    assert len(student.single_transformer_blocks) == 2
    assert isinstance(student.transformer_blocks[0].attn, PassAttention)


def test_what_comes_before_the_first_cut_is_frozen():
    found = surgery.cut(sd3(), [(2, None)])
    surgery.freeze(found, pwp=True)
    trained = {
        n.partition(".")[0] + "." + n.split(".")[1] for n, p in found.model.module.named_parameters() if p.requires_grad
    }
    assert trained == {"transformer_blocks.2", "norm_out.linear", "proj_out.weight", "proj_out.bias"}
    assert list(surgery.monitored(found)) == [3]
    inside = surgery.cut(sd3(), [(1, "attention")])
    surgery.freeze(inside, pwp=True)
    frozen = [n for n, p in inside.model.module.named_parameters() if not p.requires_grad]
    assert any(n.startswith("transformer_blocks.1.norm1.") for n in frozen)
    assert not any(n.startswith("transformer_blocks.1.ff.") for n in frozen)
    surgery.freeze(inside, pwp=True, only=[2])
    assert {n.split(".")[1] for n, p in inside.model.module.named_parameters() if p.requires_grad} == {"2"}
    surgery.freeze(inside, pwp=False)
    assert all(p.requires_grad for p in inside.model.parameters())


def test_learning_rates_fall_with_the_contribution_of_what_is_left():
    found = surgery.cut(sd3(), [(1, None)])
    surgery.freeze(found, pwp=True)
    factors = rates(found, {(0, None): 9.0, (1, None): 0.01, (2, None): 0.5, (3, None): 2.0})
    assert {f for n, f in factors.items() if n.startswith("transformer_blocks.1.")} == {1.0}
    assert {f for n, f in factors.items() if n.startswith("transformer_blocks.2.")} == {0.25}
    assert factors["proj_out.weight"] == 1.0
    assert not any(n.startswith("transformer_blocks.0.") for n in factors)


def test_streams_are_image_and_text_and_attention_outputs():
    model = sd3()
    blocks = find_blocks(model.module)
    recorder = Recorder(model.module, {2: blocks[2], 3: blocks[3]}, ["img", "txt", "sa", "ca"])
    model(batch())
    found = recorder.take()
    assert set(found) == {(2, "img"), (2, "txt"), (2, "sa"), (2, "ca"), (3, "img"), (3, "sa")}
    assert found[2, "img"].shape == found[2, "sa"].shape == (2, 4, 16)
    assert found[2, "txt"].shape == found[2, "ca"].shape == (2, 3, 16)
    assert recorder.take() == {}
    recorder.close()
    model(batch())
    assert recorder.take() == {}


def test_half_precision_teachers_give_students_in_float32_with_checkpointing():
    teacher = sd3(dtype="bf16", gradient_checkpointing=True)
    student = surgery.cut(teacher, [(1, None)]).model.module
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert student.is_gradient_checkpointing


@pytest.mark.parametrize("parts", [[(1, None)], [(1, "attention"), (2, None)]])
def test_4_bit_students_save_load_and_stay_near(parts, tmp_path):
    pytest.importorskip("bitsandbytes")
    found = surgery.cut(sd3(), parts)
    module = nf4.quantized(found.model.module, torch.float32)
    model = surgery.with_module(found.model, module, found.removed, found.how)
    wanted = predict(model)
    assert not nf4.linears(module)
    for path, linear in nf4.linears(found.model.module).items():
        x = torch.randn(8, linear.in_features, generator=torch.Generator().manual_seed(0))
        ours, exact = module.get_submodule(path)(x), linear(x)
        assert 0 < (ours - exact).square().mean() < 0.03 * exact.square().mean(), path
    assert nf4.linears(found.model.module)
    folder = tmp_path / "student"
    folder.mkdir()
    model.save(folder)
    (file,) = folder.glob("*.safetensors")
    packed = [k for k in load_file(file) if k.endswith("quant_state.bitsandbytes__nf4")]
    assert len(packed) == len(nf4.linears(found.model.module))
    torch.testing.assert_close(predict(surgery.load(folder)), wanted)


def test_other_networks_lose_blocks_from_their_list():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x)

    teacher = sd3().like(Stack())
    found = surgery.cut(teacher, [(1, None), (3, None)], ["layers"])
    assert [b.path for b in found.blocks.values()] == ["layers.0", "layers.1", "layers.2"]
    assert torch.equal(found.model.module.layers[2].weight, teacher.module.layers[4].weight)
    assert len(teacher.module.layers) == 5
    surgery.freeze(found, pwp=True)
    assert [n for n, p in found.model.module.named_parameters() if not p.requires_grad] == [
        "layers.0.weight",
        "layers.0.bias",
    ]


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("block", [0, 2])
def test_other_transformers_of_diffusers_lose_blocks_too(name, block):
    teacher = denoiser(name, OTHERS[name])
    with without(teacher.module, find_blocks(teacher.module)[block], None, Replacement()):
        wanted = predict(teacher)
    found = surgery.cut(teacher, [(block, None)])
    assert found.model.module.config.num_layers == 2
    torch.testing.assert_close(predict(found.model), wanted)


def test_features_and_gradients_are_the_same_under_gradient_checkpointing():
    results = []
    for checkpointing in (False, True):
        teacher = sd3(gradient_checkpointing=checkpointing)
        found = surgery.cut(teacher, [(1, None)])
        surgery.freeze(found, pwp=True)
        options = HierarchicalPruneOptions(l_feat=1.0, kd_streams=["img", "txt", "sa", "ca"])
        stage = PruneDistill(found, teacher, find_blocks(teacher.module), options, 0)
        terms = stage(batch())
        torch.stack(list(terms.values())).sum().backward()
        results.append((terms, found.model.module.transformer_blocks[1].ff.net[2].weight.grad))
    torch.testing.assert_close(*results)


def test_wrong_networks_get_a_clear_sentence(tmp_path):
    sides = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(block_out_channels=(8,), norm_num_groups=4, **sides)
    with pytest.raises(ModelError, match=r"no ordered list of blocks named transformer_blocks"):
        find_blocks(unet)
    with pytest.raises(ModelError, match=r"no list of blocks 'transformer_block'; did you mean 'transformer_blocks'"):
        find_blocks(sd3().module, ["transformer_block"])
    with pytest.raises(ModelError, match="every block would be removed"):
        surgery.cut(sd3(), [(i, None) for i in range(4)])
    with pytest.raises(ModelError, match="holds no student"):
        surgery.load(tmp_path)
