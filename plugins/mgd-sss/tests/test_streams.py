import pickle

import pytest
import torch

from kd_mgd_sss.options import MGDSSSOptions
from kd_mgd_sss.streams import FIRST, LABELLED, SECOND, divide, streams
from kdcore.data import DataModule, Task
from kdcore.errors import DataError

TASK = Task("segmentation", num_classes=3, image=(3, 8, 10))


def flipped(sample):
    return {"image": sample["image"].flip(-1) if torch.rand(()) < 0.5 else sample["image"], "mask": sample["mask"]}


def samples(count: int):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, 8, 10, generator=generator)
    return [{"image": image, "mask": torch.full((8, 10), i % 3)} for i, image in enumerate(images)]


def data(count: int = 24, **splits: int) -> DataModule:
    made = {name: samples(size) for name, size in {"train": count, **splits}.items()}
    return DataModule(made, TASK, augment=flipped)


def batches(made: DataModule, split: str, rank: int = 0, world: int = 1, accumulation: int = 1):
    return list(made.train_loader(split, 4, seed=3, start=2, stop=9, rank=rank, world=world, accumulation=accumulation))


@pytest.mark.parametrize(
    ("images", "fraction", "count"),
    [(10582, "1/16", 662), (10582, "1/8", 1323), (10582, "1/4", 2646), (2975, "1/16", 186), (2975, "1/2", 1488)],
)
def test_fractions_label_as_many_images_as_the_papers_lists(images, fraction, count):
    labelled, unlabelled = divide(images, MGDSSSOptions(labelled_fraction=fraction), seed=0)
    assert len(labelled) == count
    assert sorted([*labelled, *unlabelled]) == list(range(images))


def test_seed_decides_which_images_are_labelled():
    found = [divide(40, MGDSSSOptions(), seed)[0] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(found[0]) == 5  # an eighth


@pytest.mark.parametrize(("size", "fraction"), [(15, "1/16"), (3, 0.25)])
def test_fractions_that_leave_no_labelled_image_are_refused(size, fraction):
    with pytest.raises(DataError, match=f"leaves no labelled image; take 1/{size} or more"):
        divide(size, MGDSSSOptions(labelled_fraction=fraction), 0)


def test_nothing_unlabelled_is_refused(tmp_path):
    with pytest.raises(DataError, match="no unlabelled image"):
        divide(1, MGDSSSOptions(labelled_list=str(listed(tmp_path, "0"))), 0)
    with pytest.raises(DataError, match="no unlabelled image"):
        divide(2, MGDSSSOptions(labelled_fraction=0.9), 0)


def listed(folder, text: str, name: str = "labelled.txt"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_lists_say_which_images_are_labelled(tmp_path):
    one, two = listed(tmp_path, "# three of them\n4\n\n 1 # the second\n7\n"), listed(tmp_path, "0\n2\n", "other.txt")
    labelled, unlabelled = divide(9, MGDSSSOptions(labelled_list=str(one)), 0)
    assert (list(labelled), list(unlabelled)) == ([4, 1, 7], [0, 2, 3, 5, 6, 8])
    assert divide(9, MGDSSSOptions(labelled_list=str(one), unlabelled_list=str(two)), 0)[1] == [0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("1\n9", "line 2: '9' is not the position.*from 0 to 8"), ("a.png", "line 1: 'a.png' is not"), ("-1", "'-1'"),
     ("3\n3", "line 2: '3'.*before"), ("# none\n", "names no image"), ("²", "line 1")],
)  # fmt: skip
def test_lists_that_cannot_be_read_are_refused(text, message, tmp_path):
    with pytest.raises(DataError, match=message):
        divide(9, MGDSSSOptions(labelled_list=str(listed(tmp_path, text))), 0)


def test_lists_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt cannot be read"):
        divide(9, MGDSSSOptions(labelled_list=str(tmp_path / "nowhere.txt")), 0)


def test_an_epoch_is_one_of_the_stream_with_more_images():
    assert streams(data(), MGDSSSOptions(), 0)[1] == (FIRST, SECOND, LABELLED)
    assert streams(data(), MGDSSSOptions(labelled_fraction=0.75), 0)[1] == (LABELLED, FIRST, SECOND)


def test_a_split_of_its_own_holds_the_unlabelled_images():
    made, _ = streams(data(6, extra=20, val=2), MGDSSSOptions(unlabelled_split="extra"), 0)
    assert {name: made.size(name) for name in made.splits} == {
        "train": 6, "extra": 20, "val": 2, LABELLED: 6, FIRST: 20, SECOND: 20}  # fmt: skip


def test_splits_that_do_not_exist_are_named():
    with pytest.raises(DataError, match="no split 'unlabelled'"):
        streams(data(), MGDSSSOptions(unlabelled_split="unlabelled"), 0)


def test_samples_without_image_or_mask_are_refused():
    unlabelled = DataModule({"train": samples(2), "more": [{"picture": torch.zeros(3, 8, 10)}]}, TASK)
    with pytest.raises(DataError, match="unlabelled samples have no 'image', only: picture"):
        streams(unlabelled, MGDSSSOptions(unlabelled_split="more"), 0)
    pairs = DataModule({"train": [(torch.zeros(3, 8, 10), 0)] * 9}, TASK)
    with pytest.raises(DataError, match="labelled samples have no 'mask', only: image, label"):
        streams(pairs, MGDSSSOptions(), 0)


def test_streams_without_a_length_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from samples(4)

    with pytest.raises(DataError, match="is a stream"):
        streams(DataModule({"train": Stream()}, TASK), MGDSSSOptions(), 0)


def test_the_two_orders_of_unlabelled_images_differ_and_hold_no_labelled_one():
    made, _ = streams(data(), MGDSSSOptions(labelled_fraction=0.5), 0)
    orders = [torch.cat([batch["index"] for batch in batches(made, name)]) for name in (FIRST, SECOND)]
    assert not torch.equal(*orders)
    kept = {made.splits[FIRST].positions[i] for i in range(12)}
    assert kept.isdisjoint(made.splits[LABELLED].positions)


def test_masks_are_of_the_second_order_alone_and_change_with_the_epoch():
    made, _ = streams(data(), MGDSSSOptions(labelled_fraction=0.5), 0)
    found = batches(made, SECOND)
    assert found[0]["cutmix"].shape == (4, 1, 8, 10)
    masks: dict[int, list[torch.Tensor]] = {}
    for batch in found:
        for index, mask in zip(batch["index"].tolist(), batch["cutmix"], strict=True):
            masks.setdefault(index, []).append(mask)
    repeated = [several for several in masks.values() if len(several) > 1]
    assert repeated
    assert any(not torch.equal(several[0], several[1]) for several in repeated)
    assert "cutmix" not in batches(made, FIRST)[0]
    assert "cutmix" not in batches(made, LABELLED)[0]


@pytest.mark.parametrize(("world", "accumulation", "fraction"), [(2, 1, "1/8"), (1, 2, "1/8"), (2, 2, "1/2")])
def test_masks_and_images_are_the_same_on_any_number_of_processes(world, accumulation, fraction):
    made, names = streams(data(), MGDSSSOptions(labelled_fraction=fraction), 0)
    for name in names:
        whole = batches(made, name)
        parts = [batches(made, name, rank, world, accumulation) for rank in range(world)]
        for step, batch in enumerate(whole):
            micro = [parts[rank][step * accumulation + i] for i in range(accumulation) for rank in range(world)]
            for key, value in batch.items():
                torch.testing.assert_close(torch.cat([m[key] for m in micro]), value, rtol=0, atol=0)


def test_images_that_are_not_augmented_are_pasted_nowhere():
    made, _ = streams(data(), MGDSSSOptions(), 0)
    assert made.sample(SECOND)["cutmix"].sum() == 0


def test_tuple_samples_and_worker_processes_are_supported():
    pairs = [(sample["image"], sample["mask"]) for sample in samples(8)]
    made, _ = streams(DataModule({"train": pairs}, TASK, keys=("image", "mask")), MGDSSSOptions(), 0)
    assert made.sample(LABELLED).keys() == {"image", "mask", "index"}
    assert pickle.loads(pickle.dumps(made.augment)) == made.augment
