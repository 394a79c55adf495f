"""Outputs whose logits are made on demand, and batches of prompts and answers."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from kdcore.data import IGNORE
from kdcore.errors import DataError, ModelError
from kdcore.generation import join_rows, respond, row_seeds, split_rows
from kdcore.models import Model, Outputs, map_tensors
from kdcore.options import Sampling


def pending():
    torch.manual_seed(0)
    head = nn.Linear(4, 7)
    return Outputs(embedding=torch.randn(2, 3, 4, requires_grad=True), head=head), head


def test_pending_logits_are_made_once_when_they_are_read():
    outputs, head = pending()
    assert outputs.pending
    assert outputs.classes == 7
    assert outputs.gives("logits")
    assert outputs.pending  # asking what it gives makes nothing
    made = outputs.need("logits")
    assert torch.equal(made, head(outputs.embedding))
    assert outputs.logits is made
    assert not outputs.pending


def test_logits_that_replace_others_stay():
    outputs, _ = pending()
    other = torch.zeros(2, 3, 7)
    assert replace(outputs, logits=other).logits is other
    assert Outputs().logits is None
    assert not Outputs().gives("logits")
    assert Outputs().classes is None


def test_detached_outputs_give_the_head_no_gradient():
    outputs, _ = pending()
    assert not outputs.detach().need("logits").requires_grad
    doubled = map_tensors(outputs, lambda t: t * 2)
    torch.testing.assert_close(doubled.logits, outputs.logits * 2)


def test_a_tap_of_the_head_reads_pending_logits():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 7)

    net = Net()
    model = Model(net, lambda m, batch: Outputs(embedding=m.body(batch["x"]), head=m.head))
    model.tap("head")
    outputs = model({"x": torch.ones(2, 3)})
    assert torch.equal(outputs.features["head"], outputs.logits)


def batch(rows, labels, **more):
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor(labels),
            "index": torch.arange(len(rows)), **more}  # fmt: skip


I = IGNORE  # noqa: E741


def test_rows_are_split_at_the_first_label_and_joined_again():
    given = batch([[5, 6, 7, 8, 0], [9, 3, 2, 0, 0]], [[I, 7, 8, I, I], [3, 2, I, I, I]], text=["a", "b"])
    prompts, answers = split_rows(given)
    assert prompts == [[5, 6], [9]]
    assert answers == [[7, 8], [3, 2]]
    joined = join_rows(prompts, answers, given)
    assert joined["input_ids"].tolist() == [[5, 6, 7, 8], [9, 3, 2, 0]]
    assert joined["labels"].tolist() == [[I, 7, 8, I], [3, 2, I, I]]
    assert joined["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert joined["text"] == ["a", "b"]


def test_prompts_that_are_padded_on_the_left_lose_their_padding():
    ids = torch.tensor([[0, 0, 5, 6, 7]])
    given = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.tensor([[I, I, I, 7, I]])}
    assert split_rows(given) == ([[5, 6]], [[7]])


def test_rows_without_an_answer_and_packed_rows_are_refused():
    with pytest.raises(DataError, match="sample 1: no label of it counts"):
        split_rows(batch([[5, 6], [5, 6]], [[6, I], [I, I]]))
    with pytest.raises(DataError, match="`packing`"):
        split_rows(batch([[5, 6]], [[6, I]], position_ids=torch.tensor([[0, 1]])))


def test_seeds_depend_on_the_sample_and_not_on_its_place_in_the_batch():
    given = {"index": torch.tensor([3, 8])}
    assert row_seeds(given, 0, 1)[::-1] == row_seeds({"index": torch.tensor([8, 3])}, 0, 1)
    assert row_seeds(given, 0, 1) != row_seeds(given, 0, 2)


def test_a_model_writes_in_evaluation_mode_and_is_left_in_its_own():
    modes = []

    def writer(module, contexts, sampling, seeds, limits, mix):
        modes.append(module.training)
        return [[seed % 10] * sampling.max_tokens for seed in seeds]

    model = Model(nn.Linear(1, 1), writer=writer).train()
    made = respond(model, batch([[5, 6, 7]], [[I, 7, I]]), Sampling(max_tokens=2), 0, 4)
    assert modes == [False]
    assert model.training
    assert made["input_ids"].shape == (1, 4)
    with pytest.raises(ModelError, match="writes no tokens"):
        Model(nn.Linear(1, 1)).write([[1]], Sampling(), [0])
