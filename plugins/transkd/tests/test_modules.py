import math

import pytest
import torch
from torch import nn

from kd_transkd.modules import (
    CrossSelectiveFusion,
    EmbeddingAlignment,
    EmbeddingAssistant,
    GLMixer,
    SelectiveFusion,
)

WIDTHS, TEACHER = (4, 6, 8, 10), (8, 10, 12, 14)


def maps(batch: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, c, 16 // 2**i, 24 // 2**i, generator=generator) for i, c in enumerate(WIDTHS)]


def fusion() -> CrossSelectiveFusion:
    torch.manual_seed(0)
    return CrossSelectiveFusion(WIDTHS, TEACHER, channels_mid=6, reduced=5)


def test_fused_maps_have_the_teachers_widths_on_the_students_grids():
    found = fusion()(maps())
    assert [f.shape for f in found] == [(2, c, *m.shape[2:]) for c, m in zip(TEACHER, maps(), strict=True)]


def test_deeper_maps_reach_all_stages_above_and_none_below(monkeypatch):
    net = fusion().eval()
    with_fusion = net(maps())
    forward = SelectiveFusion.forward
    zeros = lambda self, x, deeper=None: forward(self, x, None if deeper is None else torch.zeros_like(deeper))  # noqa: E731
    monkeypatch.setattr(SelectiveFusion, "forward", zeros)
    without = net(maps())
    assert [torch.equal(a, b) for a, b in zip(with_fusion, without, strict=True)] == [False, False, False, True]


def test_gradient_of_the_shallowest_map_reaches_the_deepest():
    features = [m.requires_grad_() for m in maps()]
    fusion()(features)[0].square().sum().backward()
    assert all(m.grad.abs().sum() > 0 for m in features)


@pytest.mark.parametrize("batch", [1, 3])
def test_shares_of_two_maps_sum_to_one_in_every_channel(batch):
    block = SelectiveFusion(4, 6, 8, reduced=5)
    own, deeper = block.shares(torch.randn(batch, 6, 4, 4), torch.randn(batch, 6, 4, 4))
    assert own.shape == (batch, 6, 1, 1)
    torch.testing.assert_close(own + deeper, torch.ones(batch, 6, 1, 1), rtol=0, atol=1e-6)
    assert own.std() > 0


@pytest.mark.parametrize(("batch", "used", "idle"), [(1, "squeeze_one", "squeeze"), (2, "squeeze", "squeeze_one")])
def test_one_image_takes_the_gate_without_batch_norm_and_every_parameter_gets_a_gradient(batch, used, idle):
    block = SelectiveFusion(4, 6, 8, reduced=5)
    block(torch.randn(batch, 4, 4, 4), torch.randn(batch, 6, 2, 2))[0].square().mean().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert getattr(block, used)[0].weight.grad.abs().sum() > 0
    assert getattr(block, idle)[0].weight.grad.abs().sum() == 0


def test_one_image_with_one_position_is_refused_in_training_only():
    features = [torch.randn(1, c, max(4 // 2**i, 1), max(4 // 2**i, 1)) for i, c in enumerate(WIDTHS)]
    with pytest.raises(ValueError, match="stage 3 gives a map of 1 x 1"):
        fusion()(features)
    assert len(fusion().eval()(features)) == 4


def test_mixer_attends_as_torchs_attention_does():
    mixer = GLMixer(8, heads=2)
    reference = nn.MultiheadAttention(8, 2, bias=True, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(mixer.qkv.weight)
        reference.in_proj_bias.zero_()
        reference.out_proj.load_state_dict(mixer.proj.state_dict())
    tokens = torch.randn(2, 5, 8)
    torch.testing.assert_close(mixer.attend(tokens), reference(tokens, tokens, tokens)[0])


def test_mixer_begins_with_equal_shares_and_adds_the_tokens_if_told_to():
    torch.manual_seed(0)
    mixer, tokens = GLMixer(8, heads=2), torch.randn(2, 5, 8)
    assert mixer.mix.tolist() == [0.5, 0.5]
    plain = mixer(tokens)
    torch.testing.assert_close(plain, 0.5 * mixer.attend(tokens) + 0.5 * mixer.convolve(tokens))
    mixer.residual = True
    torch.testing.assert_close(mixer(tokens), plain + tokens)


def test_mixer_refuses_heads_that_do_not_divide_its_width():
    with pytest.raises(ValueError, match="gl_heads=3"):
        GLMixer(8, heads=3)


def test_convolution_of_the_mixer_sees_neighbouring_tokens_only():
    mixer, tokens = GLMixer(8, heads=2), torch.randn(1, 7, 8)
    changed = tokens.clone()
    changed[:, 3] += 1
    moved = (mixer.convolve(changed) - mixer.convolve(tokens)).abs().sum(-1)[0] > 0
    assert moved.tolist() == [False, False, True, True, True, False, False]


def test_assistant_embeds_images_at_stride_4_and_maps_at_stride_2_and_takes_the_grid_it_is_told():
    image, map_ = torch.randn(2, 3, 32, 48), torch.randn(2, 4, 8, 12)
    assert EmbeddingAssistant(3, 6, first=True)(image, (8, 12)).shape == (2, 8 * 12, 6)
    assert EmbeddingAssistant(4, 6, first=False)(map_, (4, 6)).shape == (2, 4 * 6, 6)
    assert EmbeddingAssistant(4, 6, first=False)(map_, (8, 12)).shape == (2, 8 * 12, 6)


def test_assistant_begins_as_the_paper_says():
    torch.manual_seed(0)
    assistant = EmbeddingAssistant(64, 128, first=False)
    assert assistant.proj.bias.abs().sum() == 0
    assert assistant.proj.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    shares = [EmbeddingAlignment(4, 6, stage=i, assistant=assistant).shares.tolist() for i in (1, 2, 3, 4)]
    assert shares == [pytest.approx([0.1 * i, 0.1 * (4 + i)]) for i in (1, 2, 3, 4)]
