"""How a cache holds logits: errors, sizes, and the estimate that draws are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kdcore import codecs
from kdcore.models import Outputs

SEEDS = st.integers(0, 2**31)


def logits(seed: int, *shape: int, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.sampled_from(["float32", "float16", "bfloat16", "int8"]))
def test_what_is_packed_comes_back_within_the_precision_of_its_type(seed, dtype):
    tensor = logits(seed, 3, 5, 7)
    found = codecs.unpack(codecs.pack(tensor, dtype))
    bound = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}.get(dtype)
    limit = tensor.abs() * bound if bound is not None else tensor.abs().amax(-1, keepdim=True) / 254
    assert found.dtype == torch.float32
    assert ((found - tensor).abs() <= limit + 1e-6).all()


def test_a_row_of_zeros_is_packed_in_int8_as_zeros():
    assert codecs.unpack(codecs.pack(torch.zeros(2, 3), "int8")).equal(torch.zeros(2, 3))


@given(SEEDS, st.integers(1, 6))
def test_the_largest_logits_keep_their_probabilities_and_the_rest_shares_its_mass(seed, k):
    z = logits(seed, 2, 3, 9)
    parts = codecs.top_k(z, k, "float32")
    decoder = codecs.TopK(9)
    found, true = decoder(decoder.codes(parts)).exp(), z.softmax(-1)
    kept = torch.zeros_like(true, dtype=torch.bool).scatter(-1, parts["ids"].long(), True)
    torch.testing.assert_close(found[kept], true[kept])
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 3), rtol=2e-3, atol=0)
    assert (found.masked_fill(kept, 0).amax(-1) <= true.masked_fill(kept, 0).sum(-1) * 1.002 + 1e-7).all()


@settings(max_examples=20)
@given(SEEDS)
def test_draws_estimate_the_softmax_without_bias_and_each_is_off_by_less_than_one(seed):
    z, draws = logits(seed, 4, 20), 12
    decoder = codecs.Sampled(20)
    starts = torch.arange(0.5, 400) / 400  # the mean over all offsets is the expectation
    total = torch.zeros(4, 20)
    for start in starts:
        share = decoder(decoder.codes(codecs.sample(z, draws, start.expand(4)))).exp()
        assert ((share - z.softmax(-1)).abs() <= 1 / draws + 1e-5).all()
        total += share
    torch.testing.assert_close(total / len(starts), z.softmax(-1), rtol=0, atol=1.5e-3)


def test_the_gradient_of_forward_kl_to_the_draws_is_the_true_one_on_average():
    z, student = logits(0, 1, 30), logits(1, 1, 30).requires_grad_()
    decoder = codecs.Sampled(30)

    def gradient(target: torch.Tensor) -> torch.Tensor:
        loss = F.kl_div(student.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
        return torch.autograd.grad(loss, student)[0]

    found = [
        gradient(decoder(decoder.codes(codecs.sample(z, 8, start.expand(1))))) for start in torch.arange(0.5, 200) / 200
    ]
    assert all(g.isfinite().all() for g in found)
    torch.testing.assert_close(torch.stack(found).mean(0), gradient(z), rtol=0, atol=2e-3)


def test_a_token_takes_less_than_200_bytes_of_the_32_largest_and_less_than_60_of_draws():
    z = logits(0, 1, 2, 128_000)
    assert sum(a.nbytes for a in codecs.top_k(z, 32, "float16").values()) / 2 <= 200
    assert sum(a.nbytes for a in codecs.sample(z, 12, torch.zeros(1, 2)).values()) / 2 <= 60


def test_more_classes_than_two_bytes_can_number_take_four():
    assert codecs.index_type(2**15) == torch.int16
    assert codecs.index_type(2**15 + 1) == torch.int32
    far = torch.zeros(1, 2**15)
    far[0, -1] = 9
    assert int(codecs.top_k(far, 1, "float16")["ids"]) == 2**15 - 1


def test_the_work_is_done_in_chunks_with_the_same_result(monkeypatch):
    z, offsets = logits(0, 5, 7, 11), torch.rand(5, 7)
    whole = codecs.top_k(z, 3, "float16"), codecs.sample(z, 4, offsets)
    monkeypatch.setattr(codecs, "_ROWS", 30)
    parts = codecs.top_k(z, 3, "float16"), codecs.sample(z, 4, offsets)
    for one, two in zip(whole, parts, strict=True):
        assert all(one[name].equal(two[name]) for name in one)


def test_logits_of_codes_are_made_when_they_are_read_and_the_embedding_stays_what_it_is():
    decoder = codecs.TopK(6)
    outputs = Outputs(
        embedding=torch.ones(2, 4), head=decoder, codes=decoder.codes(codecs.top_k(logits(0, 2, 6), 2, "float32"))
    )
    assert outputs.pending
    assert outputs.classes == 6
    assert outputs.need("logits").shape == (2, 6)
    assert outputs.need("embedding").equal(torch.ones(2, 4))


@pytest.mark.parametrize("signal", ["cross_entropy", "top1"])
def test_errors_are_nothing_where_nothing_is_lost(signal):
    z = logits(0, 4, 5)
    assert codecs.logit_error(z, z)[signal] == {"cross_entropy": 0.0, "top1": 1.0}[signal]
    worse = codecs.logit_error(z, z.flip(-1))
    assert worse["cross_entropy"] > 0.01
    assert worse["top1"] < 1
