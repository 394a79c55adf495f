"""Options are checked, and downloads told, without torch and without downloading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from pydantic import ValidationError

from kd_transformers import plugin
from kd_transformers.options import TransformersOptions
from kdcore import PluginManager
from kdcore.options import Download


def test_hooks_options_and_downloads_load_no_torch() -> None:
    code = (
        "import sys, os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "import kd_transformers.plugin, kd_transformers.options\n"
        "from kd_transformers.options import TransformersOptions as O; O(model='nobody/nothing').downloads()\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_it_is_a_teacher_and_a_student_with_described_options() -> None:
    manager = PluginManager(discover=False)
    manager.register(plugin)
    for kind in ("teacher", "student"):
        options = manager.get(kind, "transformers").load_options()
        assert options is TransformersOptions
        assert all(field.description and not field.is_required() for field in options.model_fields.values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "give `model`"),
        ({"config": {"hidden_size": 8}}, "give `model`"),
        ({"model": "a/b", "config": {"model_type": "bert"}}, "leave `config.model_type` out"),
        ({"model": "a/b", "head": "classification"}, "sequence-classification"),
        ({"model": "a/b", "quantize": True}, "Extra inputs"),
    ],
)
def test_wrong_options_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TransformersOptions(**given)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A Hub with these files, and an empty cache."""
    files = {"model.safetensors": 1000, "config.json": 10, "pytorch_model.bin": 5000, "onnx/model.safetensors": 700}
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in files.items()]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: SimpleNamespace(siblings=siblings))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return files


def test_a_model_on_the_hub_is_told_with_the_size_of_what_would_be_read(hub: dict[str, int]) -> None:
    assert TransformersOptions(model="o/m").downloads() == [Download("o/m", "Hugging Face Hub", 1010)]
    assert TransformersOptions(model="o/m", pretrained=False).downloads() == [Download("o/m", "Hugging Face Hub", 10)]


def test_the_size_is_left_open_where_the_hub_does_not_answer(
    hub: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    assert TransformersOptions(model="o/m").downloads() == [Download("o/m", "Hugging Face Hub", None)]


def test_what_is_there_already_is_not_told(hub: dict[str, int], tmp_path: Path) -> None:
    assert TransformersOptions(model=str(tmp_path)).downloads() == []
    assert TransformersOptions(model="o/m", checkpoint="runs/teacher").downloads() == []
    assert TransformersOptions(config={"model_type": "bert"}).downloads() == []
    repository = tmp_path / "cache" / "models--o--m"
    for name in ("refs", "snapshots/abc"):
        (repository / name).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    assert TransformersOptions(model="o/m").downloads() != []
    assert TransformersOptions(model="o/m", pretrained=False).downloads() == []
    (repository / "snapshots" / "abc" / "model.safetensors").write_text("")
    assert TransformersOptions(model="o/m").downloads() == []
