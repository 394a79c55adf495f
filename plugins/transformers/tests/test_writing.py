"""Tokens written after tokens: what they depend on, where they end, and logits that are made on demand."""

import pytest
import torch

from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore.data import Task
from kdcore.errors import DataError, ModelError
from kdcore.options import Sampling

TASK = Task("causal-lm", num_classes=60)
SIZES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "opt": {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gemma2": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
CONTEXTS, SEEDS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]], [1, 2, 3]


def model(kind="llama", seed=0, **config):
    torch.manual_seed(seed)
    tokens = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    return build(TransformersOptions(config={"model_type": kind, **tokens, **SIZES[kind], **config}), TASK)


@pytest.mark.parametrize(("kind", "apart"), [("llama", True), ("gpt2", True), ("opt", True), ("gemma2", False)])
def test_logits_are_left_to_the_last_layer_where_nothing_comes_after_it(kind, apart):
    made = model(kind).eval()
    batch = {"input_ids": torch.randint(4, 60, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    outputs = made(batch)
    assert outputs.pending is apart
    torch.testing.assert_close(outputs.logits, made.module(**batch).logits)


def test_what_is_written_depends_on_the_row_and_its_seed_alone():
    made = model()
    together = made.write(CONTEXTS, Sampling(max_tokens=8), SEEDS)
    apart = [made.write([c], Sampling(max_tokens=8), [s])[0] for c, s in zip(CONTEXTS, SEEDS, strict=True)]
    assert together == apart
    assert together != made.write(CONTEXTS, Sampling(max_tokens=8), [4, 5, 6])


def test_dropout_is_off_and_no_random_state_is_touched():
    made = model("gpt2", resid_pdrop=0.5).train()
    before = torch.get_rng_state()
    first = made.write(CONTEXTS, Sampling(max_tokens=6), SEEDS)
    assert torch.equal(before, torch.get_rng_state())
    assert first == made.write(CONTEXTS, Sampling(max_tokens=6), SEEDS)
    assert made.module.training


def test_a_row_ends_with_its_end_token_or_at_its_limit():
    made = model()
    with torch.no_grad():
        made.module.lm_head.weight[3] *= 30  # the end token is likely
    written = made.write(CONTEXTS * 10, Sampling(max_tokens=12), list(range(30)))
    ended = [row for row in written if 3 in row]
    assert len(ended) > 3
    assert all(row.index(3) == len(row) - 1 for row in ended)
    limited = model().write(CONTEXTS, Sampling(max_tokens=12), SEEDS, limits=[1, 4, 2])
    assert [len(row) for row in limited] <= [1, 4, 2]


def test_writing_goes_on_from_any_position_as_if_it_had_not_stopped():
    made = model()
    whole = made.write(CONTEXTS, Sampling(max_tokens=8, temperature=0), SEEDS)
    prefixes = [context + row[: i + 1] for i, (context, row) in enumerate(zip(CONTEXTS, whole, strict=True))]
    rest = made.write(prefixes, Sampling(max_tokens=8, temperature=0), SEEDS, limits=[7, 6, 5])
    assert [row[: i + 1] + more for i, (row, more) in enumerate(zip(whole, rest, strict=True))] == whole


def test_a_mixture_draws_from_both_models():
    student, teacher = model(seed=1), model(seed=2)
    with torch.no_grad():
        teacher.module.lm_head.weight[17] *= 60
        student.module.lm_head.weight[21] *= 60
    rows = [[5, 6]] * 200
    drawn = student.write(rows, Sampling(max_tokens=1), list(range(200)), mix=(teacher, 0.3))
    logits = [m.eval()({"input_ids": torch.tensor([[5, 6]])}).logits[0, -1].softmax(-1) for m in (student, teacher)]
    expected = 0.7 * logits[0] + 0.3 * logits[1]
    found = torch.bincount(torch.tensor([row[0] for row in drawn]), minlength=60) / 200
    assert (found - expected).abs().max() < 0.12
    alone = student.write([[5, 6, 7]], Sampling(max_tokens=9), [1], mix=(student, 0.5))
    assert alone == student.write([[5, 6, 7]], Sampling(max_tokens=9), [1])


def test_a_prompt_that_fills_the_model_is_refused():
    with pytest.raises(DataError, match="row 0: a prompt of 32 tokens"):
        model("gpt2").write([[5] * 32], Sampling(max_tokens=4), [0])
    written = model("gpt2").write([[5] * 30], Sampling(max_tokens=4), [0])
    assert len(written[0]) <= 2


def test_models_that_classify_write_nothing():
    made = build(TransformersOptions(config={"model_type": "llama", "pad_token_id": 0, **SIZES["llama"]}),
                 Task("classification", ("a", "b"), tokenizer=None))  # fmt: skip
    assert not made.writes
    with pytest.raises(ModelError, match="writes no tokens"):
        made.write([[1]], Sampling(), [0])


def test_attention_maps_are_given_on_demand():
    batch = {"input_ids": torch.randint(4, 60, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    made = build(TransformersOptions(attentions=True, config={"model_type": "llama", **SIZES["llama"]}), TASK)
    maps = made(batch).extras["attentions"]
    assert [tuple(m.shape) for m in maps] == [(2, 2, 6, 6)] * 2
    assert "attentions" not in model()(batch).extras
