from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_discovr.clips import Window, clips, decode, from_csv
from kd_discovr.options import ClipsOptions
from kdcore import api
from kdcore.data import derive_seed, seeded
from kdcore.errors import DataError, RecipeError

av = pytest.importorskip("av")
HEIGHT, WIDTH = 32, 48


def write(path: Path, count: int = 20) -> Path:
    """A video whose frame number n has the grey value 10 n."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = WIDTH, HEIGHT, "yuv420p", 10**6
        for number in range(count):
            grey = torch.full((HEIGHT, WIDTH, 3), 10 * number, dtype=torch.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey.numpy(), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, label in (("train", "ill"), ("train", "well"), ("val", "ill"), ("val", "well")):
        for number in range(2):
            write(tmp_path / split / label / f"{number}.avi", count=20 + number)
    return tmp_path


def options(root: Path, **changes: Any) -> ClipsOptions:
    return ClipsOptions(**{"path": str(root), "frames": 4, "stride": 3, "size": 16, **changes})


def greys(video: Tensor) -> list[int]:
    """The number of each frame, read off its grey value."""
    return [round(float(frame.mean()) * 25.5) for frame in video]


def test_folder_gives_splits_labels_and_the_middle_of_each_video(folder):
    data = clips(options(folder))
    assert set(data.splits) == {"train", "val"}
    assert data.task.kind == "unlabelled"
    assert data.task.classes == ("ill", "well")
    assert data.labels("val").tolist() == [0, 0, 1, 1]
    batch = data.sample("val", 4)
    assert batch["video"].shape == (4, 4, 3, 16, 16)
    assert batch["label"].tolist() == [0, 0, 1, 1]
    assert greys(batch["video"][0]) == [3, 6, 9, 12]  # of 0, 3, ... 18


def test_training_clips_are_random_windows_and_crops_that_the_seed_repeats(folder):
    data = clips(options(folder))
    starts = set()
    for index in range(20):
        with seeded(derive_seed(0, index)):
            clip = data.augment(data["train"][0])["video"]
        with seeded(derive_seed(0, index)):
            assert torch.equal(data.augment(data["train"][0])["video"], clip)
        assert clip.shape == (4, 3, 16, 16)
        assert torch.tensor(greys(clip)).diff().tolist() == [3, 3, 3]
        starts.add(greys(clip)[0])
    assert starts == {0, 3, 6, 9}


def test_crops_have_the_scales_of_the_options(folder):
    window = Window(options(folder, scales=(1.0, 0.75, 0.5)), random=True)
    with seeded(0):
        sides = {window._crop(32) for _ in range(200)}
    assert sides == {(32, 32), (32, 24), (24, 32), (24, 24), (24, 16), (16, 24), (16, 16)}
    assert Window(options(folder), random=False)._crop(32) == (32, 32)
    assert Window(options(folder, scales=()), random=True)._crop(32) == (32, 32)


def test_short_videos_are_repeated(tmp_path):
    write(tmp_path / "train" / "a.mp4", count=4)
    clip = clips(options(tmp_path, stride=2)).sample("train", 1)["video"]
    assert greys(clip[0]) == [0, 2, 0, 2]


def test_csv_lists_paths_frames_and_labels(tmp_path):
    write(tmp_path / "videos" / "a.avi")
    (tmp_path / "train.csv").write_text("path,frames,label\nvideos/a.avi,7,1\nvideos/a.avi,,0\n")
    (tmp_path / "val.csv").write_text("path\nvideos/a.avi\n")
    data = clips(options(tmp_path, stride=1))
    assert [entry.frames for entry in from_csv(tmp_path / "train.csv")] == [7, None]
    assert len(decode(from_csv(tmp_path / "train.csv")[0], 1)) == 7
    assert data.labels("train").tolist() == [1, 0]
    assert data.task.classes == ("0", "1")
    assert "label" not in data.sample("val", 1)
    assert set(clips(options(tmp_path, splits=("val",))).splits) == {"val"}


def test_numbers_as_labels_stand_in_their_order(tmp_path):
    (tmp_path / "a.avi").touch()
    rows = "".join(f"a.avi,{label}\n" for label in (10, 9, 2))
    (tmp_path / "train.csv").write_text("path,label\n" + rows)
    assert clips(options(tmp_path)).task.classes == ("2", "9", "10")


def test_other_files_and_folders_beside_the_splits_are_left_alone(folder):
    (folder / "FileList.csv").write_text("FileName,EF\na,50\n")
    (folder / "Videos").mkdir()
    assert set(clips(options(folder)).splits) == {"train", "val"}


def test_csv_written_by_a_spreadsheet_is_read(tmp_path):
    (tmp_path / "a.avi").touch()
    (tmp_path / "train.csv").write_text("path,label\na.avi,1\n", encoding="utf-8-sig")
    assert clips(options(tmp_path)).labels("train").tolist() == [0]


def test_method_learns_from_files(folder, tmp_path):
    recipe = {
        "method": {"use": "discovr", "head_outputs": 8, "head_hidden": 8, "head_bottleneck": 4, "prototypes": 4,
                   "local_views": 1, "mask_ratio": 0.5, "probes": ["knn"], "probe_neighbours": 2},
        "student": {"use": "discovr-vit", "width": 16, "layers": 1, "heads": 2, "patch": 8},
        "data": {"use": "clips", "path": str(folder), "frames": 4, "stride": 3, "size": 16},
        "train": {"steps": 2, "batch_size": 2}, "trackers": [],
    }  # fmt: skip
    assert "val/knn-f1" in api.run(recipe, run_dir=tmp_path / "run").metrics


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({}, {"path": "/nowhere"}, "there is no folder /nowhere"),
        ({}, {}, "for none of train, val, test, a CSV file or a folder of videos"),
        ({"train.csv": "path\nb.avi\n"}, {}, "train.csv, line 2: there is no file .*b.avi"),
        ({"train.csv": "path\n"}, {}, "train.csv lists no videos"),
        ({"train.csv": "file\na.avi\n"}, {}, "no column `path`; its columns are: file"),
        ({"train.csv": "path,frames\na.avi,many\n"}, {}, "line 2: expected a path"),
        ({"train.csv": "path,label\na.avi,1\na.avi,\n"}, {}, "some videos have a label and some have none"),
        ({"train.csv": "path\na.avi\n"}, {"splits": ("test",)}, "neither .*test.csv nor a folder"),
    ],
)
def test_wrong_lists_get_a_clear_sentence(tmp_path, files, changes, message):
    (tmp_path / "a.avi").touch()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        clips(options(tmp_path, **changes))


def test_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "a.avi").write_text("no video")
    (tmp_path / "gone.avi").touch()
    (tmp_path / "train.csv").write_text("path\na.avi\ngone.avi\n")
    data = clips(options(tmp_path))
    (tmp_path / "gone.avi").unlink()
    for index, name in enumerate(("a.avi", "gone.avi")):
        with pytest.raises(DataError, match=rf"{name} cannot be decoded"):
            data["train"][index]


def test_scales_must_be_shares():
    with pytest.raises(RecipeError, match=r"scales must lie in \(0, 1\]"):
        api.plan("discovr/paper", ["data.scales=[1.5]"])
