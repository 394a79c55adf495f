import pytest
import torch
from pydantic import ValidationError

from kd_demo.columns import corrupt
from kd_demo.digits import digits
from kd_demo.grammar import _WORDS, THEME_LIST, TOKENIZER, Tokenizer
from kd_demo.options import DigitsOptions, SentencesOptions, ShapesOptions, TopicsOptions
from kd_demo.shapes import CLASSES, shapes
from kd_demo.text import sentences, topics
from kdcore.data import IGNORE

MAKE = {
    "digits": lambda **o: digits(DigitsOptions(**o)),
    "shapes": lambda **o: shapes(ShapesOptions(**{"train": 40, "val": 10, "test": 10, **o})),
    "topics": lambda **o: topics(TopicsOptions(**{"train": 40, "val": 10, "test": 10, **o})),
    "sentences": lambda **o: sentences(SentencesOptions(**{"train": 40, "val": 10, "test": 10, **o})),
}


def column(data, name, split="train"):
    return data[split].columns[name]


def same(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.parametrize("name", MAKE)
def test_splits_are_the_same_for_a_seed_and_differ_between_seeds_and_splits(name):
    seed = "split_seed" if name == "digits" else "seed"
    first, again, other = MAKE[name](), MAKE[name](), MAKE[name](**{seed: 1})
    for split in ("train", "val", "test"):
        assert same(first.sample(split, 8), again.sample(split, 8))
    assert not same(first.sample("train", 8), other.sample("train", 8))
    assert not same(first.sample("train", 8), first.sample("val", 8))


def test_digits_are_images_in_the_unit_range_and_every_one_is_in_one_split():
    data = MAKE["digits"]()
    batch = data.sample("train", 64)
    assert batch["image"].shape == (64, 1, 8, 8)
    assert batch["image"].dtype == torch.float32
    assert (batch["image"].min(), batch["image"].max()) == (0, 1)
    assert batch["label"].dtype == torch.long
    assert data.task.classes == tuple("0123456789")
    assert sum(len(data[split]) for split in data.splits) == 1797
    images = torch.cat([column(data, "image", split) for split in data.splits]).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # the images are all different, so that none is in two splits


def test_digit_splits_hold_the_same_share_of_every_digit():
    data = MAKE["digits"](val_fraction=0.1, test_fraction=0.3)
    everything = torch.cat([column(data, "label", split) for split in data.splits]).bincount()
    assert (column(data, "label", "test").bincount() - 0.3 * everything).abs().max() <= 1
    assert (column(data, "label", "val").bincount() - 0.1 * everything).abs().max() <= 1


def test_a_fraction_of_the_digits_keeps_at_least_one_of_each_and_leaves_val_and_test_alone():
    whole, few = MAKE["digits"](), MAKE["digits"](train_fraction=0.001)
    assert sorted(column(few, "label").tolist()) == list(range(10))
    for split in ("val", "test"):
        assert torch.equal(column(whole, "image", split), column(few, "image", split))


def test_digits_with_parity_hide_five_digits_in_each_class():
    data = MAKE["digits"](parity=True)
    assert data.task.num_classes == 2
    assert torch.equal(column(data, "subclass") % 2, column(data, "label"))
    assert len(column(data, "subclass").unique()) == 10


def test_digit_label_noise_touches_training_labels_only():
    clean, noisy = MAKE["digits"](), MAKE["digits"](label_noise=0.3)
    changed = (column(clean, "label") != column(noisy, "label")).float().mean()
    assert changed == pytest.approx(0.3, abs=0.05)
    assert torch.equal(column(clean, "label", "val"), column(noisy, "label", "val"))


def test_corrupted_labels_are_always_other_classes_and_each_of_them():
    labels = torch.zeros(1000, dtype=torch.long)
    noisy = corrupt(labels, 4, 1.0, torch.Generator().manual_seed(0))
    assert noisy.unique().tolist() == [1, 2, 3]


def test_digit_splits_that_leave_nothing_to_train_on_are_refused():
    with pytest.raises(ValidationError, match="less than a tenth"):
        DigitsOptions(val_fraction=0.5, test_fraction=0.5)


def test_augmented_digits_depend_on_seed_and_step_and_not_on_what_came_before():
    data = MAKE["digits"](augment=True)

    def images(start, stop, seed=0, augment=True):
        loader = data.train_loader("train", 100, seed=seed, start=start, stop=stop, augment=augment)
        return [(batch["index"], batch["image"]) for batch in loader]

    whole, resumed = images(0, 12), images(8, 12)
    for (index, image), (index_again, image_again) in zip(whole[8:], resumed, strict=True):
        assert torch.equal(index, index_again)
        assert torch.equal(image, image_again)
    index, plain = images(0, 1, augment=False)[0]
    assert torch.equal(index, whole[0][0])
    assert 0.005 < (plain - whole[0][1]).abs().mean() < 0.2
    assert whole[0][1].min() >= 0
    assert whole[0][1].max() <= 1
    assert not torch.equal(images(0, 1, seed=1)[0][1], whole[0][1])


def test_augmentation_differs_between_epochs():
    data = MAKE["digits"](augment=True, train_fraction=0.001)
    first, second = data.train_loader("train", 10, seed=0, start=0, stop=2)
    assert sorted(first["index"].tolist()) == sorted(second["index"].tolist())
    assert not torch.equal(first["image"][first["index"].argsort()], second["image"][second["index"].argsort()])


def test_shapes_have_pixel_labels_of_every_class():
    data = MAKE["shapes"](size=48)
    batch = data.sample("train", 40)
    assert batch["image"].shape == (40, 3, 48, 48)
    assert batch["mask"].shape == (40, 48, 48)
    assert batch["mask"].dtype == torch.long
    assert batch["image"].min() >= 0
    assert batch["image"].max() <= 1
    assert batch["mask"].unique().tolist() == list(range(len(CLASSES)))
    assert (batch["mask"] > 0).flatten(1).any(1).all()


def test_a_shape_image_does_not_depend_on_how_many_there_are():
    few, many = MAKE["shapes"](train=5), MAKE["shapes"](train=40)
    assert same(few.sample("train", 5), many.sample("train", 5))


def test_shapes_without_noise_have_one_colour_per_shape():
    data = MAKE["shapes"](noise=0.0)
    for sample in (data["train"][i] for i in range(5)):
        colours = sample["image"][:, sample["mask"] > 0].T.unique(dim=0)
        assert 1 <= len(colours) <= 4


def test_shape_label_noise_touches_training_pixels_only():
    clean, noisy = MAKE["shapes"](), MAKE["shapes"](label_noise=0.2)
    assert (column(clean, "mask") != column(noisy, "mask")).float().mean() == pytest.approx(0.2, abs=0.02)
    assert same(clean.sample("val", 10), noisy.sample("val", 10))


def test_topics_are_padded_sentences_with_their_text():
    batch = MAKE["topics"]().sample("train", 16)
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert torch.equal(batch["attention_mask"] == 0, batch["input_ids"] == TOKENIZER.pad_id)
    assert (batch["attention_mask"] == 0).any()
    assert [TOKENIZER.decode(row) for row in batch["input_ids"]] == batch["text"]
    assert TOKENIZER.unknown_id not in batch["input_ids"]


def test_topics_hide_themes_and_map_to_two_classes_by_parity():
    data, binary = MAKE["topics"](), MAKE["topics"](binary=True)
    of_theme = torch.tensor([topic for topic, _ in THEME_LIST])
    assert torch.equal(of_theme[column(data, "subclass")], column(data, "label"))
    assert torch.equal(column(data, "label") % 2, column(binary, "label"))
    assert column(data, "text") == column(binary, "text")
    assert (data.task.num_classes, binary.task.num_classes) == (6, 2)
    assert binary.task.classes[1] == "cooking+music+medicine"


def test_without_confusion_every_noun_is_of_its_theme():
    nouns = [words[0] for words in _WORDS]
    everything = {word for theme in nouns for word in theme}
    assert sum(map(len, nouns)) == len(everything)  # no noun belongs to two themes
    for sample in (MAKE["topics"](confusion=0.0)["train"][i] for i in range(40)):
        assert everything & set(sample["text"].split()) <= set(nouns[sample["subclass"]])


def test_sentence_labels_are_the_next_tokens_aligned_with_the_logits():
    data = MAKE["sentences"]()
    batch = data.sample("train", 16)
    ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
    assert ids.shape == labels.shape == mask.shape
    inside = mask[:, 1:].bool()
    assert torch.equal(labels[:, :-1][inside], ids[:, 1:][inside])
    assert (labels[:, -1] == IGNORE).all()
    assert ((labels == IGNORE).sum(1) == (mask == 0).sum(1) + 1).all()
    assert (ids[:, 0] == TOKENIZER.start_id).all()
    assert ((ids == TOKENIZER.end_id).sum(1) == 1).all()
    assert data.task.num_classes == len(data.task.tokenizer)
    assert data.task.vocabulary == TOKENIZER.fingerprint


def test_the_tokenizer_reads_back_what_it_wrote_and_knows_what_it_does_not_know():
    assert TOKENIZER.decode([TOKENIZER.start_id, *TOKENIZER.encode("The cello flooded ."), TOKENIZER.end_id, 0]) == (
        "the cello flooded ."
    )
    assert TOKENIZER.encode("zeppelin") == [TOKENIZER.unknown_id]
    assert TOKENIZER.words[0] == "<pad>"


def test_a_fingerprint_tells_vocabularies_apart():
    assert Tokenizer(["a", "b"]).fingerprint == Tokenizer(["b", "a", "a"]).fingerprint
    assert Tokenizer(["a", "b"]).fingerprint != Tokenizer(["a", "c"]).fingerprint
