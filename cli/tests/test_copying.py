from __future__ import annotations

from pathlib import Path


def test_a_copy_keeps_comments_and_runs(kd):
    result = kd("cp", "toy")
    assert result.exit_code == 0
    assert "kd run toy-quickstart.yaml" in result.stdout
    assert "# quick" in Path("toy-quickstart.yaml").read_text()
    assert kd("run", "toy-quickstart.yaml", "--dry-run").exit_code == 0


def test_a_copy_may_be_named_or_put_into_a_folder(kd):
    Path("mine").mkdir()
    assert kd("cp", "toy/paper", "mine").exit_code == 0
    assert Path("mine/toy-paper.yaml").is_file()
    assert kd("cp", "toy/paper", "new/place.yaml").exit_code == 0
    assert Path("new/place.yaml").is_file()


def test_a_file_is_only_written_over_by_force(kd):
    Path("there.yaml").write_text("mine")
    result = kd("cp", "toy", "there.yaml")
    assert result.exit_code == 2
    assert "--force" in result.stderr
    assert Path("there.yaml").read_text() == "mine"
    assert kd("cp", "toy", "there.yaml", "--force").exit_code == 0
    assert "method: toy" in Path("there.yaml").read_text()


def test_copying_an_unknown_recipe_names_those_there_are(kd):
    result = kd("cp", "toy/fast")
    assert result.exit_code == 2
    assert "paper, quickstart" in result.stderr
