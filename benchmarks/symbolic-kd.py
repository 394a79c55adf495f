"""Symbolic knowledge distillation on ATOMIC-2020, with small models that are trained here.

    python benchmarks/symbolic-kd.py --data ../shared/data/atomic2020-sample [--seeds 3] [--runs runs/symbolic-kd]

The file holds human triples. By event, half of them train a causal language model, the teacher, on texts in the form
of the method's own prompts; of the other half, four fifths are for the critic and one fifth is held out, for the
student's perplexity and for the heads that it is asked about. Nobody judged generated triples for this file, so the
critic's labels are made: a human triple is valid; a copy of it with the tail of another triple, of any event and
relation, is not. The critic begins with the teacher's weights, in place of a
pretrained encoder. A second one of the same kind, the judge, is trained on such copies of the teacher's half and has no
part in the filter; it accepts what it scores above one half. Per seed, one student learns the triples that the critic
keeps, another as many at random, and a third, for comparison, the human triples of the teacher's half; all for the same
steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
import transformers
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import kdcore
from kd_symbolic_kd.critic import make_critic, score
from kd_symbolic_kd.functional import SPLITS, clean_tail, distinct, match, split_by_key
from kd_symbolic_kd.options import SymbolicKDOptions, TriplesOptions
from kd_symbolic_kd.prompts import event_prompt, tail_prompt
from kd_symbolic_kd.student import answers
from kdcore import api
from kdcore.data import Task

Triple = dict[str, Any]
SPECIAL = ("[PAD]", "[UNK]", "</s>")
OPTIONS = SymbolicKDOptions()
FRESH = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.05}
TEACHER = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 160, **FRESH}
STUDENT = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, **FRESH}
CRITIC = {"model": None, "pooling": "mean", "hidden": 128, "prior": None, "passes": 3, "patience": 100, "plateau": 100}
SHOTS = 1
STEPS = {"teacher": 1000, "critic": 300, "student": 400}


def read(folder: Path) -> list[Triple]:
    """The human triples of the seven relations about events of PersonX."""
    from kd_symbolic_kd.data import read as read_file

    file = str(folder / "test.tsv")
    options = TriplesOptions(path=file, tokenizer="-", relations=OPTIONS.relations)
    rows = [row for row in read_file(file, options, lambda row: True) if row["head"].startswith("PersonX")]
    return [row | {"tail": clean_tail(row["tail"].lower().replace("personx", "PersonX").replace("persony", "PersonY"))}
            for row in rows if "___" not in row["head"]]  # fmt: skip


def corrupted(rows: list[Triple], rng: random.Random, same_relation: bool = False) -> list[Triple]:
    """Labelled triples: each human one, and one with the tail of another triple."""
    by_relation: dict[str, list[Triple]] = {}
    for row in rows:
        by_relation.setdefault(row["relation"], []).append(row)
    true = {(row["head"], row["relation"], row["tail"]) for row in rows}
    found = []
    for row in rows:
        wrong = {**row, "tail": rng.choice(by_relation[row["relation"]] if same_relation else rows)["tail"], "valid": 0}
        found.append({**row, "valid": 1})
        if (wrong["head"], wrong["relation"], wrong["tail"]) not in true:
            found.append(wrong)
    return found


def make_tokenizer(rows: list[Triple], folder: Path) -> None:
    """Byte pairs, for all models."""
    made = Tokenizer(models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [f" {row[key]}" for row in rows for key in ("head", "tail")]
    texts += [f" {name}\n\n" for name in OPTIONS.names] * 20
    texts += [relation.intro + relation.item + relation.connector for relation in OPTIONS.words.values()] * 20
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=3000, special_tokens=[*SPECIAL], initial_alphabet=alphabet)
    )
    marks = dict(zip(("pad_token", "unk_token", "eos_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **marks).save_pretrained(folder)


def text_for_teacher(rows: list[Triple], rng: random.Random) -> str:
    """A prompt of the method with a human answer, as the teacher is asked later."""
    if rng.random() < 0.2:
        *shown, last = rng.sample(rows, SHOTS + 1)
        return event_prompt(OPTIONS.event_template, [row["head"] for row in shown]) + f" {last['head']}\n\n\n"
    row = rng.choice(rows)
    shown = [rng.choice(rows) for _ in range(60)]
    shown = [other for other in shown if other["relation"] == row["relation"]][:SHOTS]
    asked = tail_prompt(OPTIONS.words[row["relation"]], shown, row["head"], OPTIONS.names, OPTIONS.query_names, rng)
    tail = row["tail"].replace("PersonX", OPTIONS.query_names[0]).replace("PersonY", OPTIONS.query_names[1])
    return f"{asked} {tail}.\n"


def train_teacher(rows: list[Triple], tokenizer: Path, folder: Path) -> None:
    """A small GPT-2 on such texts, saved with its tokenizer."""
    torch.manual_seed(0)
    rng = random.Random(0)
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = transformers.GPT2Config(vocab_size=len(words), bos_token_id=2, eos_token_id=2, **TEACHER)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS["teacher"], pct_start=0.1)
    for _ in range(STEPS["teacher"]):
        texts = [text_for_teacher(rows, rng) for _ in range(16)]
        batch = words(texts, return_tensors="pt", padding=True, truncation=True, max_length=120)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"teacher: loss {loss.item():.2f} per token")
    model.save_pretrained(folder)
    words.save_pretrained(folder)


def train_judge(rows: list[Triple], teacher: Path) -> Any:
    """A second critic: `rows -> scores`."""
    torch.manual_seed(1000)
    rng = random.Random(1000)
    options = SymbolicKDOptions(critic={**CRITIC, "checkpoint": str(teacher)})
    labelled = corrupted(rows, rng)
    critic, reader = make_critic(options, Task("unlabelled"), labelled, seed=1000)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS["critic"], pct_start=0.1)
    for _ in range(STEPS["critic"]):
        batch = reader.batch([row | {"names": rng.sample(options.names, 2)} for row in rng.sample(labelled, 64)])
        loss = F.binary_cross_entropy_with_logits(critic(batch), batch["label"].float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    critic.eval().requires_grad_(False)

    def scores(rows: list[Triple]) -> list[float]:
        plain = [{key: row[key] for key in ("head", "relation", "tail")} for row in rows]
        parts = [plain[i : i + 128] for i in range(0, len(plain), 128)]
        return [value for part in parts for value in score(critic, reader, part, torch.device("cpu"))]

    return scores


def recipe(folder: Path, triples: str, seed: int) -> dict[str, Any]:
    """A student, its data and its training."""
    return {
        "student": {"use": "transformers", "config": STUDENT},
        "data": {"use": "triples", "path": str(folder / triples), "labelled": str(folder / f"labelled-{seed}.jsonl"),
                 "tokenizer": str(folder / "tokenizer")},
        "train": {"steps": STEPS["student"], "batch_size": 32, "optimizer": {"name": "adamw", "lr": 2e-3},
                  "schedule": {"name": "linear", "warmup": 0.1}, "eval_every": 10_000, "save_every": 10_000},
        "eval": {"on": ["test"]}, "seed": seed, "trackers": [],
    }  # fmt: skip


def filtered(folder: Path, seed: int) -> Path:
    """The run folder of the method."""
    teacher = str(folder / "teacher")
    method = {"use": "symbolic-kd", "event_prompts": 16, "event_shots": SHOTS, "inference_shots": SHOTS,
              "event_sampling": {"n": 16, "max_tokens": 16}, "target_recall": 0.5,
              "inference_sampling": {"n": 5, "top_p": 0.9, "max_tokens": 16},
              "critic": {**CRITIC, "checkpoint": teacher}}  # fmt: skip
    critic = {"steps": STEPS["critic"], "batch_size": 64, "eval_every": 60,
              "schedule": {"name": "linear", "warmup": 0.1},
              "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}}  # fmt: skip
    path = folder / f"critic-{seed}"
    kdcore.run({**recipe(folder, "human.jsonl", seed), "method": method, "stages": {"critic": {"train": critic}},
                "teacher": {"use": "transformers-text", "checkpoint": teacher, "batch_size": 128}},
               run_dir=path)  # fmt: skip
    return path


def write(path: Path, rows: list[Triple]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def critic_facts(path: Path, scores: Any) -> dict[str, float]:
    """What a run says of its critic and its corpus."""
    artifact = next(path.glob("stages/*-filter/artifact"))
    said = json.loads((artifact / "report.json").read_text())
    corpus = datasets.load_from_disk(str(artifact / "data")).to_list()
    rows = [json.loads(line) for line in (path / "metrics.jsonl").open()]
    found = [row["metrics"] for row in rows if row["stage"] == "critic" and "metrics" in row]
    best = max(found, key=lambda metrics: metrics["test/precision-at-recall"])
    return {
        "critic AUC": best["test/auroc"], "precision at recall 0.8": best["test/precision-at-recall"],
        "labelled valid": said["test"]["valid"], "precision at cut-off": said["test"]["precision"],
        "recall at cut-off": said["test"]["recall"], "rows": said["rows"], "rows kept": said["kept"],
        "corpus accepted": statistics.mean(value > 0.5 for value in scores(corpus)),
        "kept accepted": statistics.mean(value > 0.5 for value in scores([row for row in corpus if row["kept"]])),
    }  # fmt: skip


def student_facts(path: Path, scores: Any) -> dict[str, float]:
    """What the student of a run says about held-out heads."""
    run, model = api.load_student(path)
    known: dict[tuple[str, str], list[str]] = {}
    for row in run.data["test"]:
        known.setdefault((row["head"], row["relation"]), []).append(row["tail"])
    tails = answers(model, run.data, [*known], OPTIONS.max_new_tokens, torch.device("cpu"))
    rows = [{"head": key[0], "relation": key[1], "tail": tail} for key, tail in zip(known, tails, strict=True)]
    return {
        "accepted": statistics.mean(value > 0.5 for value in scores(rows)),
        "perplexity": json.loads((path / "run.json").read_text())["metrics"]["test/perplexity"],
        "match": statistics.mean(match(tail, those) for tail, those in zip(tails, known.values(), strict=True)),
        "distinct-2": distinct(tails),
    }  # fmt: skip


def others(folder: Path, seed: int, path: Path, taught: list[Triple], held_out: list[Triple]) -> dict[str, Path]:
    """Run folders of the students that learn as many triples at random, and the human ones, in the same steps."""
    corpus = datasets.load_from_disk(str(next(path.glob("stages/*-filter/artifact")) / "data")).to_list()
    rows = [{key: row[key] for key in ("head", "relation", "tail")} for row in corpus if row["split"] == "train"]
    count = sum(row["kept"] for row in corpus if row["split"] == "train")
    found = {}
    for name, those in (("unfiltered", random.Random(seed).sample(rows, count)), ("human", taught)):
        data = [row | {"split": "train"} for row in those] + [row | {"split": "test"} for row in held_out]
        write(folder / f"{name}-{seed}.jsonl", data)
        found[name] = folder / f"{name}-{seed}"
        kdcore.run({**recipe(folder, f"{name}-{seed}.jsonl", seed), "method": "supervised"}, run_dir=found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/atomic2020-sample"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/symbolic-kd"))
    given = parser.parse_args()
    given.runs.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    rows = read(given.data)
    part = split_by_key((row["head"] for row in rows), (0.5, 0.4, 0.1), seed=0)
    taught, labelled, held_out = ([row for row in rows if part[row["head"]] == name] for name in SPLITS)
    print(f"{len(rows)} human triples: {len(taught)} teach, {len(labelled)} for the critic, {len(held_out)} held out")
    make_tokenizer(taught, given.runs / "tokenizer")
    train_teacher(taught, given.runs / "tokenizer", given.runs / "teacher")
    scores = train_judge(taught, given.runs / "teacher")
    print(
        f"judge: accepts {statistics.mean(value > 0.5 for value in scores(held_out)):.3f} of the human triples held out"
    )
    for same in (False, True):
        test = corrupted(held_out, random.Random(0), same)
        auc = roc_auc_score([row["valid"] for row in test], scores(test))
        print(f"judge: AUC {auc:.3f} where wrong tails are of {'the same' if same else 'any'} relation")
    print(f"{time.process_time():.0f} s of processor time so far", flush=True)
    parts = ((taught, "train"), (held_out, "test"))
    write(given.runs / "human.jsonl", [row | {"split": split} for rows, split in parts for row in rows])

    table: dict[str, list[dict[str, float]]] = {}
    for seed in range(given.seeds):
        groups = split_by_key((row["head"] for row in labelled), (0.6, 0.2, 0.2), seed)
        made = [row | {"split": groups[row["head"]]} for row in corrupted(labelled, random.Random(seed))]
        write(given.runs / f"labelled-{seed}.jsonl", made)
        path = filtered(given.runs, seed)
        table.setdefault("critic", []).append(critic_facts(path, scores))
        paths = {"filtered": path, **others(given.runs, seed, path, taught, held_out)}
        for name, path in paths.items():
            table.setdefault(f"student, {name}", []).append(student_facts(path, scores))
        print(f"seed {seed}: {time.process_time():.0f} s of processor time so far", flush=True)
    for name, found in table.items():
        for key in found[0]:
            values = [facts[key] for facts in found]
            each = ", ".join(f"{value:.3f}" for value in values)
            print(f"{name:20} {key:26} {statistics.mean(values):9.3f} ± {statistics.pstdev(values):.3f}   ({each})")


if __name__ == "__main__":
    main()
