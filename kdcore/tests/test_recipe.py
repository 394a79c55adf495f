"""Recipes: read, overridden, validated, explained."""

from __future__ import annotations

import pytest
import yaml
from pydantic import Field

import kdcore
from kdcore import Component, Options, hookimpl
from kdcore.errors import ComponentError, RecipeError
from kdcore.recipe import find_recipe, load, resolve


class Width(Options):
    width: int = 4


class Sized:
    @hookimpl
    def kd_register_students(self):
        return [Component("student", "sized", print, options=Width)]


@pytest.fixture
def manager(manager):
    manager.register(Sized(), name="sized")
    return manager


def write(path, text):
    (path / "r.yaml").write_text(text)
    return path / "r.yaml"


def test_short_and_long_forms_are_the_same_recipe(manager, tmp_path):
    short = write(tmp_path, "method: toy-kd\nteacher: toy\nstudent: sized\ndata: toy\neval: {on: [val]}\n")
    long = {"method": {"use": "toy-kd"}, "teachers": {"teacher": {"use": "toy"}},
            "students": {"student": {"use": "sized"}},
            "data": {"use": "toy"}, "eval": {"on": ["val"]}}  # fmt: skip
    assert resolve(load(short), manager).dump() == resolve(load(long), manager).dump()


@pytest.mark.parametrize("key", ["student.width", "students.student.width"])
@pytest.mark.parametrize("student", ["sized", {"use": "sized", "width": 2}])
def test_overrides_reach_every_form(manager, recipe, key, student):
    recipe["student"] = student
    resolved = resolve(load(recipe, [f"{key}=7", "train.optimizer.name=sgd", "train.epochs=0.5"]), manager)
    assert resolved.options["students.student"] == Width(width=7)
    assert resolved.recipe.train.optimizer.name == "sgd"
    assert resolved.recipe.train.epochs == 0.5


def test_the_dump_is_complete_and_reads_back_the_same(manager, recipe):
    recipe["student"] = "sized"
    dump = resolve(load(recipe), manager).dump()
    assert dump["students"]["student"] == {"use": "sized", "width": 4}
    assert resolve(load(yaml.safe_load(yaml.safe_dump(dump))), manager).dump() == dump


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"epoch": 3}}, "train.epoch: unknown key; did you mean 'epochs'"),
        ({"train": {"optimizer": {"nam": "sgd"}}}, "train.optimizer.nam: unknown key; did you mean 'name'"),
        ({"trian": {}}, "trian: unknown key; did you mean 'train'"),
        ({"train": {"epochs": "many"}}, r"train.epochs: .*number.*'many'"),
        ({"train": {"optimizer": {"name": "adamw", "momentum": 0.9}}}, "adamw has no momentum"),
        ({"student": {"use": "sized", "widht": 3}}, "students.student.widht: unknown key; did you mean 'width'"),
        ({"student": {"use": "toy", "width": 3}}, "students.student: toy takes no options, but got width"),
        ({"student": "tyo"}, "students.student.use: unknown student 'tyo'; did you mean 'toy'"),
        ({"losses": [{"use": "soft", "weight": -1}]}, r"losses.0.weight: .*greater than or equal to 0.*-1"),
        ({"losses": [{"use": "soft", "weight": float("nan")}]}, "losses.0.weight: .*finite"),
        ({"stages": {"distill": {"train": {"epoch": 1}}}}, "stages.distill.train.epoch: unknown key"),
        ({"students": {"student": "toy"}}, "either 'student' or 'students', not both"),
    ],
)
def test_what_is_wrong_is_named_by_its_key(manager, recipe, change, message):
    with pytest.raises(RecipeError, match=message):
        resolve(load({**recipe, **change}), manager)


def test_all_problems_are_reported_at_once(manager, recipe):
    recipe.update(student="tyo", data="nothing", losses=["sfot"])
    with pytest.raises(RecipeError) as caught:
        resolve(load(recipe), manager, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml is not valid:")
    assert all(key in str(caught.value) for key in ("students.student.use", "data.use", "losses.0.use"))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), ("- a\n- b\n", "not a list"), ("3", "mapping"), ("a: [1", "not valid YAML"),
     ("a: ${nothing}", "nothing"), ("a: !!python/object:os.system x", "not valid YAML")],
)  # fmt: skip
def test_files_that_are_no_recipes_are_refused(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load(write(tmp_path, text))


def test_missing_files_folders_and_bytes_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no such file"):
        load(tmp_path / "nothing.yaml")
    with pytest.raises(RecipeError, match="this is a folder"):
        load(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RecipeError, match=r"b.yaml"):
        load(tmp_path / "b.yaml")
    with pytest.raises(RecipeError, match="write key=value"):
        load({"a": 1}, ["train.epochs"])


def test_recipes_are_found_by_method_or_file(manager, tmp_path, monkeypatch):
    installed = kdcore.PluginManager()
    source, name = find_recipe("kd", installed)
    assert name == "kd-quickstart"
    assert source.name == "quickstart.yaml"
    with pytest.raises(RecipeError, match="ships no recipe 'papper'"):
        find_recipe("kd/papper", installed)
    with pytest.raises(ComponentError, match="unknown method 'kdd'"):
        find_recipe("kdd", installed)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kd").mkdir()
    assert find_recipe("kd", installed)[1] == "kd-quickstart"


def test_the_schema_describes_every_section():
    schema = kdcore.recipe_schema()
    assert {"method", "teachers", "students", "data", "losses", "train", "stages", "eval", "seed"} <= set(
        schema["properties"]
    )


def test_a_cache_named_by_a_folder_is_an_option_of_a_component_that_has_one(manager):
    class Texts(Options):
        cache: str | None = Field(None, description="where answers are kept")

    class Plugin:
        @kdcore.hookimpl
        def kd_register_teachers(self):
            return [Component("teacher", "texts", lambda o, task: None, options=Texts)]

    manager.register(Plugin(), name="texts")
    base = {"method": "toy-kd", "student": "toy", "data": "toy"}
    found = resolve({**base, "teacher": {"use": "texts", "cache": "answers"}}, manager)
    assert found.options["teachers.teacher"].cache == "answers"
    assert found.recipe.teachers["teacher"].cache is None
    assert resolve(found.dump(), manager).dump() == found.dump()
    with pytest.raises(RecipeError, match="takes no options, but got cache"):
        resolve({**base, "teacher": {"use": "toy", "cache": "answers"}}, manager)
    with pytest.raises(RecipeError, match=r"teachers\.teacher\.cache: Input should be a valid dictionary"):
        resolve({**base, "teacher": {"use": "toy", "cache": 3}}, manager)
