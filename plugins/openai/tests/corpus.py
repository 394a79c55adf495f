"""A plugin whose method has a teacher write a corpus, and how it is run in this process."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

import kdcore
from kdcore import Component, GenerateStage, Method, Roles, Sampling
from kdcore.options import Options


class CorpusOptions(Options):
    prompts: int = Field(description="how many")
    template: str = Field(description="of a prompt")


class Corpus(Method):
    roles = Roles(students=())

    def stages(self, run: Any) -> Generator[Any, Any, None]:
        rows = [{"number": i} for i in range(self.options.prompts)]
        corpus = yield GenerateStage("corpus", run.text_teacher(), rows, self.options.template, Sampling(),
                                     shard_size=250)  # fmt: skip
        run.add_metric("rows", len(corpus))


class Plugin:
    @kdcore.hookimpl
    def kd_register_methods(self) -> list[Component]:
        return [Component("method", "corpus", Corpus, CorpusOptions)]

    @kdcore.hookimpl
    def kd_register_data(self) -> list[Component]:
        data = kdcore.DataModule({"train": [{"series": torch.zeros(2)}]}, kdcore.Task("unlabelled"))
        return [Component("data", "nothing", lambda options: data)]


def recipe(
    address: str, folder: Path, prompts: int, template: str = "number {{ number }}", **options: Any
) -> dict[str, Any]:
    """The recipe of a corpus, with more options of the teacher."""
    teacher = {"use": "openai", "model": "tiny", "base_url": address, "key_env": None, "concurrency": 32,
               "cache": str(folder / "cache"), **options}  # fmt: skip
    method = {"use": "corpus", "prompts": prompts, "template": template}
    return {"method": method, "teacher": teacher, "data": "nothing", "trackers": []}


def write(address: str, folder: Path, prompts: int, **options: Any) -> kdcore.Result:
    """Run it in this process."""
    manager = kdcore.PluginManager()
    manager.register(Plugin, name="corpus")
    return kdcore.run(recipe(address, folder, prompts, **options), run_dir=folder / "run", plugins=manager)
