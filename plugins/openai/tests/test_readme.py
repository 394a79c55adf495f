"""What the README shows is valid and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from kd_openai.options import LogprobsOptions, OpenAIOptions
from kdcore.options import CacheOptions

OPTIONS = {"openai": OpenAIOptions, "openai-logprobs": LogprobsOptions}
README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("text", blocks("yaml"))
def test_recipes_are_valid(text):
    teacher = yaml.safe_load(text)["teacher"]
    if teacher["use"] == "openai-logprobs":
        CacheOptions.model_validate(teacher.pop("cache"))
    OPTIONS[teacher.pop("use")].model_validate(teacher)


def test_every_option_is_in_the_table_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", README, re.MULTILINE))
    assert list(rows) == list(OpenAIOptions.model_fields)
    for name, field in OpenAIOptions.model_fields.items():
        if isinstance(field.default, int | float):
            assert rows[name] == f"{field.default:g}"


def test_the_python_runs(serve, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (code,) = blocks("python")
    exec(code.replace("http://localhost:8000/v1", serve().url), {})
    assert capsys.readouterr().out == "<Name a colour.> by 0 13\n"
    assert len(list(tmp_path.glob("kd/openai/tiny-*/*/*.json"))) == 1  # the default place of the cache
