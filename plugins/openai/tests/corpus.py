"""A program that has a server write a corpus: `python corpus.py ADDRESS FOLDER PROMPTS`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

import kdcore
from kdcore import Component, GenerateStage, Method, Roles, Sampling


class Corpus(Method):
    roles = Roles(students=())
    prompts = 0

    def stages(self, run: Any) -> Generator[Any, Any, None]:
        rows = [{"number": i} for i in range(self.prompts)]
        corpus = yield GenerateStage("corpus", run.text_teacher(), rows, "number {{ number }}", Sampling(),
                                     shard_size=250)  # fmt: skip
        run.add_metric("rows", len(corpus))


class Plugin:
    @kdcore.hookimpl
    def kd_register_methods(self) -> list[Component]:
        return [Component("method", "corpus", Corpus)]

    @kdcore.hookimpl
    def kd_register_data(self) -> list[Component]:
        data = kdcore.DataModule({"train": [{"series": torch.zeros(2)}]}, kdcore.Task("unlabelled"))
        return [Component("data", "nothing", lambda options: data)]


def write(address: str, folder: Path, prompts: int, run: str = "run", **options: Any) -> kdcore.Result:
    Corpus.prompts = prompts
    manager = kdcore.PluginManager()
    manager.register(Plugin(), name="corpus")
    teacher = {"use": "openai", "model": "tiny", "base_url": address, "key_env": None, "concurrency": 32,
               "cache": str(folder / "cache"), **options}  # fmt: skip
    recipe = {"method": "corpus", "teacher": teacher, "data": "nothing", "trackers": []}
    return kdcore.run(recipe, run_dir=folder / run, plugins=manager)


if __name__ == "__main__":
    write(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
