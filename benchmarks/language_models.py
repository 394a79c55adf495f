"""An epoch of distillation, offline and on-policy, beside TRL's GKDTrainer and a loop by hand.

    python benchmarks/language_models.py [--rows 64] [--vocabulary 32000] [--rounds 3]

All train the same small Llama from the same larger one on the same chats with the generalised JSD: on the data's
answers (lambda 0), and on answers of the student (lambda 1, not by hand). Every measurement is a process of its own;
they take turns; memory is what the peak of resident memory rises above what stood before. The batches come in orders of
their own; the mean of the steps' losses must agree to 5 %. Needs `trl`.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

BATCH, NEW, WORDS_COUNTED = 8, 32, 49
"""The last: what TRL divides an on-policy loss by, the tokens of the data's answer in place of the student's."""
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def prepare(where: Path, rows: int, vocabulary: int) -> None:
    """Chats, a tokenizer of whole words, and two Llamas."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rng = random.Random(0)
    words = ["<pad>", "<s>", "</s>", "<unk>", "user:", "assistant:", *(f"w{i}" for i in range(vocabulary - 6))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                        unk_token="<unk>", chat_template=TEMPLATE)  # fmt: skip

    def said(count: int) -> str:
        return " ".join(f"w{rng.randrange(vocabulary - 6)}" for _ in range(count))

    chats = [{"messages": [{"role": "user", "content": said(16)}, {"role": "assistant", "content": said(48)}]}
             for _ in range(rows)]  # fmt: skip
    (where / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for name, width, layers in (("teacher", 128, 4), ("student", 64, 2)):
        torch.manual_seed(0)
        sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
        tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, **sizes, **tokens)
        LlamaForCausalLM(config).save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)


def by_trl(where: Path, share: float) -> dict[str, float]:
    """An epoch of GKDTrainer."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.start

    clock = Clock()
    config = GKDConfig(
        output_dir=str(where / "trl"), num_train_epochs=1, per_device_train_batch_size=BATCH, lmbda=share, beta=0.5,
        temperature=1.0, max_new_tokens=NEW, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True,
        max_length=128, bf16=False, gradient_checkpointing=False, logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    models = [AutoModelForCausalLM.from_pretrained(where / name) for name in ("student", "teacher")]
    data = load_dataset("json", data_files=str(where / "chats.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(where / "student")
    trainer = GKDTrainer(model=models[0], teacher_model=models[1], args=config, train_dataset=data,
                         processing_class=tokenizer, callbacks=[clock])  # fmt: skip
    before = measure.reset_peak()
    found = trainer.train()
    return {"seconds": clock.seconds, "bytes": measure.peak() - before, "loss": found.training_loss}


def by_kd(where: Path, share: float) -> dict[str, float]:
    """An epoch of a run of this project."""
    import kdcore

    recipe = {
        "method": {"use": "llm-kd-suite", "algorithm": "gkd", "lmbda": share, "max_new_tokens": NEW, "answers": 0},
        "teacher": {"use": "transformers", "checkpoint": str(where / "teacher")},
        "student": {"use": "transformers", "checkpoint": str(where / "student")},
        "data": {"use": "datasets", "path": str(where / "chats.jsonl"), "task": "causal-lm",
                 "tokenizer": str(where / "student"), "max_length": 128},
        "train": {"epochs": 1, "batch_size": BATCH, "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0},
                  "clip_norm": 1.0, "schedule": "linear", "log_every": 1},
        "trackers": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        import kd_transformers.build  # noqa: F401

        before = measure.reset_peak()
        kdcore.run(recipe, run_dir=folder)
        facts = json.loads((Path(folder) / "run.json").read_text())
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        losses = [row["terms"]["jsd"] for row in rows if "terms" in row]
        return {
            "seconds": facts["timings"]["distill"]["seconds"],
            "bytes": measure.peak() - before,
            "loss": sum(losses) / len(losses),
        }


def by_hand(where: Path, share: float) -> dict[str, float]:
    """An epoch of plain PyTorch on the data's answers, the plain formula of the divergence in it."""
    import torch
    from divergences import plain
    from transformers import AutoModelForCausalLM

    import kdcore

    component = kdcore.PluginManager().get("data", "datasets")
    options = component.load_options()
    data = component.load_target()(options(path=str(where / "chats.jsonl"), task="causal-lm", max_length=128,
                                           tokenizer=str(where / "student")))  # fmt: skip
    student, teacher = (AutoModelForCausalLM.from_pretrained(where / name) for name in ("student", "teacher"))
    teacher.eval().requires_grad_(False)
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0.0)
    batches = torch.utils.data.DataLoader(data["train"], BATCH, shuffle=True, collate_fn=data.collate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1e-9, len(batches))
    losses = []
    before, start = measure.reset_peak(), time.perf_counter()
    for batch in batches:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            theirs = teacher(**inputs).logits
        loss = plain(student(**inputs).logits, theirs, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    seconds = time.perf_counter() - start
    mean = torch.stack(losses).mean().item()
    return {"seconds": seconds, "bytes": measure.peak() - before, "loss": mean}


SIDES: dict[str, Any] = {"kd": by_kd, "TRL": by_trl, "by hand": by_hand}


def one(who: str, folder: str, share: str, threads: int) -> None:
    """A measurement, in a process of its own."""
    import torch

    torch.set_num_threads(threads)
    print(json.dumps(SIDES[who](Path(folder), float(share))))


def compare(case: str, share: int, who: list[str], folder: str, given: argparse.Namespace) -> list[measure.Row]:
    """Time and memory of an epoch, where the losses agree."""
    more = ["--threads", given.threads, "--one"]
    sides = {side: functools.partial(measure.child, __file__, *more, side, folder, share) for side in who}
    found = measure.in_turn(sides, given.rounds, warm=0)
    losses = {side: values[-1]["loss"] for side, values in found.items()}
    if share:
        losses["TRL"] *= WORDS_COUNTED / NEW
    if any(abs(loss / losses["TRL"] - 1) > 0.05 for loss in losses.values()):
        raise SystemExit(f"{case}: the losses differ: {losses}")
    said = {"mean losses": ", ".join(f"{side} {loss:.4g}" for side, loss in losses.items())}
    rows = []
    for key, unit, factor in (("seconds", "seconds per epoch", 1), ("bytes", "GB above the models", 1e-9)):
        values = {side: [factor * x[key] for x in those] for side, those in found.items()}
        rows.append(measure.row(case, unit, values, **said))
        measure.show(rows[-1])
    return rows


def main() -> None:
    parser = measure.parser(__doc__, rounds=3)
    for name, value in (("rows", 64), ("vocabulary", 32_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=3, help="a side, a folder and lambda: one measurement, as JSON")
    given = parser.parse_args()
    if given.one:
        one(*given.one, given.threads)
        return
    made = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given.rows, given.vocabulary)
        for share, case, who in ((0, "offline, answers of the data", [*SIDES]), (1, "on-policy, GKD", ["kd", "TRL"])):
            if given.only in case:
                made += compare(case, share, who, folder, given)
    measure.write("language_models", made, given)


if __name__ == "__main__":
    main()
