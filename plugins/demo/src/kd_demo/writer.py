"""A text teacher without a model: it writes a sentence on the topic that a prompt names, and makes mistakes."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

from kd_demo.grammar import THEME_LIST, TOPICS, sentence
from kd_demo.options import ScriptedWriterOptions
from kdcore.data import Task, derive_seed
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt, TextTeacher


class ScriptedWriter(TextTeacher):
    """Answers with a sentence of the grammar on the last topic that the prompt names.

    It writes on another topic in the share `mistakes` of its answers, and says nothing in the share `silence`, or where
    the prompt names no topic.
    """

    name = "scripted-writer"

    def __init__(self, options: ScriptedWriterOptions, task: Task) -> None:
        self.options = options

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Answer]]:
        """Each prompt's answers depend on it and its own seed alone."""
        return [[self._answer(prompt, derive_seed("writer", seed, i)) for i in range(sampling.n)]
                for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip

    def _answer(self, prompt: Prompt, seed: int) -> Answer:
        text = prompt if isinstance(prompt, str) else json.dumps(prompt)
        named, rng = re.findall("|".join(TOPICS), text.casefold()), random.Random(seed)
        if not named or rng.random() < self.options.silence:
            return Answer("")
        topic = TOPICS.index(named[-1])
        if rng.random() < self.options.mistakes:
            topic = (topic + rng.randrange(1, len(TOPICS))) % len(TOPICS)
        theme = rng.choice([i for i, (owner, _) in enumerate(THEME_LIST) if owner == topic])
        written = sentence(rng, theme, self.options.confusion)
        return Answer(written, tokens=len(written.split()))
