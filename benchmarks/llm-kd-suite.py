"""The table of kd-llm-kd-suite and kd-mgsr-llm: small Llamas on Shakespeare, each algorithm over several seeds.

    python benchmarks/llm-kd-suite.py FOLDER_WITH_input.txt [--seeds 0 1 2] [--only gkd mgsr] [--work DIR]

A byte-pair tokenizer is made of the first nine tenths of the text, a teacher trained on them, and every student begins
with an epoch of language modelling on a fifth of them; then it learns by its algorithm for as many epochs as all.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import kdcore

CASES = {
    "student alone": {"algorithm": "sft"},
    "SFT on teacher text": {"algorithm": "seqkd"},
    "forward KL": {"algorithm": "fkl"},
    "reverse KL": {"algorithm": "rkl"},
    "JSD": {"algorithm": "jsd"},
    "skewed reverse KL": {"algorithm": "srkl"},
    "DistiLLM": {"algorithm": "distillm"},
    "MiniLLM": {"algorithm": "minillm", "kd_ratio": 0.5},
    "GKD": {"algorithm": "gkd"},
    "MGSR": {"use": "mgsr-llm"},
}
METRICS = ("val/perplexity", "val/divergence", "val/teacher-logprob", "val/rouge-l")


def prepare(text: str, where: Path) -> None:
    """Write tokenizer, training rows and validation rows: passages of 240 characters, a third of each the prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    cut = len(text) * 9 // 10
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.train_from_iterator([text[:cut]], trainers.BpeTrainer(vocab_size=1024, special_tokens=["<pad>", "<s>", "</s>"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(where / "tokenizer")
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        passages = [part[i : i + 240] for i in range(0, len(part) - 239, 240)]
        rows = [{"prompt": p[:80], "completion": p[80:]} for p in (passages if name == "train" else passages[:200])]
        (where / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (where / f"{name}-fifth.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::5]))


def recipe(where: Path, train: str, method: dict[str, object]) -> dict[str, object]:
    tokens = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    data = {"use": "datasets", "path": str(where / train), "task": "causal-lm", "tokenizer": str(where / "tokenizer"),
            "prompt": "prompt", "completion": "completion"}  # fmt: skip
    return {
        "method": method,
        "student": {"use": "transformers", "config": {**tokens, "hidden_size": 64, "intermediate_size": 160,
                    "num_hidden_layers": 2, "num_attention_heads": 2}},
        "data": data,
        "train": {"epochs": 3, "batch_size": 16, "optimizer": {"name": "adamw", "lr": 3e-3}, "clip_norm": 1.0,
                  "schedule": {"name": "cosine", "warmup": 0.05}},
    }  # fmt: skip


def teacher(where: Path) -> Path:
    """The trained teacher."""
    found = recipe(where, "split", {"use": "supervised"})
    big = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 6}
    found["student"]["config"] |= big  # type: ignore[index]
    found["train"] |= {"epochs": 5, "batch_size": 32, "optimizer": {"name": "adamw", "lr": 2e-3}}  # type: ignore[operator]
    result = kdcore.run(found, run_dir=where / "teacher", resume=True)
    print(f"teacher: {result.metrics}", flush=True)
    return result.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/llm-kd-suite"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=list(CASES))
    args = parser.parse_args()
    where = args.work.absolute()
    where.mkdir(parents=True, exist_ok=True)
    if not (where / "tokenizer").exists():
        prepare((args.folder / "input.txt").read_text(encoding="utf-8"), where)
    for name, train in (("split", "train"), ("fifth", "train-fifth")):
        (where / name).mkdir(exist_ok=True)
        for file, source in (("train.jsonl", train), ("validation.jsonl", "val")):
            (where / name / file).write_text((where / f"{source}.jsonl").read_text())
    trained = teacher(where)
    print(f"{'algorithm':22}" + "".join(f"{metric.partition('/')[2]:>22}" for metric in METRICS), flush=True)
    for name in args.only:
        rows = []
        for seed in args.seeds:
            method = {"use": "llm-kd-suite", "sft_epochs": 1, "max_new_tokens": 64, "answers": 100, **CASES[name]}
            made = {**recipe(where, "fifth", method), "teacher": {"use": "transformers", "checkpoint": str(trained)},
                    "seed": seed}  # fmt: skip
            rows.append(kdcore.run(made, run_dir=where / f"{name.replace(' ', '-')}-{seed}", resume=True).metrics)
        cells = [[row[metric] for row in rows] for metric in METRICS]
        line = "".join(f"{statistics.mean(cell):14.3f} ± {statistics.pstdev(cell):5.3f}" for cell in cells)
        print(f"{name:22}{line}", flush=True)


if __name__ == "__main__":
    main()
