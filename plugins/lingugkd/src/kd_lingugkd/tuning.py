"""Stage 1: the language model learns to answer the prompts of the training nodes."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from kd_lingugkd.lm import LanguageModel, embedding_rows, shift_labels
from kd_lingugkd.options import LinguGKDOptions
from kd_lingugkd.prompts import Prompts, Request
from kd_lingugkd.quantize import quantize_nf4
from kdcore import Run, TrainStage
from kdcore.data import IGNORE, DataModule, Task, derive_seed
from kdcore.errors import ModelError
from kdcore.models import Batch, Model


class PromptBatches:
    """Collates training nodes to prompts with their answers: which prompt of a node comes is drawn anew in each epoch.

    Args:
        prompts: of the graph.
        teacher: for its tokenizer.
    """

    def __init__(self, prompts: Prompts, teacher: LanguageModel) -> None:
        self.prompts, self.teacher = prompts, teacher

    def __call__(self, samples: list[dict[str, Any]]) -> Batch:
        """`input_ids`, `attention_mask` and `labels` `[B, T]`, padded on the right; `node` `[B]`."""
        asked = [self.tokens(int(sample["node"]), sample.get("prompt_draw")) for sample in samples]
        ids, mask = self.teacher.padded([prompt + answer for prompt, answer in asked], left=False)
        labels = shift_labels(ids, [len(answer) for _, answer in asked], mask)
        nodes = default_collate([sample["node"] for sample in samples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "node": nodes}

    def tokens(self, node: int, draw: int | None) -> tuple[list[int], list[int]]:
        """The tokens of a prompt of a node and of its answer; without a draw, the prompt of the last hop."""
        prompts, teacher = self.prompts, self.teacher
        request = Request(node, prompts.options.hops, 0) if draw is None else prompts.draw(node, draw)
        if request is None:
            prompt, answer = prompts.link(node, random.Random(derive_seed(draw, "link")))
            ids = teacher.answer_ids(answer)
            return teacher.ids(prompt)[-(teacher.limit(prompts.options) - len(ids)) :], ids
        ids = teacher.answer_ids(prompts.answer(node))
        return teacher.encode(prompts, request, room=len(ids)), ids


class Tune(TrainStage):
    """Cross-entropy on the answers only, of prompts about training nodes.

    Registered, so trained and kept, are only the weights that are tuned: the adapters, or everything.

    Args:
        run: for its data and seed.
        teacher: tuned in place.
        prompts: of the graph.
        options: what is tuned, and NEFTune's noise.

    Raises:
        ModelError: if the adapters do not fit the model, or it cannot be held in 4 bits.
    """

    shardable = False

    def __init__(self, run: Run, teacher: LanguageModel, prompts: Prompts, options: LinguGKDOptions) -> None:
        super().__init__("tune")
        self.alpha, self.noise_seed = options.neftune, run.seed
        self.lm: Any = [adapt(teacher.model, options)]  # in a list: registered are only the weights that are tuned
        self.frozen = {"teacher": teacher.model}
        self.exports = {"teacher": Model(nn.Identity(), save=Saver(self.lm[0], teacher, options.tuning).save)}
        named = [(name, p) for name, p in self.lm[0].named_parameters() if p.requires_grad]
        self.tuned = nn.ParameterDict({name.replace(".", "/"): p for name, p in named})
        self.data = prompt_data(run.data, prompts, teacher)

    def train(self, mode: bool = True) -> Tune:
        """Also of the model that is not registered."""
        super().train(mode)
        self.lm[0].train(mode)
        return self

    def forward(self, batch: Batch, objective: str = "loss") -> dict[str, Tensor]:
        """`completion`: mean negative log-likelihood of the answers' tokens."""
        lm, labels = self.lm[0], batch["labels"]
        embeddings = lm.get_input_embeddings()(batch["input_ids"])
        if self.training and self.alpha:
            embeddings = embeddings + self._noise(embeddings, batch)
        logits = lm(inputs_embeds=embeddings, attention_mask=batch["attention_mask"], use_cache=False).logits
        answers = labels != IGNORE
        return {"completion": F.cross_entropy(logits[answers].float(), labels[answers])}

    def counts(self, batch: Batch) -> dict[str, Tensor | None]:
        """Tokens of answers."""
        return {"completion": (batch["labels"] != IGNORE).sum()}

    def _noise(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Uniform noise of a width of `alpha / sqrt(T D)` for a text of T tokens (Jain et al. 2024, arXiv:2310.05914),
        which depends on seed, step and sample alone."""
        noise = torch.zeros(embeddings.shape)
        lengths, width = batch["attention_mask"].sum(1).tolist(), embeddings.shape[2]
        for i, (index, length) in enumerate(zip(batch["index"].tolist(), lengths, strict=True)):
            seed = derive_seed(self.noise_seed, "neftune", self.progress.step, index)
            draw = torch.rand(length, width, generator=torch.Generator().manual_seed(seed))
            noise[i, :length] = (2 * draw - 1) * self.alpha / (length * width) ** 0.5
        return noise.to(embeddings)


def adapt(model: Model, options: LinguGKDOptions) -> Any:
    """The language model with what is to be tuned requiring a gradient, and nothing else.

    Raises:
        ModelError: as `Tune`.
    """
    module: Any = model.module
    if options.quantize == "nf4":
        quantize_nf4(module)
    if options.tuning == "full":
        return module.requires_grad_(True)
    from peft import LoraConfig, get_peft_model  # here, since it takes seconds that only adapters need

    lora = options.lora
    try:
        adapted = get_peft_model(module, LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, task_type="CAUSAL_LM",
            target_modules=lora.targets, modules_to_save=lora.saved or None,
        ))  # fmt: skip
    except (ValueError, TypeError) as error:
        raise ModelError(f"method.lora does not fit a {type(module).__name__}: {str(error).splitlines()[0]}") from error
    model.module = adapted
    return adapted


class Saver:
    """Writes the tuned model: adapters alone where its weights lie elsewhere, or else a whole model with the adapters
    merged in, which loads as any model does. The tokenizer comes along."""

    def __init__(self, lm: Any, teacher: LanguageModel, tuning: str) -> None:
        self.lm, self.teacher, self.tuning = lm, teacher, tuning

    def save(self, folder: Path) -> None:
        """Write it."""
        as_it_is = self.tuning == "full" or self.teacher.source
        (self.lm if as_it_is else copy.deepcopy(self.lm).merge_and_unload()).save_pretrained(str(folder))
        self.teacher.tokenizer.save_pretrained(str(folder))


def prompt_data(data: DataModule, prompts: Prompts, teacher: LanguageModel) -> DataModule:
    """The training nodes with a label, as prompts."""
    train = data["train"]
    labelled = [i for i, label in enumerate(data.labels("train").tolist()) if label != IGNORE]
    tokens = max(len(teacher.tokenizer), embedding_rows(teacher.model.module))
    task = Task("causal-lm", num_classes=tokens, tokenizer=teacher.tokenizer)
    return DataModule({"train": _Rows(train, labelled)}, task, collate=PromptBatches(prompts, teacher), augment=_drawn)


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Some samples of a split."""

    def __init__(self, split: Any, rows: Sequence[int]) -> None:
        self.split, self.rows = split, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.split[self.rows[index]])


def _drawn(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with a seed for its prompt; the generator is seeded by (seed, epoch, index)."""
    return {**sample, "prompt_draw": random.getrandbits(62)}
