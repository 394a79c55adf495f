"""Teacher caches: filled once, read in place of the teacher, never for another input."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import filelock
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset, TensorDataset

import kdcore
from kdcore import Component, DataModule, Distill, Loss, Method, Model, Task
from kdcore.cache import Cached, Reader, _tensor, positions, read_facts, sample_digest
from kdcore.data import IGNORE
from kdcore.encoding import Encoder
from kdcore.errors import DataError, Interrupted, ModelError, RecipeError, RunFolderError
from kdcore.losses import Weighted
from kdcore.models import Labels, Outputs
from kdcore.options import CacheOptions

ASKED = {"count": 0, "interrupt": 10**9}


class Counted(nn.Module):
    """Counts the samples that it is asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(6, 5), nn.Tanh()), nn.Linear(5, 12)

    def forward(self, series: torch.Tensor) -> Outputs:
        ASKED["count"] += len(series)
        if ASKED["count"] > ASKED["interrupt"]:
            raise KeyboardInterrupt
        embedding = self.body(series)
        return Outputs(embedding=embedding, head=self.head)


class Noise(nn.Module):
    """Augmentation: a little noise."""

    def forward(self, sample):
        return {**sample, "series": sample["series"] + 0.5 * torch.randn(6)}


def data(augment: bool = False, rows: int = 80, first: float = 0.0) -> DataModule:
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    x[7, 0] += first
    y = (x[:, :3].sum(1) > 0).long()
    splits = {"train": TensorDataset(x[16:], y[16:]), "val": TensorDataset(x[:16], y[:16])}
    task = Task("classification", num_classes=12)
    return DataModule(splits, task, keys=("series", "label"), augment=Noise() if augment else None)


def teacher(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model(Counted(), labels=Labels(12))


def student(seed: int = 1) -> Model:
    torch.manual_seed(seed)
    return Model(nn.Linear(6, 12), labels=Labels(12))


class Soft(Loss):
    def forward(self, student, teacher, batch):
        return F.kl_div(student.logits.log_softmax(1), teacher.logits.softmax(1), reduction="batchmean")


class Alike(Loss):
    """Reads a tap and the embedding of the teacher."""

    needs = {"student": ("logits",), "teacher": ("features", "embedding")}

    def __init__(self) -> None:
        super().__init__()
        self.taps = {"teacher": ("body.*",)}

    def forward(self, student, teacher, batch):
        (_, after) = teacher.select(self.names["teacher"])
        torch.testing.assert_close(after, teacher.embedding, rtol=1e-2, atol=1e-2)
        return (student.logits.mean(1) - after.mean(1)).square().mean()


class Halves(Method):
    """Two stages on parts of the data that the method makes itself, the second with a data module of its own."""

    def stages(self, run):
        for number, part in enumerate((range(40, 64), range(8, 40))):
            stage = Distill(run.student, [Weighted(Soft(), name="soft")], run.teachers(), name=f"half-{number}")
            split = Subset(run.data["train"], part)
            stage.data = DataModule({"train": split, "val": run.data["val"]}, run.data.task, augment=run.data.augment)
            yield stage


class Mixes(Method):
    """Changes the inputs of a batch."""

    def stages(self, run):
        class Mixed(Distill):
            def forward(self, batch, objective="loss"):
                return super().forward({**batch, "series": batch["series"].flip(0)}, objective)

        yield Mixed(run.student, [Weighted(Soft(), name="soft")], run.teachers())


class Asks(Method):
    """Measures the teacher on a split that is not cached, too."""

    def stages(self, run):
        run.add_row("teacher", run.teacher)
        yield Distill(run.student, [Weighted(Soft(), name="soft")], run.teachers())


class Plugin:
    @kdcore.hookimpl
    def kd_register_methods(self):
        methods = {"halves": Halves, "mixes": Mixes, "asks": Asks}
        return [Component("method", name, cls) for name, cls in methods.items()]

    @kdcore.hookimpl
    def kd_register_losses(self):
        return [Component("loss", "soft12", lambda o: Soft()), Component("loss", "alike", lambda o: Alike())]


class TwoTeachers:
    @kdcore.hookimpl
    def kd_register_teachers(self):
        return [Component("teacher", "counted", lambda o, task: teacher())]

    @kdcore.hookimpl
    def kd_register_students(self):
        return [Component("student", "linear", lambda o, task: student())]

    @kdcore.hookimpl
    def kd_register_data(self):
        return [Component("data", "plain", lambda o: data())]


@pytest.fixture
def plugins(manager):
    manager.register(Plugin(), name="cachers")
    manager.register(TwoTeachers(), name="counted")
    ASKED.update(count=0, interrupt=10**9)
    return manager


@pytest.fixture
def go(plugins, tmp_path):
    """Distils with a cache, in a folder of its own; how many samples the teacher was asked about, and the weights."""
    made = iter(range(99))

    def distilled(cache=True, method="listed", module=None, model=None, folder="caches", epochs=3, **more):
        ASKED["count"] = 0
        if method == "listed":
            more.setdefault("losses", [{"use": "soft12"}])
        options = cache if isinstance(cache, dict) else {}
        pupil = student()
        result = kdcore.distill(
            model or teacher(), pupil, module or data(), method, plugins=plugins, run_dir=tmp_path / f"r-{next(made)}",
            cache=False if cache is False else {"dtype": "float32", "folder": str(tmp_path / folder), **options},
            train={"epochs": epochs, "batch_size": 16}, **more,
        )  # fmt: skip
        return ASKED["count"], pupil.module.weight.detach().clone(), result

    return distilled


def filled(tmp_path: Path, folder: str = "caches") -> list[Path]:
    return sorted(path.parent for path in (tmp_path / folder).glob("*/cache.json"))


def test_a_teacher_is_asked_once_about_each_sample_and_never_again_by_a_later_run(go, tmp_path):
    asked, weights, _ = go()
    live, same, _ = go(cache=False)
    torch.testing.assert_close(weights, same, rtol=1e-5, atol=1e-6)
    assert live >= 3 * 64
    assert asked < live
    again, third, _ = go(epochs=3, seed=0)
    assert third.equal(weights)
    assert again <= 2 * 2  # shapes: how rows are divided, and nothing of the training
    assert len(filled(tmp_path)) == 1


CODECS = [{"logits": "top-k", "k": 8}, {"logits": "hidden"}, {"dtype": "float16"}, {"dtype": "bfloat16"},
          {"dtype": "int8"}, {"logits": "sampled", "k": 11}]  # fmt: skip


@pytest.mark.parametrize("options", CODECS)
def test_every_codec_trains_nearly_the_same_student_and_says_how_far_it_is_off(go, tmp_path, options):
    _, exact, _ = go(cache=False)
    _, found, _ = go(cache=options)
    (cache,) = filled(tmp_path)
    error = read_facts(cache)["errors"]["logits"]
    assert 0 <= error["cross_entropy"] < 0.05
    assert (found - exact).norm() / exact.norm() < (0.1 if options.get("logits") == "sampled" else 0.02)


def test_activations_and_embeddings_come_from_the_cache(go):
    losses = [{"use": "alike"}]
    _, exact, _ = go(cache=False, losses=losses)
    asked, found, _ = go(cache={"taps": ["body.*"], "embedding": True}, losses=losses)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)
    assert asked < 2 * 64 + 20


def test_what_a_cache_does_not_hold_is_an_error_that_says_how_to_fill_it(go):
    with pytest.raises(ModelError, match=r"holds logits, not body\.\*: fill one with `kd cache --taps body"):
        go(losses=[{"use": "alike"}])
    with pytest.raises(ModelError, match=r"needs the teacher's embedding.*--embedding"):
        go(cache={"taps": ["body.*"]}, losses=[{"use": "alike"}])


def test_subsets_and_data_modules_that_a_method_makes_read_the_rows_of_their_samples(go):
    live, exact, _ = go(cache=False, method="halves")
    asked, found, _ = go(method="halves")
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert asked < live


def test_a_method_that_changes_the_inputs_is_refused(go):
    with pytest.raises(ModelError, match=r"changes what the teacher 'teacher' is given .* leave `cache` out"):
        go(method="mixes")


def test_a_split_that_is_not_held_is_put_to_the_teacher_itself(go):
    _, _, result = go(method="asks")
    _, _, live = go(cache=False, method="asks")
    assert result.rows == live.rows
    assert result.rows[0]["val/accuracy"] >= 0


def test_augmented_views_are_replayed(go):
    with pytest.raises(RecipeError, match=r"augments every sample at random.*cache\.views"):
        go(module=data(augment=True))
    with pytest.raises(RecipeError, match="not augmented: leave it out"):
        go(cache={"views": 2})
    first, weights, _ = go(cache={"views": 2}, module=data(augment=True), epochs=6)
    again, same, _ = go(cache={"views": 2}, module=data(augment=True), epochs=6)
    assert weights.equal(same)
    assert first >= 2 * 64
    assert again < 64
    _, other, _ = go(cache={"views": 3}, module=data(augment=True), epochs=6)
    assert not weights.equal(other)


def test_a_subset_of_augmented_data_replays_the_views_of_its_samples(go):
    first, weights, _ = go(cache={"views": 2}, module=data(augment=True), method="halves")
    again, same, _ = go(cache={"views": 2}, module=data(augment=True), method="halves")
    assert first >= 2 * 64
    assert again < 64
    assert weights.equal(same)


def test_the_augmented_input_is_the_one_that_the_teacher_saw(go, tmp_path):
    go(cache={"views": 2}, module=data(augment=True))
    (path,) = filled(tmp_path)
    facts = read_facts(path)
    reader = Reader(path, facts, "train")
    held = torch.frombuffer(bytearray(reader.data[[64 + 5]]["logits.values"][0].as_py()), dtype=torch.float32)
    loader = data(augment=True)
    sample = {"series": loader["train"][5][0], "label": loader["train"][5][1]}
    from kdcore.cache import view_seed
    from kdcore.loading import seeded

    with seeded(view_seed(1, 5)):
        augmented = Noise()(sample)
    torch.testing.assert_close(held, teacher().module(augmented["series"][None]).logits[0], rtol=1e-5, atol=1e-6)


def test_a_filled_cache_of_pictures_as_they_are_is_refused_for_augmented_ones(go, tmp_path):
    go()
    (path,) = filled(tmp_path)
    with pytest.raises(RecipeError, match=r"augments every sample at random.*cache\.views"):
        go(cache={"filled": str(path)}, module=data(augment=True))


def texts(along: str, width: int) -> dict:
    """Two texts of 3 and 5 tokens in rows of `width`; packed rows are full and have no mask."""
    lengths = torch.tensor([3, 5]) if along != "packed" else torch.tensor([width, width])
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.arange(width).expand(2, -1)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "index": torch.arange(2)}
    if along == "packed":
        return {"input_ids": ids, "position_ids": ids % 4, "index": torch.arange(2)}
    labels = torch.where(mask, 1, IGNORE)
    return (
        {**batch, "input_ids": ids[:, :2], "decoder_input_ids": ids, "labels": labels} if along == "labels" else batch
    )


@pytest.mark.parametrize(("along", "widths"), [("mask", (5, 8)), ("labels", (5, 8)), ("packed", (6, 6))])
def test_tokens_are_held_without_padding_and_put_back_where_another_batch_has_them(along, widths):
    narrow, wide = (texts(along, width) for width in widths)
    logits = torch.randn(2, widths[0], 12)
    encoded = Encoder(teacher(), CacheOptions(dtype="float32"))(Outputs(logits=logits), narrow, [1, 2], measure=False)
    spec = encoded.shape["arrays"]["logits.values"]
    found = _tensor(pa.array(encoded.rows()["logits.values"], pa.large_binary()), spec, wide, "teacher")
    held = positions(narrow, spec["along"])
    assert encoded.units == (12 if along == "packed" else 8)
    assert found.shape == (2, widths[1], 12)
    assert found[positions(wide, spec["along"])].equal(logits[held])
    if along == "mask":
        shorter = {**wide, "attention_mask": wide["attention_mask"].clone()}
        shorter["attention_mask"][1, 4] = 0
        with pytest.raises(DataError, match="holds 8 positions of a batch that has 7"):
            _tensor(pa.array(encoded.rows()["logits.values"], pa.large_binary()), spec, shorter, "teacher")


def test_texts_that_are_joined_in_a_row_are_refused():
    batch = {"input_ids": torch.zeros(1, 8), "position_ids": torch.zeros(1, 8), "index": torch.arange(2)}
    with pytest.raises(DataError, match="padding_free"):
        Encoder(teacher(), CacheOptions())(Outputs(logits=torch.randn(1, 8, 12)), batch, [1, 2], measure=False)


def test_other_weights_other_data_or_another_codec_fill_another_cache(go, tmp_path):
    go()
    for number, changed in enumerate(
        ({"model": teacher(5)}, {"module": data(rows=81)}, {"cache": {"dtype": "float16"}})
    ):
        go(**changed)
        assert len(filled(tmp_path)) == 2 + number


def test_one_changed_sample_that_the_key_did_not_look_at_is_found_when_it_is_read(go, tmp_path):
    module = data()
    go(module=module)
    changed = data()
    changed.splits["train"].tensors[0][5, 2] += 1e-3  # not one of those that are looked at
    with pytest.raises(DataError, match="sample 5 of split 'train' is not what the teacher 'teacher' saw"):
        go(module=changed)


def test_changed_labels_are_no_other_sample(go):
    _, weights, _ = go()
    changed = data()
    changed.splits["train"].tensors[1][5] = 11
    asked, same, _ = go(module=changed)
    assert same.equal(weights)
    assert asked < 10


def test_a_data_set_that_is_random_by_itself_is_refused(go):
    class Random(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            return {"series": torch.randn(6), "label": torch.tensor(0)}

    module = data()
    module.splits["train"] = Random()
    with pytest.raises(RecipeError, match="come out differently each time"):
        go(module=module)


def test_a_damaged_shard_is_made_again_and_a_missing_one_too(go, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("kdcore.caching._SHARD_ROWS", 16)
    _, weights, _ = go()
    (path,) = filled(tmp_path)
    shards = sorted((path / "train").iterdir())
    assert len(shards) == 4
    arrow = next(shards[1].glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-9] + b"scribbled")
    asked, same, _ = go()
    assert same.equal(weights)
    assert 16 <= asked < 64
    assert "does not match its digest; the teacher is asked again" in caplog.text


def test_an_interrupted_filling_goes_on_with_what_is_missing(go, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.caching._SHARD_ROWS", 16)
    ASKED["interrupt"] = 45
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        go()
    ASKED["interrupt"] = 10**9
    asked, weights, _ = go()
    assert asked < 64 + 20
    _, exact, _ = go(folder="whole")
    assert weights.equal(exact)


def test_a_cache_that_is_filled_needs_no_teacher(plugins, tmp_path):
    recipe = {"method": "listed", "teacher": {"use": "counted"}, "student": "linear", "data": "plain", "trackers": [],
              "losses": ["soft12"], "train": {"epochs": 2, "batch_size": 16}}  # fmt: skip
    found = kdcore.fill_cache(recipe, plugins=plugins, options={"folder": str(tmp_path), "dtype": "float32"})
    ASKED["count"] = 0
    taken = {**recipe, "teacher": {"use": "counted", "cache": {"filled": str(found["teacher"])}}}
    result = kdcore.run(taken, plugins=plugins, run_dir=tmp_path / "run")
    assert ASKED["count"] == 0
    live = kdcore.run(recipe, plugins=plugins, run_dir=tmp_path / "live")
    torch.testing.assert_close(result.student.module.weight, live.student.module.weight, rtol=1e-5, atol=1e-6)
    next((found["teacher"] / "train").glob("*/*.arrow")).write_bytes(b"")
    with pytest.raises(RunFolderError, match="damaged"):
        kdcore.run(taken, plugins=plugins, run_dir=tmp_path / "again")
    (found["teacher"] / "cache.json").write_text("{}")
    with pytest.raises(RunFolderError, match="damaged"):
        kdcore.run(taken, plugins=plugins, run_dir=tmp_path / "again")


def test_where_a_cache_lies_does_not_change_the_run(plugins, tmp_path):
    recipe = {"method": "listed", "student": "linear", "data": "plain", "trackers": [], "losses": ["soft12"],
              "teacher": {"use": "counted", "cache": {"folder": str(tmp_path / "a")}},
              "train": {"epochs": 1, "batch_size": 16}}  # fmt: skip
    kdcore.run(recipe, plugins=plugins, run_dir=tmp_path / "run")
    moved = {**recipe, "teacher": {"use": "counted", "cache": {"folder": str(tmp_path / "b")}}}
    assert kdcore.run(moved, plugins=plugins, run_dir=tmp_path / "run", resume=True).metrics


@pytest.mark.parametrize(("cache", "said"), [
    ({"logit": "all"}, r"teachers\.teacher\.cache\.logit: unknown key; did you mean 'logits'"),
    ({"logits": "some"}, r"teachers\.teacher\.cache\.logits: Input should be 'all'"),
    ({"k": 3}, "k: it belongs to `logits: top-k`"),
    ({"logits": "none"}, "nothing would be held"),
    ({"logits": "top-k", "k": 12}, "12 classes, and 12 are as good as all"),
    ({"splits": ["train", "test"]}, r"cache\.splits: the data has no split 'test'; it has: train, val"),
    ({"filled": "/nowhere"}, r"/nowhere holds no cache\.json"),
])  # fmt: skip
def test_wrong_options_are_named(plugins, tmp_path, cache, said):
    recipe = {"method": "listed", "teacher": {"use": "counted", "cache": {"folder": str(tmp_path / "c"), **cache}},
              "student": "linear", "data": "plain", "losses": ["soft12"]}  # fmt: skip
    with pytest.raises(kdcore.UserError, match=said):
        kdcore.run(recipe, plugins=plugins, run_dir=tmp_path / "run")


def test_a_student_has_no_cache(plugins, tmp_path):
    recipe = {"method": "listed", "student": {"use": "linear", "cache": True}, "data": "plain", "losses": ["soft12"]}
    with pytest.raises(RecipeError, match=r"students\.student\.cache: a student learns"):
        kdcore.run(recipe, plugins=plugins, run_dir=tmp_path / "run")


def test_a_full_disk_is_told_before_it_is_filled(go, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(kdcore.KDError, match=r"takes 3\.1 kB more, and .* has room for 0\.1 kB"):
        go()


@pytest.mark.parametrize("place", ["/proc/nowhere", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(go, tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(kdcore.KDError, match=r"the cache .* cannot be written: .*`cache\.folder`"):
        go(cache={"folder": str(tmp_path / place)})


def test_a_run_waits_for_another_one_that_fills_the_same_cache(go, tmp_path, caplog):
    go()
    (path,) = filled(tmp_path)

    def hold() -> None:
        with filelock.FileLock(path / ".lock"):
            held.set()
            time.sleep(2.5)

    held = threading.Event()
    threading.Thread(target=hold).start()
    held.wait()
    go()
    assert f"another run fills {path}; waiting for it" in caplog.text


def test_what_is_asked_of_the_teacher_itself_is_answered_by_it_which_is_made_then(go, tmp_path):
    go()
    (path,) = filled(tmp_path)
    made = []

    def live() -> Model:
        made.append(teacher())
        return made[0]

    cached = Cached("teacher", path, read_facts(path), live)
    assert cached.labels.count == 12
    assert made == []
    assert isinstance(cached.module, Counted)
    assert cached.head[0] == "head"
    assert not cached.writes
    assert len(made) == 1
    assert made[0].frozen
    with pytest.raises(AttributeError):
        _ = cached.no_such_thing


def test_digests_tell_types_shapes_and_values_apart():
    x = torch.arange(6.0)
    samples = [
        {"x": x},
        {"x": x.view(2, 3)},
        {"x": x.double()},
        {"y": x},
        {"x": x.tolist()},
        {"x": "6"},
    ]
    assert len({sample_digest(sample) for sample in samples}) == len(samples)
    assert sample_digest({"x": x, "label": 1, "index": 3}) == sample_digest({"x": x, "label": 2})
