"""What is refused, and with which words; and what models say of their labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from kd_transformers.build import build
from kd_transformers.options import TransformersOptions
from kdcore.data import Task, vocabulary_fingerprint
from kdcore.errors import ModelError
from kdcore.models import Model, check_pair

Folder = Callable[..., str]
Config = Callable[..., dict[str, Any]]
CLASSES = Task("classification", classes=("cat", "dog", "eel"))


def make(task: Task, **options: Any) -> Model:
    return build(TransformersOptions(**options), task).eval()


def named(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def test_another_number_of_classes_is_refused_naming_both(folder: Folder) -> None:
    where = folder("bert", "sequence-classification", **named("pro", "contra"))
    with pytest.raises(ModelError, match=r"2 classes \(pro, contra\).* 3 \(cat, dog, eel\).*new_head: true"):
        make(CLASSES, model=where)


def test_a_new_head_takes_the_classes_of_the_task_and_keeps_the_body(folder: Folder) -> None:
    where = folder("bert", "sequence-classification", **named("pro", "contra"))
    old, new = make(Task("unlabelled"), model=where), make(CLASSES, model=where, new_head=True)
    assert old.labels.names == ("pro", "contra")
    assert new.labels.names == ("cat", "dog", "eel")
    body = "bert.encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(new.module.get_parameter(body), old.module.get_parameter(body))


def test_a_checkpoint_keeps_the_names_it_was_trained_with(folder: Folder) -> None:
    where = folder("bert", "sequence-classification", **named("dog", "cat", "eel"))
    teacher, student = make(CLASSES, model=where), make(CLASSES, model=where, pretrained=False)
    assert teacher.labels.names == ("dog", "cat", "eel")
    with pytest.raises(ModelError, match="'dog' is class 0 and 1"):
        check_pair(teacher.labels, student.labels)


def test_numbered_labels_say_nothing(folder: Folder) -> None:
    model = make(CLASSES, model=folder("bert", "sequence-classification", num_labels=3))
    assert model.labels.count == 3
    assert model.labels.names is None


def test_a_pretrained_body_gets_a_fresh_head_for_the_task(folder: Folder) -> None:
    model = make(CLASSES, model=folder("bert", "masked-lm"))
    assert model.labels.names == ("cat", "dog", "eel")


def test_regression_has_one_output(config: Config) -> None:
    model = make(Task("regression"), config=config("bert"))
    assert model({"input_ids": torch.ones(2, 3, dtype=torch.long)}).need("logits").shape == (2, 1)
    assert model.module.config.problem_type == "regression"


def test_a_head_that_does_not_exist_lists_those_that_do(config: Config) -> None:
    with pytest.raises(ModelError, match=r"'segformer' with the head 'causal-lm'.*image-classification, semantic-segm"):
        make(Task("causal-lm", num_classes=40), config=config("segformer"))


def test_unlabelled_data_leaves_the_checkpoint_its_head(folder: Folder) -> None:
    model = make(Task("unlabelled"), model=folder("bert", "masked-lm"))
    assert type(model.module).__name__ == "BertForMaskedLM"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hiden_size": 8}, "config.hiden_size: .*did you mean .*hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size.*expected int"),
        ({"num_attention_heads": 3}, "multiple of the number of attention"),
        ({"model_type": "brt"}, "config.model_type: .*'brt'.*did you mean .*'bert'"),
        ({"num_labels": 4}, "config.num_labels: the classes come from the data"),
    ],
)
def test_a_wrong_config_is_named(change: dict[str, Any], words: str, config: Config) -> None:
    with pytest.raises(ModelError, match=words):
        make(CLASSES, config=config("bert", **change))


def test_changes_of_a_checkpoints_shape_are_refused(folder: Folder) -> None:
    where = folder("bert", "sequence-classification", num_labels=3)
    for new_head in (True, False):
        with pytest.raises(ModelError, match=r"have the shape .*leave `config` as it is there"):
            make(CLASSES, model=where, config={"intermediate_size": 64}, new_head=new_head)
    fresh = make(CLASSES, model=where, config={"intermediate_size": 64}, pretrained=False)
    assert fresh.module.bert.encoder.layer[0].intermediate.dense.out_features == 64


def test_fewer_layers_of_a_checkpoint_are_its_first(folder: Folder) -> None:
    where = folder("bert", "sequence-classification", num_labels=3)
    whole, half = make(CLASSES, model=where), make(CLASSES, model=where, config={"num_hidden_layers": 1})
    assert half.stages == ("bert.encoder.layer.0",)
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(half.module.get_parameter(name), whole.module.get_parameter(name))


def test_a_decoder_without_padding_token_cannot_classify(config: Config, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=r"'gpt2'.*no padding token.*pad_token_id"):
        make(CLASSES, config=config("gpt2"))
    task = Task("classification", classes=CLASSES.classes, tokenizer=tokenizer())
    assert make(task, config=config("gpt2")).module.config.pad_token_id == 0


def test_a_decoder_takes_the_padding_token_of_its_own_tokenizer(folder: Folder) -> None:
    assert make(CLASSES, model=folder("gpt2", "causal-lm", tokenizer=True)).module.config.pad_token_id == 0


def test_an_unreachable_model_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/nothing' cannot be loaded(.|\n)*checkpoint:"):
        make(CLASSES, model="nobody/nothing")


def test_a_folder_without_safetensors_is_refused(folder: Folder) -> None:
    where = Path(folder("bert", "sequence-classification", num_labels=3))
    torch.save({}, where / "pytorch_model.bin")
    (where / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        make(CLASSES, model=str(where))


def test_a_checkpoint_must_be_a_folder_of_the_same_type(folder: Folder, config: Config, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="checkpoint: there is no folder"):
        make(CLASSES, config=config("bert"), checkpoint=str(tmp_path / "none"))
    where = folder("distilbert", "sequence-classification", num_labels=3)
    with pytest.raises(ModelError, match="'distilbert', the config asks for 'bert'"):
        make(CLASSES, config=config("bert"), checkpoint=where)


def test_code_of_a_checkpoint_does_not_run_unasked(folder: Folder) -> None:
    where = Path(folder("bert", "sequence-classification", num_labels=3))
    ran = where / "ran"
    (where / "strange.py").write_text(f"open({str(ran)!r}, 'w')\nclass Config: ...\n")
    text = (where / "config.json").read_text().replace('"model_type": "bert"', '"model_type": "strange"')
    (where / "config.json").write_text(text.replace("{", '{"auto_map": {"AutoConfig": "strange.Config"},', 1))
    with pytest.raises(ModelError, match="trust_remote_code"):
        make(CLASSES, model=str(where))
    assert not ran.exists()


def test_language_models_tell_their_vocabulary(folder: Folder, tokenizer: Any) -> None:
    task = Task("causal-lm", num_classes=40, vocabulary=vocabulary_fingerprint(tokenizer()))
    teacher = make(task, model=folder("gpt2", "causal-lm", tokenizer=True))
    assert teacher.labels.count == 40
    assert teacher.labels.vocabulary == task.vocabulary
    fresh = make(task, config={"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2})
    check_pair(teacher.labels, fresh.labels)
    other = Task("causal-lm", num_classes=40, vocabulary=vocabulary_fingerprint(tokenizer(first="other")))
    with pytest.raises(ModelError, match="different vocabularies"):
        check_pair(make(other, config={"model_type": "gpt2", "n_embd": 16, "n_head": 2}).labels, teacher.labels)


def test_a_classifier_with_another_tokenizer_than_the_data_is_refused(folder: Folder, tokenizer: Any) -> None:
    where = folder("bert", "sequence-classification", tokenizer=True, num_labels=3)
    mine, other = (vocabulary_fingerprint(tokenizer(first=first)) for first in ("word", "other"))
    assert make(Task("classification", num_classes=3, vocabulary=mine), model=where).labels.count == 3
    with pytest.raises(ModelError, match="tokenise the data with the model's tokenizer"):
        make(Task("classification", num_classes=3, vocabulary=other), model=where)


def test_the_fingerprint_depends_on_tokens_ids_and_additions(tokenizer: Any) -> None:
    added = tokenizer()
    added.add_tokens(["[NEW]"])
    prints = {vocabulary_fingerprint(t) for t in (tokenizer(), added, tokenizer(first="w"), tokenizer(39))}
    assert len(prints) == 4
    assert vocabulary_fingerprint(tokenizer()) == vocabulary_fingerprint(tokenizer())


@pytest.mark.parametrize(
    ("name", "batch", "words"),
    [
        ("bert", {"image": torch.zeros(1, 3, 32, 32)}, "reads 'input_ids'; the batch has: image"),
        ("bert", {"input_ids": torch.ones(1, 65, dtype=torch.long)}, "at most 64 tokens, the batch has 65"),
        ("vit", {"image": torch.zeros(1, 3, 48, 48)}, r"cannot take this batch of image \[1, 3, 48, 48\].*32"),
        ("vit", {"image": torch.zeros(1, 1, 32, 32)}, "images of 3 channels, the batch's have 1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(name: str, batch: Any, words: str, config: Config) -> None:
    changes = {"max_position_embeddings": 64} if name == "bert" else {}
    with pytest.raises(ModelError, match=words):
        make(CLASSES, config=config(name, **changes))(batch)


def test_seq2seq_needs_decoder_inputs_or_labels(config: Config) -> None:
    with pytest.raises(ModelError, match="'decoder_input_ids', or 'labels'"):
        make(Task("seq2seq", num_classes=40), config=config("t5"))({"input_ids": torch.ones(1, 4, dtype=torch.long)})


def test_of_several_classes_for_a_head_a_fresh_model_is_the_usual_one(tmp_path: Path, config: Config) -> None:
    fresh = make(CLASSES, config=config("vit", model_type="deit"))
    assert type(fresh.module).__name__ == "DeiTForImageClassification"
    fresh.save(tmp_path)
    again = make(Task("unlabelled"), model=str(tmp_path))
    assert type(again.module) is type(fresh.module)
    assert again.labels == fresh.labels
