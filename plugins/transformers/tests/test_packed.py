"""Several texts in one row: which families of models read them as if each stood alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from kd_transformers.packed import takes_packed

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
GROUPED = {**SMALL, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": GROUPED,
    "gemma2": {**GROUPED, "head_dim": 8},
    "gpt_neox": SMALL,
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64,
            "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": SMALL,
    "bert": {**SMALL, "is_decoder": True},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
}  # fmt: skip
APART = [(name, kernel) for name in ("gpt2", "llama", "qwen2", "qwen3", "mistral", "gpt_neox")
         for kernel in ("sdpa", "eager")] + [("gemma2", "eager")]  # fmt: skip
TOGETHER = [("opt", "sdpa"), ("opt", "eager"), ("bloom", "eager"), ("falcon", "sdpa"), ("bert", "sdpa"),
            ("mamba", "eager")]  # fmt: skip


def make(family: str, kernel: str, dtype: torch.dtype = torch.float32) -> Any:
    tokens = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family], **tokens)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=kernel, dtype=dtype).eval()


def difference(module: Any) -> float:
    """How far the logits of two texts in a row are from those of the two apart."""
    ids = torch.randint(3, 50, (1, 9), generator=torch.Generator().manual_seed(1))
    texts, positions = (ids[:, :5], ids[:, 5:]), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])
    where = {} if type(module).__name__ in ("BloomForCausalLM", "MambaForCausalLM") else {"position_ids": positions}
    with torch.no_grad():
        packed = module(input_ids=ids, use_cache=False, **where).logits
        apart = torch.cat([module(input_ids=text, use_cache=False).logits for text in texts], 1)
    return float((packed - apart).abs().max())


@pytest.mark.parametrize(("family", "kernel"), APART)
def test_these_families_read_packed_texts_apart(family: str, kernel: str) -> None:
    module = make(family, kernel)
    assert difference(module) < 1e-5
    assert takes_packed(module)


@pytest.mark.parametrize(("family", "kernel"), TOGETHER)
def test_these_families_mix_packed_texts_and_are_found_out(family: str, kernel: str) -> None:
    module = make(family, kernel)
    assert difference(module) > 1e-4
    assert not takes_packed(module)


@pytest.mark.parametrize(("family", "expected"), [("gpt2", True), ("qwen2", True), ("opt", False), ("bert", False)])
def test_it_is_found_out_in_half_precision_too(family: str, expected: bool) -> None:
    assert takes_packed(make(family, "eager", torch.bfloat16)) is expected


def test_a_kernel_that_looks_at_the_first_row_only_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    module = make("gpt2", "eager")
    plain = module.forward

    def first_row(input_ids: Any = None, position_ids: Any = None, **more: Any) -> Any:
        return plain(input_ids=input_ids, position_ids=position_ids[:1].expand_as(input_ids), **more)

    monkeypatch.setattr(module, "forward", first_row)
    assert not takes_packed(module)


def test_trying_it_draws_no_random_number_and_leaves_every_mode_as_it_was() -> None:
    module = make("gpt2", "eager").train()
    still = [part.eval() for part in module.modules() if isinstance(part, nn.LayerNorm)]
    state = torch.get_rng_state()
    assert takes_packed(module)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(part.training is not any(part is other for other in still) for part in module.modules())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
