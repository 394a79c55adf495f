"""Data: order, shares, augmentation, streams."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from kdcore import DataModule, Task
from kdcore.adopt import as_data_module, guess_task
from kdcore.data import derive_seed, seeded
from kdcore.errors import DataError

TASK = Task("classification", ("a", "b"))


def module(size=20, **more):
    return DataModule({"train": [{"series": torch.tensor([float(i)])} for i in range(size)]}, TASK, **more)


def steps(data, batch_size, start=0, stop=6, accumulation=1, rank=0, world=1, seed=0, workers=0):
    loader = data.train_loader("train", batch_size, seed=seed, start=start, stop=stop, accumulation=accumulation,
                               rank=rank, world=world, workers=workers)  # fmt: skip
    return [batch["index"].tolist() for batch in loader]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 40), st.sampled_from([4, 8]), st.integers(0, 5), st.sampled_from([(1, 1), (2, 1), (1, 2), (2, 2)])
)
def test_a_step_is_the_same_batch_however_it_is_reached_or_shared(size, batch_size, start, split):
    world, accumulation = split
    data = module(size)
    whole = steps(data, batch_size)
    assert steps(data, batch_size, start=start) == whole[start:]
    parts = [steps(data, batch_size, accumulation=accumulation, rank=r, world=world) for r in range(world)]
    for step, batch in enumerate(whole):
        shared = [i for part in parts for micro in part[step * accumulation : (step + 1) * accumulation] for i in micro]
        assert sorted(shared) == sorted(batch)


def test_an_epoch_takes_every_sample_once_in_another_order_each_time():
    found = steps(module(20), 5, stop=8)
    epochs = [list(itertools.chain(*found[:4])), list(itertools.chain(*found[4:]))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    assert found != steps(module(20), 5, stop=8, seed=1)


def noisy(sample):
    return {"series": sample["series"] + torch.rand(1)}


@pytest.mark.parametrize("workers", [0, 2])
def test_augmentation_depends_on_seed_epoch_and_index_alone(workers):
    data = module(8, augment=noisy)
    torch.manual_seed(workers)
    state = torch.get_rng_state()
    loader = data.train_loader("train", 4, seed=0, start=0, stop=4, workers=workers)
    values = {
        (step // 2, int(i)): float(v)
        for step, b in enumerate(loader)
        for i, v in zip(b["index"], b["series"], strict=True)
    }
    assert torch.equal(state, torch.get_rng_state())
    wanted = {}
    for epoch, index in values:
        with seeded(derive_seed(0, epoch, index)):
            wanted[epoch, index] = float(index + torch.rand(1))
    assert values == pytest.approx(wanted)
    plain = next(iter(data.eval_loader("train", 8)))
    assert plain["series"].flatten().tolist() == list(range(8))


def test_evaluation_sees_every_sample_once_over_all_processes():
    found = [i for r in range(3) for b in module(10).eval_loader("train", 2, r, 3) for i in b["index"].tolist()]
    assert sorted(found) == list(range(10))


class Stream(IterableDataset):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for i in range(7):
            yield {"series": torch.tensor([100.0 * self.epoch + i])}


def test_a_stream_is_batched_shared_and_resumed():
    data = DataModule({"train": Stream()}, TASK)
    assert data.size("train") is None
    take = lambda **k: [b["series"].flatten().tolist() for b in itertools.islice(  # noqa: E731
        data.train_loader("train", 4, seed=0, stop=3, **{"start": 0, **k}), 3)]  # fmt: skip
    assert take() == [[0, 1, 2, 3], [100, 101, 102, 103], [200, 201, 202, 203]]
    assert take(start=1)[0] == [100, 101, 102, 103]
    assert take(rank=1, world=2)[0] == [2, 3]
    assert sum(len(b["index"]) for b in data.eval_loader("train", 4)) == 7


def test_what_is_wrong_with_data_is_said():
    with pytest.raises(DataError, match="'train' is empty"):
        DataModule({"train": []}, TASK)
    with pytest.raises(DataError, match="no split 'tran'; did you mean 'train'"):
        module()["tran"]
    ragged = DataModule({"train": [{"x": torch.zeros(1)}, {"x": torch.zeros(2)}]}, TASK)
    with pytest.raises(DataError, match="samples of split 'train' do not make a batch"):
        ragged.sample("train")
    with pytest.raises(DataError, match="give a data set or a DataLoader"):
        as_data_module({"train": 3})
    with pytest.raises(DataError, match="batch sampler of its own"):
        as_data_module(torch.utils.data.DataLoader([1, 2], batch_sampler=[[0], [1]]))


def test_tasks_are_guessed_from_their_targets():
    kinds = {
        "classification": torch.zeros(2, dtype=torch.long),
        "multilabel": torch.zeros(2, 3),
        "regression": torch.zeros(2),
    }
    assert {kind: guess_task({"label": label}).kind for kind, label in kinds.items()} == {k: k for k in kinds}
    assert guess_task({"mask": 0}).kind == "segmentation"
    assert guess_task({"image": 0}).kind == "unlabelled"
