import json
import subprocess
import sys
import textwrap

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image
from pydantic import ValidationError

from kd_datasets.data import columns_teacher, hub_or_local
from kd_datasets.options import AUGMENTATIONS, ColumnsOptions, DatasetsOptions
from kd_datasets.pictures import STEPS
from kd_datasets.texts import load_tokenizer
from kdcore import PluginManager
from kdcore.data import IGNORE
from kdcore.errors import DataError

datasets.disable_progress_bars()
WORDS = ["good", "bad", "dull", "fine", "film", "plot", "very", "a"]
REVIEWS = [("a good film", "pos"), ("a very dull plot", "neg"), ("bad", "neg"), ("fine film", "pos")] * 3


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(path, **options):
    return hub_or_local(DatasetsOptions(path=str(path), **options))


def refusal(path, **options):
    with pytest.raises(DataError) as caught:
        load(path, **options)
    return str(caught.value)


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.csv"
    path.write_text("review,sentiment,stars\n" + "".join(f"{t},{s},{len(t)}\n" for t, s in REVIEWS))
    return path


@pytest.fixture
def tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    whole = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    whole.save_pretrained(tmp_path / "tok")
    return tmp_path / "tok"


@pytest.fixture
def pictures(tmp_path):
    """Pictures of 20 x 30 pixels, brighter above and at the left: class `dark` below 100, class `light` above."""
    for split, count in (("train", 6), ("validation", 4)):
        for name, start in (("light", 150), ("dark", 10)):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                gradient = np.full((30, 20, 3), start + i, dtype=np.uint8)
                gradient[:15] += 60
                gradient[:, :5] += 20
                Image.fromarray(gradient).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def draw_scene(path, i):
    """A picture whose left part is white where the mask is 1; the mask's lowest row does not count (255)."""
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[:, : 4 + i] = 1
    image = np.repeat(mask[..., None] * 255, 3, axis=2)
    mask[-1] = 255
    Image.fromarray(image).save(path / f"image{i}.png")
    Image.fromarray(mask).save(path / f"mask{i}.png")


@pytest.fixture
def scenes(tmp_path):
    rows = []
    for i in range(8):
        draw_scene(tmp_path, i)
        rows.append({"photo": f"image{i}.png", "target": f"mask{i}.png"})
    (tmp_path / "scenes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "scenes.jsonl"


SCENES = {"image": "photo", "mask": "target", "classes": ["ground", "thing"], "ignore_label": 255}


# -- the plugin ------------------------------------------------------------------------------------------------------


def test_the_plugin_loads_without_anything_heavy():
    code = """
        import sys
        import kd_datasets.plugin, kd_datasets.options
        assert not {"torch", "datasets", "torchvision", "transformers"} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manager = PluginManager()
    assert manager.get("data", "datasets").load_target() is hub_or_local
    assert manager.get("teacher", "columns").load_target() is columns_teacher


# -- tables ----------------------------------------------------------------------------------------------------------


def test_csv_strings_become_classes_in_sorted_order(reviews):
    data = load(reviews, text="review", label="sentiment")
    assert (data.task.kind, data.task.classes) == ("classification", ("neg", "pos"))
    batch = data.sample("train", 4)
    assert batch["label"].tolist() == [1, 0, 0, 1]
    assert batch["text"] == [text for text, _ in REVIEWS[:4]]


def test_the_option_classes_sets_the_order(reviews):
    data = load(reviews, text="review", label="sentiment", classes=["pos", "neg"])
    assert data.task.classes == ("pos", "neg")
    assert data.sample("train", 4)["label"].tolist() == [0, 1, 1, 0]


def test_columns_named_like_roles_need_no_mapping(tmp_path):
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]}).to_parquet(tmp_path / "d.parquet")
    data = load(tmp_path / "d.parquet")
    assert (data.task.kind, data.task.num_classes, data.task.classes) == ("classification", 3, ())


def test_text_is_tokenised_and_padded_to_the_longest_of_the_batch(reviews, tokenizer):
    data = load(reviews, text="review", label="sentiment", tokenizer=str(tokenizer), max_length=3)
    batch = data.sample("train", 3)
    assert batch["input_ids"].tolist() == [[9, 2, 6], [9, 8, 4], [3, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 0]]
    assert "text" not in batch
    assert data.task.tokenizer.decode([9, 2]) == "a good"


def test_samples_kept_in_memory_are_made_once_and_cannot_be_spoilt(reviews, tokenizer):
    data = load(reviews, text="review", label="sentiment", tokenizer=str(tokenizer), in_memory=True)
    split = data["train"]
    split[0]["label"] = None
    assert split[0]["label"] is not None
    assert split[0]["input_ids"] is split[0]["input_ids"]
    assert data.labels("train").tolist() == [int(split[i]["label"]) for i in range(len(split))]


def test_a_language_models_labels_are_the_next_tokens(reviews, tokenizer):
    data = load(reviews, text="review", tokenizer=str(tokenizer))
    assert (data.task.kind, data.task.num_classes) == ("causal-lm", len(WORDS) + 2)
    batch = data.sample("train", 3)
    assert batch["input_ids"].tolist() == [[9, 2, 6, 0], [9, 8, 4, 7], [5, 6, 0, 0]]
    assert batch["labels"].tolist() == [[2, 6, IGNORE, IGNORE], [8, 4, 7, IGNORE], [6, *[IGNORE] * 3]]


def test_numbers_are_regressed_and_further_columns_are_tensors(tmp_path):
    rows = [{"text": "a", "label": 0.5 * i, "said": [i, 1.0], "id": i} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(tmp_path / "d.jsonl", columns={"teacher_logits": "said", "number": "id"})
    batch = data.sample("train", 2)
    assert data.task.kind == "regression"
    assert batch["label"].tolist() == [0.0, 0.5]
    assert torch.equal(batch["teacher_logits"], torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    assert batch["number"].tolist() == [0, 1]


def test_lists_of_labels_become_zeros_and_ones(tmp_path):
    Dataset.from_dict({"text": ["x", "y", "z"], "label": [["b", "a"], [], ["c"]]}).to_parquet(tmp_path / "d.parquet")
    data = load(tmp_path / "d.parquet")
    assert (data.task.kind, data.task.classes) == ("multilabel", ("a", "b", "c"))
    assert data.sample("train", 3)["label"].tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_class_names_of_the_features_can_be_reordered_and_ignored(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y", "z"])})
    rows = Dataset.from_dict({"text": list("abcd"), "label": [0, 1, 2, -1]}, features=features)
    DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    data = load(tmp_path / "saved", classes=["z", "y", "x"], ignore_label=1)
    assert set(data.splits) == {"train", "test"}
    assert data.sample("test", 4)["label"].tolist() == [2, IGNORE, 0, IGNORE]


# -- splits ----------------------------------------------------------------------------------------------------------


def test_val_is_cut_off_train_by_the_seed(reviews):
    options = {"text": "review", "label": "stars", "task": "regression", "val_fraction": 0.25}
    one, same, other = (load(reviews, **options, seed=seed) for seed in (1, 1, 2))
    assert (len(one["train"]), len(one["val"])) == (9, 3)
    assert [s["label"] for s in one["val"]] == [s["label"] for s in same["val"]]
    assert [s["text"] for s in one["train"]] != [s["text"] for s in other["train"]]


def test_slices_pass_through(reviews):
    splits = {"train": "train[:50%]", "val": "train[50%:]", "test": "train[:1]+train[-1:]"}
    data = load(reviews, text="review", splits=splits)
    assert [len(data[name]) for name in splits] == [6, 6, 2]
    assert data["val"][0]["text"] == REVIEWS[6][0]


def test_further_splits_can_be_named(reviews):
    assert len(load(reviews, text="review", splits={"train": "train", "probe": "train[:2]"})["probe"]) == 2


# -- images ----------------------------------------------------------------------------------------------------------


def test_an_image_folder_under_split_folders(pictures):
    data = load(pictures, size=16)
    assert data.task.classes == ("dark", "light")
    assert data.task.image == (3, 16, 16)
    assert (len(data["train"]), len(data["val"])) == (12, 8)
    sample = data["val"][0]
    assert type(sample["image"]) is torch.Tensor
    assert sample["image"].dtype == torch.float32
    means = {int(s["label"]): float(s["image"].mean()) for s in data["val"]}
    assert means[0] == pytest.approx((10 + 1.5 + 30 + 5) / 255, abs=0.02)
    assert means[1] == pytest.approx((150 + 1.5 + 30 + 5) / 255, abs=0.02)


def test_class_folders_directly_are_one_split_whatever_their_names(tmp_path):
    for name in ("train-engine", "testtube"):
        (tmp_path / "d" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "d" / name / "0.png")
    data = load(tmp_path / "d")
    assert list(data.splits) == ["train"]
    assert data.task.classes == ("testtube", "train-engine")
    assert data.task.image == (3, 4, 4)


def test_evaluation_images_are_resized_and_cropped_in_the_centre(pictures):
    whole = load(pictures, size=(30, 20), channels=1)["val"][0]["image"]
    zoomed = load(pictures, size=(30, 20), channels=1, crop_fraction=0.5)["val"][0]["image"]
    assert whole.shape == zoomed.shape == (1, 30, 20)
    assert torch.allclose(whole[:, 0], whole[:, 14])
    assert torch.allclose(zoomed[:, :12, 2:], whole[:, :1, 10:11].expand(-1, 12, 18))
    wide = load(pictures, size=20)["val"][0]["image"]
    assert torch.allclose(wide, load(pictures)["val"][0]["image"][:, 5:25])


AUGMENT = ["random-resized-crop", "flip", {"color-jitter": {"brightness": 0.5}}, "randaugment"]


def batches(data, workers=0, seed=3, **options):
    loader = data.train_loader("train", 4, seed=seed, start=0, stop=6, workers=workers, **options)
    return [batch["image"] for batch in loader]


def test_augmentation_depends_on_seed_epoch_and_index_alone(pictures):
    first, second = (load(pictures, size=16, augment=AUGMENT) for _ in range(2))
    expected = batches(first)
    assert all(image.shape == (4, 3, 16, 16) and image.min() >= 0 and image.max() <= 1 for image in expected)
    torch.manual_seed(77)
    for workers in (0, 2):
        assert all(map(torch.equal, expected, batches(second, workers)))
    assert not torch.equal(expected[0], batches(first, seed=4)[0])
    later = first.train_loader("train", 4, seed=3, start=4, stop=6)
    assert torch.equal(next(iter(later))["image"], expected[4])


def test_without_augmentation_train_is_prepared_like_the_other_splits(pictures):
    plain, augmented = load(pictures, size=16), load(pictures, size=16, augment=AUGMENT)
    expected = next(iter(plain.eval_loader("train", 12)))["image"]
    assert torch.equal(next(iter(augmented.eval_loader("train", 12)))["image"], expected)
    assert torch.equal(batches(augmented, augment=False)[0], batches(plain)[0])
    assert augmented["train"][0]["image"].shape == (3, 30, 20)


@pytest.mark.parametrize("step", AUGMENTATIONS)
def test_every_step_keeps_the_size_and_changes_some_image(pictures, step):
    plain, data = load(pictures, size=16), load(pictures, size=16, augment=[step])
    changed = torch.stack(batches(data))
    assert changed.shape == (6, 4, 3, 16, 16)
    assert not torch.allclose(changed, torch.stack(batches(plain)), atol=1e-3)


def test_the_named_steps_are_the_ones_there_are():
    assert tuple(STEPS) == AUGMENTATIONS


# -- masks -----------------------------------------------------------------------------------------------------------


def test_masks_are_classes_with_ignored_pixels(scenes):
    data = load(scenes, **SCENES)
    sample = data["train"][2]
    assert (data.task.kind, data.task.num_classes, data.task.image) == ("segmentation", 2, (3, 16, 24))
    assert sample["mask"].dtype == torch.int64
    assert sample["mask"][0].tolist() == [1] * 6 + [0] * 18
    assert set(sample["mask"][-1].tolist()) == {IGNORE}


def test_reduced_masks_count_from_one(tmp_path):
    Image.fromarray(np.array([[0, 1], [2, 255]], dtype=np.uint8)).save(tmp_path / "m.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "i.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "i.png", "mask": "m.png"}))
    data = load(tmp_path / "d.jsonl", classes=2, ignore_label=255, reduce_labels=True)
    assert data["train"][0]["mask"].tolist() == [[IGNORE, 0], [1, IGNORE]]


def test_image_and_mask_move_together(scenes):
    steps = ["random-resized-crop", "flip", {"rotation": {"degrees": 30}}]
    data = load(scenes, **SCENES, size=(16, 24), augment=steps)
    moved = 0
    for batch in data.train_loader("train", 8, seed=0, start=0, stop=4):
        image, mask = batch["image"][:, 0], batch["mask"]
        counted = mask != IGNORE
        # The rotation leaves corners black outside the picture; inside, white is class 1 up to the blurred edge.
        assert ((image > 0.5) == (mask == 1))[counted].float().mean() > 0.95
        moved += int((mask[:, 0, :4] != 1).any())
        assert set(mask.unique().tolist()) <= {IGNORE, 0, 1}
    assert moved


def test_a_scaled_crop_shows_image_and_mask_at_many_scales_and_fills_up_with_what_does_not_count(scenes):
    data = load(scenes, **SCENES, size=(16, 16), augment=["random-scale-crop"])
    filled, whites = 0, set()
    for batch in data.train_loader("train", 8, seed=0, start=0, stop=6):
        image, mask = batch["image"][:, 0], batch["mask"]
        assert mask.shape[1:] == (16, 16)
        counted = mask != IGNORE
        assert ((image > 0.5) == (mask == 1))[counted].float().mean() > 0.95
        filled += int((~counted & (image == 0)).any())
        whites |= set((mask == 1).sum((1, 2)).tolist())
    assert filled
    assert len(whites) > 8
    assert "two positive factors" in refusal(scenes, **SCENES, augment=[{"random-scale-crop": {"scale": [2, 1]}}])


def test_images_keep_their_size_in_evaluation_where_that_is_asked_for(scenes):
    data = load(scenes, **SCENES, size=(8, 8), eval_resize=False, splits={"train": "train", "val": "train"})
    assert data["train"][0]["mask"].shape == (8, 8)
    sizes = {tuple(batch["mask"].shape[1:]) for batch in data.eval_loader("val", 1)}
    assert (16, 24) in sizes
    assert "only a segmentation" in refusal(scenes, image="photo", eval_resize=False)


def test_images_of_different_sizes_do_not_make_a_batch(tmp_path):
    for number, side in enumerate((4, 6)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{number}.jpg")
        Image.new("L", (side, side)).save(tmp_path / f"{number}.png")
    lines = [json.dumps({"image": f"{i}.jpg", "mask": f"{i}.png"}) for i in range(2)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    data = load(tmp_path / "d.jsonl", classes=2, eval_resize=False, size=4, splits={"train": "train", "val": "train"})
    assert [tuple(batch["image"].shape) for batch in data.eval_loader("val", 1)] == [(1, 3, 4, 4), (1, 3, 6, 6)]
    with pytest.raises(DataError, match=r"4 x 4, 6 x 6.*eval_batch_size: 1"):
        next(iter(data.eval_loader("val", 2)))


def test_a_mask_of_another_size_than_its_image_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "i.png")
    Image.new("L", (4, 5)).save(tmp_path / "m.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"image": "i.png", "mask": "m.png"}))
    with pytest.raises(DataError, match="this one is 5 x 4, and the image 4 x 4"):
        load(tmp_path / "d.jsonl", classes=2)["train"][0]


# -- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_shuffled_by_seed_and_epoch(reviews):
    options = {"text": "review", "label": "stars", "task": "regression", "streaming": True, "shuffle_buffer": 12}

    def order(data, start=0):
        loader = data.train_loader("train", 6, seed=0, start=start, stop=4)
        return [batch["text"] for _, batch in zip(range(4 - start), loader, strict=False)]

    first, again = order(load(reviews, **options)), order(load(reviews, **options))
    assert first == again
    assert first[:2] != first[2:]
    assert sorted(first[0] + first[1]) == sorted(text for text, _ in REVIEWS)
    assert order(load(reviews, **options), start=2) == first[2:]
    assert order(load(reviews, **options, seed=5)) != first
    assert load(reviews, **options).size("train") is None


def test_a_stream_of_pictures_is_augmented_like_the_rest(pictures):
    data = load(pictures, size=16, streaming=True, augment=["flip", "random-resized-crop"])
    first = next(iter(data.train_loader("train", 4, seed=0, start=0, stop=1)))["image"]
    assert first.shape == (4, 3, 16, 16)
    assert data.sample("val", 2)["label"].tolist() == [0, 0]


def test_streams_refuse_what_they_cannot_do(reviews):
    options = {"text": "review", "streaming": True}
    assert "a stream has no slices" in refusal(reviews, **options, splits={"train": "train[:5]"})
    assert "cut off a stream" in refusal(reviews, **options, val_fraction=0.5)
    assert "does not say its classes" in refusal(reviews, **options, label="sentiment")
    data = load(reviews, **options, label="sentiment", classes=["neg", "pos"])
    assert data.sample("train", 4)["label"].shape == (4,)


# -- errors ----------------------------------------------------------------------------------------------------------


def test_missing_files_columns_and_splits_are_named(reviews, tmp_path):
    assert "there is no such file or folder" in refusal(tmp_path / "none.csv")
    (tmp_path / "x.xml").write_text("")
    assert "files of this kind are not read" in refusal(tmp_path / "x.xml")
    message = refusal(reviews, text="reviews", label="sentiment")
    assert "did you mean 'review'?" in message
    assert "all: review, sentiment, stars" in message
    assert "columns.x: the data has no column" in refusal(reviews, text="review", columns={"x": "logits"})
    assert "no split 'test'" in refusal(reviews, text="review", splits={"train": "test"})
    assert "is no split and no slice" in refusal(reviews, text="review", splits={"train": "train[what]"})
    assert "the columns: review, sentiment, stars" in refusal(reviews)
    assert "needs a column of masks" in refusal(reviews, text="review", task="segmentation")


def test_labels_that_are_no_classes_are_named(reviews, tmp_path):
    named = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).cast_column(
        "label", ClassLabel(names=["neg", "pos"])
    )
    named.to_parquet(tmp_path / "named.parquet")
    assert "no class 'positive'; did you mean 'pos'" in refusal(tmp_path / "named.parquet", classes=["neg", "positive"])
    message = refusal(reviews, text="review", label="sentiment", classes=["positive", "neg"])
    assert "the data also has 'pos'; did you mean 'positive'" in message
    data = load(reviews, text="review", label="stars", classes=4)
    with pytest.raises(DataError, match="the label 11 is none of the 4 classes"):
        data.sample("train", 1)
    (tmp_path / "d.csv").write_text("text,label,extra\na,0,word\n")
    with pytest.raises(DataError, match="column 'extra' holds 'word'"):
        load(tmp_path / "d.csv", columns={"x": "extra"}).sample("train", 1)


def test_a_damaged_picture_is_named(pictures):
    (pictures / "train" / "dark" / "0.png").write_bytes(b"no picture")
    data = load(pictures, size=16, splits={"val": "validation", "train": "train"})
    with pytest.raises(DataError, match=r"the picture .*train/dark/0\.png cannot be read"):
        data.sample("train", 12)


def test_masks_that_do_not_fit_are_refused(scenes, tmp_path):
    with pytest.raises(DataError, match="the value 255, but there are 2 classes"):
        load(scenes, **{**SCENES, "ignore_label": None})["train"][0]
    with pytest.raises(DataError, match="one channel"):
        load(scenes, **{**SCENES, "mask": "photo"})["train"][0]
    assert "class names in the order" in refusal(scenes, image="photo", mask="target")
    assert "moves images without their masks" in refusal(scenes, **SCENES, augment=["randaugment"])


def test_wrong_augmentations_are_refused(pictures, reviews):
    with pytest.raises(ValidationError, match="did you mean 'flip'"):
        DatasetsOptions(path="x", augment=["flipp"])
    assert "'rotation' cannot be made with" in refusal(pictures, augment=[{"rotation": {"angle": 3}}])
    assert "no column of them" in refusal(reviews, text="review", augment=["flip"])


def test_texts_without_what_they_need_are_refused(reviews, tmp_path, monkeypatch):
    assert "a language model's texts need one" in refusal(reviews, text="review", task="causal-lm")
    assert "is no folder of a tokenizer" in refusal(reviews, text="review", tokenizer=str(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DataError, match=r"pip install 'kd-datasets\[text\]'"):
        load_tokenizer(str(tmp_path))


def test_an_unreadable_table_says_why(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR?")
    assert "d.parquet' cannot be read" in refusal(tmp_path / "d.parquet")


def test_the_hub_without_a_connection_says_what_to_do(monkeypatch):
    for name in ("datasets.config.HF_HUB_OFFLINE", "huggingface_hub.constants.HF_HUB_OFFLINE"):
        monkeypatch.setattr(name, True)
    message = refusal("owner/some-data")
    assert "could not be fetched from the Hugging Face Hub" in message
    assert "save_to_disk" in message


# -- downloads and the teacher in columns ----------------------------------------------------------------------------


def test_downloads_name_hub_data_and_no_local_ones(reviews, monkeypatch):
    class File:
        size = 700

    class Api:
        def dataset_info(self, path, **options):
            if path != "owner/known":
                raise ConnectionError
            return type("Info", (), {"siblings": [File(), File()]})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert DatasetsOptions(path=str(reviews)).downloads() == []
    assert DatasetsOptions(path="not/there.csv").downloads() == []
    [known] = DatasetsOptions(path="owner/known").downloads()
    assert (known.name, known.source, known.size) == ("owner/known", "Hugging Face Hub", 1400)
    unknown, tokenizer = DatasetsOptions(path="owner/other", tokenizer="gpt2").downloads()
    assert (unknown.size, tokenizer.name) == (None, "gpt2")


def test_a_teacher_reads_its_signals_from_columns(tmp_path):
    rows = [{"text": "a", "label": i % 2, "l": [i, 0.0], "e": [1.0, 2.0, i]} for i in range(4)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = load(tmp_path / "d.jsonl", columns={"teacher_logits": "l", "teacher_embedding": "e"})
    options = ColumnsOptions(logits="teacher_logits", embedding="teacher_embedding")
    outputs = columns_teacher(options, data.task)(data.sample("train", 2))
    assert outputs.logits.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert outputs.embedding.shape == (2, 3)
    with pytest.raises(ValidationError, match="name the batch key"):
        ColumnsOptions()
