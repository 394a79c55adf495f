"""A sentence encoder that learns another's embeddings: `python benchmarks/encoders.py [--rounds 7] [--epochs 4]`.

A small BERT learns, by mean squared error, the embeddings (mean over the tokens) that a deeper one gave beforehand to
1,024 texts of 8 to 40 words: a run of this project with the teacher in a column of the data, a loop by hand, and
sentence-transformers' trainer with its `MSELoss`, in turn, in one process. Texts become tokens batch by batch on all
sides, the optimizer is AdamW without weight decay at a constant rate, nothing is clipped or dropped out. The sides draw
their batches in orders of their own, so what is held together is the error over all texts after training: to 10 %.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loops
import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, LR, WIDTH, VOCABULARY, ROWS = 32, 5e-4, 128, 8000, 1024
NEEDS = {"student": ("embedding",), "teacher": ("embedding",)}


def prepare(where: Path) -> dict[str, Any]:
    """A tokenizer of whole words, a student on disk, texts, and a teacher's embeddings of them."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = random.Random(0)
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(VOCABULARY - 2))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    texts = [" ".join(rng.choices(words[2:], k=rng.randrange(8, 41))) for _ in range(ROWS)]
    nets = []
    for layers in (6, 2):
        torch.manual_seed(layers)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=4 * WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        nets.append(transformers.BertModel(config, add_pooling_layer=False))
    nets[1].save_pretrained(where / "student")
    tokenizer.save_pretrained(where / "student")
    with torch.no_grad():
        teacher = nets[0].eval()
        parts = [embed(teacher, tokenizer(texts[i : i + 64], padding=True, return_tensors="pt"))
                 for i in range(0, ROWS, 64)]  # fmt: skip
    return {"tokenizer": tokenizer, "texts": texts, "targets": torch.cat(parts), "student": nets[1], "where": where}


def embed(net: nn.Module, inputs: Any) -> Tensor:
    """The mean over the tokens, `[B, D]`."""
    hidden = net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def error(net: nn.Module, made: dict[str, Any]) -> float:
    """The mean squared error over all texts."""
    with torch.no_grad():
        inputs = made["tokenizer"](made["texts"], padding=True, return_tensors="pt")
        return F.mse_loss(embed(net.eval(), inputs), made["targets"]).item()


def data_module(made: dict[str, Any]) -> Any:
    from kdcore import DataModule, Task

    tokenizer = made["tokenizer"]

    def collate(samples: list[Any]) -> dict[str, Any]:
        inputs = tokenizer([sample["text"] for sample in samples], padding=True, return_tensors="pt")
        return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"],
                "target": torch.stack([sample["target"] for sample in samples])}  # fmt: skip

    rows = [{"text": text, "target": row} for text, row in zip(made["texts"], made["targets"], strict=True)]
    return DataModule({"train": rows}, Task("unlabelled"), collate=collate)


def by_kd(made: dict[str, Any], epochs: int) -> loops.Found:
    """A run, its teacher a column; the loss is registered as anybody would register one."""
    import kdcore
    from kdcore import Component, Loss, Model, Outputs, PluginManager
    from kdcore.models import FromColumns

    class Embeddings(Loss):
        needs = NEEDS

        def forward(self, student: Outputs, teacher: Outputs, batch: Any) -> Tensor:
            return F.mse_loss(student.need("embedding"), teacher.need("embedding"))

    class Plugin:
        @kdcore.hookimpl
        def kd_register_losses(self) -> list[Component]:
            return [Component("loss", "embeddings", target=lambda options: Embeddings())]

    manager = PluginManager()
    manager.register(Plugin(), name="embeddings")
    net = copy.deepcopy(made["student"])
    student = Model(net, lambda module, batch: Outputs(embedding=embed(module, batch)))
    train = {"epochs": epochs, "batch_size": BATCH, "save_every": 10**6, "eval_every": 10**6,
             "optimizer": {"name": "adamw", "lr": LR, "weight_decay": 0.0}, "schedule": "constant"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        teacher = FromColumns({"embedding": "target"})
        path = kdcore.distill(teacher, student, data_module(made), "distill", losses=[{"use": "embeddings"}],
                              train=train, run_dir=Path(folder) / "run", plugins=manager).path  # fmt: skip
        timing = json.loads((path / "run.json").read_text())["timings"]["distill"]
    return timing["seconds"] / timing["steps"], error(net, made)


def by_hand(made: dict[str, Any], epochs: int) -> loops.Found:
    """Plain PyTorch."""
    batches = loops.loader(data_module(made), BATCH)
    net = copy.deepcopy(made["student"]).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=LR, weight_decay=0.0)
    steps = epochs * (ROWS // BATCH)
    start = time.perf_counter()
    for number, batch in enumerate(loops.endless(batches, steps)):
        loss = F.mse_loss(embed(net, batch), batch["target"])
        if number % 10 == 0 and not torch.isfinite(loss):
            raise RuntimeError("the loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / steps, error(net, made)


def by_sentence_transformers(made: dict[str, Any], epochs: int) -> loops.Found:
    """Its trainer, from the beginning of training to its end."""
    import sentence_transformers as st
    from datasets import Dataset
    from sentence_transformers.sentence_transformer import losses
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    body = Transformer(str(made["where"] / "student"))
    model = st.SentenceTransformer(modules=[body, Pooling(WIDTH, "mean")], device="cpu")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        config = st.SentenceTransformerTrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=BATCH, learning_rate=LR, weight_decay=0.0,
            lr_scheduler_type="constant", optim="adamw_torch", max_grad_norm=0.0, use_cpu=True, report_to=[],
            save_strategy="no", logging_steps=10, disable_tqdm=True, dataloader_drop_last=True,
        )  # fmt: skip
        data = Dataset.from_dict({"text": made["texts"], "label": made["targets"].tolist()})
        trainer = st.SentenceTransformerTrainer(model=model, args=config, train_dataset=data,
                                                loss=losses.MSELoss(model), callbacks=[clock])  # fmt: skip
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()
    return clock.seconds / trainer.state.global_step, error(body.auto_model, made)


def compare(made: dict[str, Any], given: argparse.Namespace) -> measure.Row:
    sides: dict[str, Callable[[], loops.Found]] = {
        "kd": lambda: by_kd(made, given.epochs),
        "by hand": lambda: by_hand(made, given.epochs),
        "sentence-transformers": lambda: by_sentence_transformers(made, given.epochs),
    }
    found = measure.in_turn(sides, given.rounds)
    errors = {name: values[-1][1] for name, values in found.items()}
    if any(abs(value / errors["by hand"] - 1) > 0.1 for value in errors.values()):
        raise SystemExit(f"the errors after training differ: {errors}")
    times = {name: [1e3 * seconds for seconds, _ in values] for name, values in found.items()}
    said = ", ".join(f"{name} {value:.4g}" for name, value in errors.items())
    return measure.row("BERT learns embeddings", "ms per step", times, **{"error after training": said})


def main() -> None:
    parser = measure.parser(__doc__, rounds=7)
    parser.add_argument("--epochs", type=int, default=4)
    given = measure.begin(parser)
    with tempfile.TemporaryDirectory() as folder:
        made = compare(prepare(Path(folder)), given)
    measure.show(made)
    measure.write("encoders", [made], given)


if __name__ == "__main__":
    main()
