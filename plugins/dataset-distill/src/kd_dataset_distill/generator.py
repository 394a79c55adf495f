"""The generator of DiLM: a causal language model with a start token for every class.

Source: Maekawa et al. 2024, "DiLM: Distilling Dataset into Language Model for Text-level Dataset Distillation"
(arXiv 2404.00264), section 3.1.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from kd_dataset_distill.options import GeneratorOptions
from kdcore.data import IGNORE, Task
from kdcore.errors import DataError, ModelError
from kdcore.models import Batch, Labels, Model, Outputs

FACTS = "generator.json"
AT_ONCE = 256
"""Texts that are sampled together."""

Text = tuple[str, str | None]
"""A text, and the second one of a pair."""


class Generator(nn.Module):
    """A causal language model, its tokenizer, and the tokens that are added: a start per class, separator, padding,
    end.

    Args:
        lm: of transformers; its embeddings grow by the added tokens.
        tokenizer: of transformers, or anything with `encode(text)`, `decode(ids)` and a length.
        classes: how many start tokens.
        size: of the vocabulary without the added tokens.
    """

    def __init__(self, lm: Any, tokenizer: Any, classes: int, size: int) -> None:
        super().__init__()
        self.lm, self.tokenizer, self.size, self.classes = lm, tokenizer, size, classes
        self.separator, self.padding = size + classes, size + classes + 1
        end = _first(tokenizer, "eos_token_id", "end_id")
        self.end = size + classes + 2 if end is None else end
        if lm.get_input_embeddings().num_embeddings != size + classes + 3:
            self._grow()

    def _grow(self) -> None:
        """Add the embeddings; a class starts as the start of any text does."""
        self.lm.resize_token_embeddings(self.size + self.classes + 3, mean_resizing=False)
        start = _first(self.tokenizer, "bos_token_id", "start_id")
        if start is not None:
            table = self.lm.get_input_embeddings().weight
            with torch.no_grad():
                table[self.size : self.size + self.classes] = table[start]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits `[B, T, V]`."""
        logits: Tensor = self.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits

    def ids(self, text: Text, label: int, longest: int) -> Tensor:
        """Tokens `[T]` of a text of a class, from the start token to the end, cut off after `longest`."""
        found = [self.size + label, *self._encode(text[0])]
        if text[1] is not None:
            found += [self.separator, *self._encode(text[1])]
        return torch.tensor([*found[: longest - 1], self.end])

    def text(self, ids: Sequence[int], paired: bool) -> Text | None:
        """What tokens say, after the start token to the end; `None` if it is empty, or no pair where one is asked."""
        body = list(ids)[1:]
        stop = next((i for i, token in enumerate(body) if token in (self.end, self.padding)), len(body))
        parts: list[list[int]] = [[]]
        for token in body[:stop]:
            if token == self.separator:
                parts.append([])
            elif token < self.size:
                parts[-1].append(token)
        texts = [self._decode(part).strip() for part in parts[: 2 if paired else 1]]
        if not all(texts) or len(texts) < (2 if paired else 1):
            return None
        return texts[0], texts[1] if paired else None

    def batch(self, rows: Sequence[Tensor]) -> Batch:
        """Tokens padded on the right `[B, T]`, their mask, and as labels at each position the next token."""
        ids = pad_sequence(list(rows), batch_first=True, padding_value=self.padding)
        mask = (ids != self.padding).long()
        following = ids.masked_fill(mask == 0, IGNORE)[:, 1:]
        return {"input_ids": ids, "attention_mask": mask, "labels": nn.functional.pad(following, (0, 1), value=IGNORE)}

    @torch.no_grad()
    def write(self, label: int, count: int, *, longest: int, top_p: float, seed: int, paired: bool) -> Tensor:
        """Sampled texts of a class as tokens `[count, longest]` on the CPU, padded; they depend on the seed alone."""
        was_training, device = self.training, next(self.parameters()).device
        self.eval()
        banned = [*range(self.size, self.size + self.classes), self.padding, *([] if paired else [self.separator])]
        found = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for first in range(0, count, AT_ONCE):
                start = torch.full((min(AT_ONCE, count - first), 1), self.size + label, device=device)
                ids = self.lm.generate(
                    start,
                    attention_mask=torch.ones_like(start),
                    do_sample=True,
                    top_p=top_p,
                    top_k=0,
                    max_new_tokens=longest - 1,
                    pad_token_id=self.padding,
                    eos_token_id=self.end,
                    suppress_tokens=banned,
                )
                found.append(nn.functional.pad(ids, (0, longest - ids.shape[1]), value=self.padding).cpu())
        self.train(was_training)
        return torch.cat(found)

    def _encode(self, text: str) -> list[int]:
        if callable(self.tokenizer):
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer.encode(text))

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True) if callable(self.tokenizer) else
                   self.tokenizer.decode(ids))  # fmt: skip


def build(options: GeneratorOptions, task: Task) -> Model:
    """The generator as a teacher: `model.module` is a `Generator`.

    Raises:
        DataError: if the task has no classes, or no tokenizer for a model from a config.
        ModelError: if the model cannot be loaded.
    """
    if task.kind != "classification":
        raise DataError(f"dd-generator writes texts of classes; this is a task of kind {task.kind!r}")
    try:
        import transformers
    except ImportError as error:
        raise ModelError("dd-generator needs transformers: pip install 'kd-dataset-distill[text]'") from error
    tokenizer = (
        transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)
        if options.model
        else task.tokenizer
    )
    if tokenizer is None:
        raise DataError(
            "dd-generator: a model from a config reads with the data's tokenizer, and the data has none; name a "
            "`model:`"
        )
    size = len(tokenizer)
    try:
        lm = _load(transformers, options, size)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"dd-generator: the language model cannot be had: {' '.join(str(error).split())[:300]}"
        ) from error
    generator = Generator(lm, tokenizer, task.class_count, size)
    return Model(generator, call, save=functools.partial(save, generator), labels=Labels())


def _load(transformers: Any, options: GeneratorOptions, size: int) -> Any:
    auto = transformers.AutoModelForCausalLM
    if options.checkpoint or options.model:
        return auto.from_pretrained(options.checkpoint or options.model, use_safetensors=True, trust_remote_code=False)
    changes = dict(options.config)
    kind = changes.pop("model_type")
    plain = {"vocab_size": size, "bos_token_id": None, "eos_token_id": None, **changes}
    return auto.from_config(transformers.AutoConfig.for_model(kind, **plain))


def call(module: Generator, batch: Batch) -> Outputs:
    """Logits over tokens."""
    return Outputs(logits=module(batch["input_ids"], batch["attention_mask"]))


def save(generator: Generator, folder: Path) -> None:
    """Write the language model as transformers does, its tokenizer where it can be, and the ids of the added tokens."""
    generator.lm.save_pretrained(folder)
    if hasattr(generator.tokenizer, "save_pretrained"):
        generator.tokenizer.save_pretrained(folder)
    facts = {"first_start": generator.size, "classes": generator.classes, "separator": generator.separator,
             "padding": generator.padding, "end": generator.end}  # fmt: skip
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def _first(tokenizer: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(tokenizer, name, None)) is not None), None)
