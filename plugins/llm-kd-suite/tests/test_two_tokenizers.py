"""A teacher with a tokenizer of its own: trained on the same text, read by different tokens."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kdcore import api
from kdcore.errors import UserError

TEXTS = [f"the {a} {b} the {c}" for a in ("cat", "dog", "bird") for b in ("saw", "heard", "followed")
         for c in ("mouse", "river", "house", "mountain")]  # fmt: skip


def saved(folder, size, width, sharp=1):
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    raw.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight *= sharp
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    root = tmp_path_factory.mktemp("two")
    student, teacher = saved(root / "student", 262, 16), saved(root / "teacher", 300, 32, sharp=20)
    rows = [{"prompt": text[:8], "completion": text[8:]} for text in TEXTS]
    for name in ("train", "val"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "method": {"use": "llm-kd-suite", "algorithm": "uld", "answers": 4, "max_new_tokens": 8},
        "teacher": {"use": "transformers", "model": teacher}, "student": {"use": "transformers", "model": student},
        "data": {"use": "datasets", "path": str(root / "train.jsonl"), "val_fraction": 0.25, "task": "causal-lm",
                 "tokenizer": student},
        "train": {"steps": 6, "batch_size": 8, "log_every": 1, "optimizer": {"name": "adamw", "lr": 1e-2}},
    }  # fmt: skip


@pytest.mark.parametrize("algorithm", ["uld", "span-uld"])
def test_the_student_learns_from_a_teacher_that_cuts_texts_otherwise(algorithm, recipe, tmp_path):
    method = {**recipe["method"], "algorithm": algorithm, "sft_weight": 0.01}
    result = api.run({**recipe, "method": method, "train": {**recipe["train"], "steps": 25}}, run_dir=tmp_path / "run")
    rows = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    terms = [row["terms"] for row in rows if row["stage"] == "distill" and "terms" in row]
    assert set(terms[0]) == {"sft", "uld"}
    assert sum(t["uld"] for t in terms[-5:]) < sum(t["uld"] for t in terms[:5])


def test_losses_for_one_tokenizer_refuse_two_and_name_those_that_work(recipe, tmp_path):
    with pytest.raises(UserError, match="kd list loss --tag two-tokenizers"):
        api.run({**recipe, "method": {**recipe["method"], "algorithm": "fkl"}}, run_dir=tmp_path / "run")


def test_micro_batches_give_the_student_of_the_whole_batch(recipe, tmp_path):
    students = []
    for parts in (1, 4):
        train = {**recipe["train"], "grad_accumulation": parts, "optimizer": {"name": "sgd", "lr": 0.1}}
        method = {**recipe["method"], "algorithm": "span-uld"}
        result = api.run({**recipe, "method": method, "train": train}, run_dir=tmp_path / str(parts))
        students.append(result.student.state_dict())
    for key, value in students[0].items():
        torch.testing.assert_close(value, students[1][key], rtol=1e-4, atol=1e-5)
