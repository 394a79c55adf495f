"""An epoch of distillation, offline and on-policy, beside TRL's GKDTrainer on the same models and data.

    python benchmarks/language_models.py [--rows 64] [--vocabulary 32000] [--rounds 3]

Both train the same small Llama from the same larger one on the same chats with the generalised JSD: on the data's
answers (lambda 0), and on answers of the student (lambda 1). Every measurement is a process of its own, one thread; the
two take turns; memory is what the peak of resident memory rises above what stood before. Needs `trl`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BATCH, NEW = 8, 32
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


def peak() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def by_trl(where: Path, share: float) -> dict[str, float]:
    """An epoch of GKDTrainer."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(
        output_dir=str(where / "trl"), num_train_epochs=1, per_device_train_batch_size=BATCH, lmbda=share, beta=0.5,
        temperature=1.0, max_new_tokens=NEW, learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True,
        max_length=128, bf16=False, gradient_checkpointing=False, logging_steps=10, disable_tqdm=True,
    )  # fmt: skip
    models = [AutoModelForCausalLM.from_pretrained(where / name) for name in ("student", "teacher")]
    data = load_dataset("json", data_files=str(where / "chats.jsonl"), split="train")
    tokenizer = AutoTokenizer.from_pretrained(where / "student")
    trainer = GKDTrainer(model=models[0], teacher_model=models[1], args=config, train_dataset=data,
                         processing_class=tokenizer)  # fmt: skip
    before = reset()
    found = trainer.train()
    return {"seconds": found.metrics["train_runtime"], "bytes": peak() - before, "loss": found.training_loss}


def by_kd(where: Path, share: float) -> dict[str, float]:
    """An epoch of a run of this project."""
    import kdcore

    recipe = {
        "method": {"use": "llm-kd-suite", "algorithm": "gkd", "lmbda": share, "max_new_tokens": NEW, "answers": 0},
        "teacher": {"use": "transformers", "checkpoint": str(where / "teacher")},
        "student": {"use": "transformers", "checkpoint": str(where / "student")},
        "data": {"use": "datasets", "path": str(where / "chats.jsonl"), "task": "causal-lm",
                 "tokenizer": str(where / "student"), "max_length": 128},
        "train": {"epochs": 1, "batch_size": BATCH, "optimizer": {"name": "adamw", "lr": 1e-3}, "clip_norm": 1.0},
        "trackers": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        import kd_transformers.build  # noqa: F401

        before = reset()
        kdcore.run(recipe, run_dir=folder)
        facts = json.loads((Path(folder) / "run.json").read_text())
        rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        last = next(row["terms"]["jsd"] for row in reversed(rows) if "terms" in row)
        return {"seconds": facts["timings"]["distill"]["seconds"], "bytes": peak() - before, "loss": last}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 64), ("vocabulary", 32_000), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(1)
        who, folder, share = args.one
        made: dict[str, Any] = {"trl": by_trl, "kd": by_kd}
        print(json.dumps(made[who](Path(folder), float(share))))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.rows, args.vocabulary)
        print(f"{args.rows} chats, batches of {BATCH}, vocabulary {args.vocabulary}, float32, 1 thread")
        print(f"{'texts of':10} {'who':4} {'seconds':>8} {'ratio':>6} {'GB':>6} {'ratio':>6}")
        for share, texts in ((0, "the data"), (1, "student")):
            found: dict[str, list[dict[str, float]]] = {"trl": [], "kd": []}
            for _ in range(args.rounds):
                for who in found:
                    command = [sys.executable, __file__, "--one", who, folder, str(share)]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        raise SystemExit(done.stderr[-3000:])
                    found[who].append(json.loads(done.stdout.splitlines()[-1]))
            s, b = ({who: statistics.median(x[k] for x in found[who]) for who in found} for k in ("seconds", "bytes"))
            for who in found:
                times, memory = (
                    f"{s[who]:8.1f} {s[who] / s['trl']:6.2f}",
                    f"{b[who] / 1e9:6.2f} {b[who] / b['trl']:6.2f}",
                )
                print(f"{texts:10} {who:4} {times} {memory}")


if __name__ == "__main__":
    main()
