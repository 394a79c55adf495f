import json
import logging
from pathlib import Path

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kd_datasets.data import hub_or_local
from kd_datasets.options import DatasetsOptions
from kd_datasets.packing import best_fit_decreasing
from kdcore.data import IGNORE
from kdcore.errors import DataError, RecipeError

datasets.disable_progress_bars()
GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<end>"]
WORDS = ["one", "two", "three", "four", "five", "six"]  # 7 to 12
PAD, UNK, BOS, EOS, USER, ASSISTANT, END = range(7)
ONE, TWO, THREE, FOUR, FIVE, SIX = range(7, 13)
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>"
    "{% endgeneration %}{% else %}{{ m.content }} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def tokenizer(tmp_path):
    """`tokenizer(chat=None, bos=False, **special)`: the folder of a tokenizer of words."""

    def make(chat=None, bos=False, pad_token="<pad>", eos_token="<eos>"):
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<bos> $A <eos>", special_tokens=[("<bos>", BOS), ("<eos>", EOS)]
            )
        whole = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", pad_token=pad_token, eos_token=eos_token
        )
        whole.chat_template = chat
        whole.save_pretrained(tmp_path / "tok")
        return str(tmp_path / "tok")

    return make


@pytest.fixture
def load(tmp_path):
    """`load(rows, tokenizer, **options)`: data whose train and val hold the same rows."""

    def make(rows, tokenizer, **options):
        path, text = tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows))
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
        options = {"splits": {"train": "train", "val": "train"}, **options}
        return hub_or_local(DatasetsOptions(path=str(path), tokenizer=tokenizer, **options))

    return make


def refusal(load, *arguments, error=DataError, **options):
    with pytest.raises(error) as caught:
        load(*arguments, **options)
    return str(caught.value)


def ids(data, split="train"):
    return [sample["input_ids"].tolist() for sample in data[split]]


def labels(data, split="train"):
    return [sample["labels"].tolist() for sample in data[split]]


def said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


PAIRS = [{"prompt": "one two", "completion": "three"}, {"prompt": "four", "completion": "five six <eos>"}]


# -- prompts and completions -----------------------------------------------------------------------------------------


def test_only_the_completion_counts_and_ends_with_the_end_token_once(load, tokenizer):
    data = load(PAIRS, tokenizer())
    batch = data.sample("train", 2)
    assert data.task.kind == "causal-lm"
    assert set(batch) == {"input_ids", "attention_mask", "labels", "index"}
    assert batch["input_ids"].tolist() == [[ONE, TWO, THREE, EOS], [FOUR, FIVE, SIX, EOS]]
    assert batch["labels"].tolist() == [[IGNORE, THREE, EOS, IGNORE], [FIVE, SIX, EOS, IGNORE]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_short_rows_are_padded_on_the_right(load, tokenizer):
    batch = load([*PAIRS, {"prompt": "one", "completion": "two"}], tokenizer()).sample("train", 3)
    assert batch["input_ids"][2].tolist() == [ONE, TWO, EOS, PAD]
    assert batch["attention_mask"][2].tolist() == [1, 1, 1, 0]
    assert batch["labels"][2].tolist() == [TWO, EOS, IGNORE, IGNORE]


def test_everything_counts_where_that_is_asked_for(load, tokenizer):
    data = load(PAIRS, tokenizer(), train_on="all")
    assert labels(data) == [[TWO, THREE, EOS, IGNORE], [FIVE, SIX, EOS, IGNORE]]


def test_special_tokens_stand_before_the_prompt_and_nowhere_else(load, tokenizer):
    data = load(PAIRS, tokenizer(bos=True))
    assert ids(data) == [[BOS, ONE, TWO, THREE, EOS], [BOS, FOUR, FIVE, SIX, EOS]]
    assert labels(data)[0] == [IGNORE, IGNORE, THREE, EOS, IGNORE]


def test_the_columns_can_have_other_names(load, tokenizer):
    rows = [{"q": "one", "a": "two", "prompt": 5}]
    assert ids(load(rows, tokenizer(), prompt="q", completion="a")) == [[ONE, TWO, EOS]]


def test_other_splits_than_train_have_the_texts(load, tokenizer):
    data = load(PAIRS, tokenizer(), template="four {{ prompt }}")
    batch = data.sample("val", 2)
    assert batch["prompt"] == ["four one two", "four four"]
    assert batch["completion"] == ["three", "five six <eos>"]
    assert "prompt" not in data.sample("train", 2)


def test_a_template_makes_the_prompt_of_all_fields(load, tokenizer):
    rows = [{"first": "one", "text": "two", "completion": "three"}]
    data = load(rows, tokenizer(), template="{{ first }} {% if text %}{{ text }}{% endif %}")
    assert ids(data) == [[ONE, TWO, THREE, EOS]]
    message = refusal(load, rows, tokenizer(), error=RecipeError, template="{{ frist }}")
    assert "no field 'frist'" in message
    assert "did you mean 'first'" in message


def test_text_alone_is_learnt_whole(load, tokenizer):
    data = load([{"text": "one two three", "other": 1}], tokenizer(), text="text")
    assert labels(data) == [[TWO, THREE, IGNORE]]
    assert "prompt" not in data.sample("val", 1)


def test_tokens_are_made_once_and_again_only_where_something_differs(load, tokenizer, monkeypatch):
    from kd_datasets.language import Encoder

    made = []
    encode = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, *row: made.append(row) or encode(self, *row))

    def count(**options):
        made.clear()
        load(PAIRS, tokenizer(**options.pop("special", {})), splits={"train": "train"}, **options)
        return len(made)

    assert [count(), count()] == [2, 0]
    assert [count(max_length=3), count(max_length=3, seed=5), count(train_on="all")] == [2, 0, 2]
    assert [count(special={"bos": True}), count(special={"chat": CHAT}), count()] == [2, 2, 0]


# -- chats -----------------------------------------------------------------------------------------------------------

TURNS = said(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five"))


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_every_turn_of_the_assistant_counts(load, tokenizer, template):
    data = load([{"messages": TURNS}], tokenizer(template))
    assert ids(data) == [
        [USER, ONE, END, ASSISTANT, TWO, END, USER, THREE, END, ASSISTANT, FOUR, FIVE, END],
    ]
    assert labels(data) == [
        [*[IGNORE] * 3, TWO, END, *[IGNORE] * 4, FOUR, FIVE, END, IGNORE],
    ]
    batch = data.sample("val", 1)
    assert batch["prompt"] == ["<user> one <end> <assistant> two <end> <user> three <end> <assistant> "]
    assert batch["completion"] == ["four five"]


def test_a_template_that_marks_what_the_assistant_says_is_taken_at_its_word(load, tokenizer):
    template = MARKED.replace(" <end>{% endgen", "{% endgen").replace("{% else %}", " <end>{% else %}")
    template = "{% for m in messages %}{% if loop.last %}six {% endif %}{% endfor %}" + template
    data = load([{"messages": TURNS[:2]}], tokenizer(template))
    assert ids(data) == [[SIX, USER, ONE, END, ASSISTANT, TWO, END]]
    assert labels(data) == [[*[IGNORE] * 4, TWO, IGNORE, IGNORE]]


def test_prompt_and_completion_can_be_messages(load, tokenizer):
    rows = [{"prompt": said(("user", "one")), "completion": said(("assistant", "two"))}]
    data = load(rows, tokenizer(CHAT, bos=True))
    assert ids(data) == [[USER, ONE, END, ASSISTANT, TWO, END]]
    assert labels(data) == [[*[IGNORE] * 3, TWO, END, IGNORE]]
    batch = data.sample("val", 1)
    assert (batch["prompt"], batch["completion"]) == (["<user> one <end> <assistant> "], ["two"])


def test_fields_that_a_message_does_not_have_are_not_shown_to_the_template(load, tokenizer):
    template = CHAT.replace("{{ m.content }}", "{{ m.content }}{% if m.tool is defined %} six{% endif %}")
    messages = [{**TURNS[0], "tool": "x"}, TURNS[1]]  # in a table, the second has the field too: as nothing
    assert ids(load([{"messages": messages}], tokenizer(template))) == [[USER, ONE, SIX, END, ASSISTANT, TWO, END]]


def test_chats_need_a_chat_template(load, tokenizer):
    assert "the tokenizer has no chat template" in refusal(load, [{"messages": TURNS}], tokenizer())


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}six{{ m.content }} {% endfor %}{% if add_generation_prompt %}six{% endif %}",
        "{% for m in messages %}{% if loop.last %}three {% endif %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}",
    ],
    ids=["a token spans prompt and answer", "the last message is written differently"],
)
def test_a_template_that_hides_where_the_assistant_begins_is_refused(load, tokenizer, template):
    message = refusal(load, [{"messages": TURNS}], tokenizer(template))
    assert "split 'train', row 0" in message
    assert "nobody can tell where the assistant begins" in message
    assert len(load([{"messages": TURNS}], tokenizer(template), train_on="all")["train"]) == 1


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_what_a_chat_template_refuses_is_told(load, tokenizer, template):
    template += "{% if messages | length > 3 %}{{ raise_exception('too long a chat') }}{% endif %}"
    message = refusal(load, [{"messages": TURNS}], tokenizer(template))
    assert "split 'train', row 0: messages: the tokenizer's chat template refuses them: too long a chat" in message


# -- preferences -----------------------------------------------------------------------------------------------------


def test_preferences_are_ranked_with_the_chosen_answer_first(load, tokenizer):
    rows = [
        {"prompt": "one", "chosen": "two", "rejected": "three four"},
        {"prompt": "one two", "chosen": "three four", "rejected": "five"},
    ]
    batch = load(rows, tokenizer()).sample("val", 2)
    assert batch["ranked_input_ids"].tolist() == [
        [[ONE, TWO, EOS, PAD, PAD], [ONE, THREE, FOUR, EOS, PAD]],
        [[ONE, TWO, THREE, FOUR, EOS], [ONE, TWO, FIVE, EOS, PAD]],
    ]
    assert batch["ranked_attention_mask"].tolist() == [[[1, 1, 1, 0, 0], [1] * 4 + [0]], [[1] * 5, [1] * 4 + [0]]]
    assert batch["ranked_labels"].tolist() == [
        [[TWO, EOS, *[IGNORE] * 3], [THREE, FOUR, EOS, IGNORE, IGNORE]],
        [[IGNORE, THREE, FOUR, EOS, IGNORE], [IGNORE, FIVE, EOS, IGNORE, IGNORE]],
    ]
    assert batch["input_ids"].tolist() == batch["ranked_input_ids"][:, 0].tolist()
    assert batch["labels"].tolist() == batch["ranked_labels"][:, 0].tolist()
    assert (batch["prompt"], batch["completion"]) == (["one", "one two"], ["two", "three four"])


def test_preferences_can_be_messages(load, tokenizer):
    answers = {name: said(("assistant", word)) for name, word in (("chosen", "two"), ("rejected", "three"))}
    batch = load([{"prompt": said(("user", "one")), **answers}], tokenizer(CHAT)).sample("train", 1)
    assert batch["ranked_input_ids"].tolist() == [[[USER, ONE, END, ASSISTANT, word, END] for word in (TWO, THREE)]]


def test_a_preference_is_left_out_where_one_answer_is_missing_or_too_long(load, tokenizer, caplog):
    rows = [
        {"prompt": "one", "chosen": "two", "rejected": "three"},
        {"prompt": "one", "chosen": "two", "rejected": ""},
        {"prompt": "one", "chosen": "two", "rejected": "three four five"},
    ]
    data = load(rows, tokenizer(), splits={"train": "train"}, max_length=3, truncation="drop")
    assert len(data["train"]) == 1
    assert "2 of 3 rows are left out: 1 longer than max_length, 1 without a rejected answer" in caplog.text


# -- rows that are too long, or teach nothing ------------------------------------------------------------------------

LONG = [
    {"prompt": "one", "completion": "two"},
    {"prompt": "one two", "completion": "three four five"},  # 6 tokens
    {"prompt": "one two three four five", "completion": "six"},  # 7 tokens, 5 of them in the prompt
]


def test_keep_start_cuts_the_end_and_leaves_out_what_then_teaches_nothing(load, tokenizer, caplog):
    data = load(LONG, tokenizer(), splits={"train": "train"}, max_length=4)
    assert ids(data) == [[ONE, TWO, EOS], [ONE, TWO, THREE, FOUR]]
    assert labels(data)[1] == [IGNORE, THREE, FOUR, IGNORE]
    assert [record.getMessage() for record in caplog.records] == [
        "split 'train': 1 of 3 rows are left out: 1 without a token to predict"
    ]


def test_keep_end_cuts_the_beginning_of_the_prompt(load, tokenizer):
    data = load(LONG, tokenizer(), max_length=4, truncation="keep_end")
    assert ids(data) == [[ONE, TWO, EOS], [TWO, THREE, FOUR, FIVE], [FOUR, FIVE, SIX, EOS]]
    assert labels(data)[1:] == [[THREE, FOUR, FIVE, IGNORE], [IGNORE, SIX, EOS, IGNORE]]
    special = load(LONG, tokenizer(bos=True), max_length=4, truncation="keep_end")
    assert ids(special) == [[BOS, ONE, TWO, EOS], [BOS, TWO, THREE, FOUR], [BOS, FIVE, SIX, EOS]]


def test_keep_end_keeps_the_last_turn_of_a_chat_and_the_end_of_a_text(load, tokenizer):
    data = load([{"messages": TURNS}], tokenizer(CHAT), max_length=5, truncation="keep_end")
    assert ids(data) == [[END, ASSISTANT, FOUR, FIVE, END]]
    assert labels(data) == [[IGNORE, FOUR, FIVE, END, IGNORE]]
    text = load([{"text": "one two three four"}], tokenizer(), max_length=2, truncation="keep_end")
    assert (ids(text), labels(text)) == ([[THREE, FOUR]], [[FOUR, IGNORE]])


def test_drop_leaves_out_and_counts(load, tokenizer, caplog):
    data = load(LONG, tokenizer(), max_length=4, truncation="drop")
    assert ids(data) == ids(data, "val") == [[ONE, TWO, EOS]]
    assert [record.getMessage() for record in caplog.records] == [
        f"split {split!r}: 2 of 3 rows are left out: 2 longer than max_length" for split in ("train", "val")
    ]


def test_what_was_left_out_is_told_again_when_the_tokens_are_there_already(load, tokenizer, caplog):
    for _ in range(2):
        caplog.clear()
        load(LONG, tokenizer(), splits={"train": "train"}, max_length=4, truncation="drop")
        assert "2 of 3 rows are left out" in caplog.text


def test_error_names_split_row_and_length(load, tokenizer):
    message = refusal(load, LONG, tokenizer(), max_length=4, truncation="error")
    assert "split 'train', row 1 is longer than max_length (6 tokens, 4 are allowed)" in message


@pytest.mark.parametrize("empty", ["", " ", None])
def test_rows_without_a_completion_are_left_out_or_refused(load, tokenizer, caplog, empty):
    rows = [*PAIRS, {"prompt": "one", "completion": empty}]
    assert len(load(rows, tokenizer(), splits={"train": "train"})["train"]) == 2
    assert "1 of 3 rows are left out: 1 without a completion" in caplog.text
    assert "row 2 is without a completion" in refusal(load, rows, tokenizer(), truncation="error")


@pytest.mark.parametrize("template", [CHAT, MARKED])
def test_chats_in_which_the_assistant_says_nothing_are_left_out(load, tokenizer, caplog, template):
    rows = [{"messages": TURNS}, {"messages": TURNS[:1]}, {"messages": []}]
    assert len(load(rows, tokenizer(template), splits={"train": "train"})["train"]) == 1
    assert "2 of 3 rows are left out: 2 without a completion" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_no_row_left_is_an_error(load, tokenizer, streaming):
    options = {"max_length": 2, "truncation": "drop", "streaming": streaming}
    with pytest.raises(DataError, match="none of the 3 rows is left to learn from: 3 longer than max_length"):
        load(LONG, tokenizer(), **options).sample("train", 1)


# -- tokenizers that lack something ----------------------------------------------------------------------------------


def test_without_a_pad_token_the_end_token_pads(load, tokenizer):
    batch = load([*PAIRS, {"prompt": "one", "completion": "two"}], tokenizer(pad_token=None)).sample("train", 3)
    assert batch["input_ids"][2].tolist() == [ONE, TWO, EOS, EOS]
    assert batch["attention_mask"][2].tolist() == [1, 1, 1, 0]
    assert batch["labels"][2].tolist() == [TWO, EOS, IGNORE, IGNORE]


def test_without_an_end_token_none_is_appended_and_one_warning_says_so(load, tokenizer, caplog):
    data = load(PAIRS, tokenizer(pad_token=None, eos_token=None))
    batch = data.sample("train", 2)
    assert batch["input_ids"].tolist() == [[ONE, TWO, THREE, 0], [FOUR, FIVE, SIX, EOS]]
    assert [record.levelno for record in caplog.records if "no token for the end" in record.message] == [
        logging.WARNING
    ]


# -- several texts in one row ----------------------------------------------------------------------------------------

PACKED = [
    {"prompt": "one", "completion": "two three"},  # 4 tokens
    {"prompt": "four", "completion": "five"},  # 3
    {"prompt": "six", "completion": "one two three"},  # 5
    {"prompt": "one", "completion": "six"},  # 3
]


def test_packed_rows_hold_texts_apart(load, tokenizer):
    data = load(PACKED, tokenizer(), packing=True, max_length=8)
    assert data.size("train") == 2
    batch = data.sample("train", 2)
    assert set(batch) == {"input_ids", "labels", "position_ids", "index"}
    assert batch["input_ids"].tolist() == [
        [SIX, ONE, TWO, THREE, EOS, FOUR, FIVE, EOS],
        [ONE, TWO, THREE, EOS, ONE, SIX, EOS, PAD],
    ]
    assert batch["labels"].tolist() == [
        [ONE, TWO, THREE, EOS, IGNORE, FIVE, EOS, IGNORE],
        [TWO, THREE, EOS, IGNORE, SIX, EOS, IGNORE, IGNORE],
    ]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 0]]
    assert data.size("val") == 4
    assert "position_ids" not in data.sample("val", 2)


def test_a_model_says_the_same_of_packed_texts_as_of_each_alone(load, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=13
    )
    model = LlamaForCausalLM(config).eval()
    alone = load(PACKED, tokenizer()).sample("val", 4)

    def loss(batch):
        keys = ("input_ids", "attention_mask", "position_ids")
        logits = model(**{key: batch[key] for key in keys if key in batch}, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORE)

    with torch.no_grad():
        expected = loss(alone)
        for options in ({"packing": True}, {"padding_free": True}):
            batch = load(PACKED, tokenizer(), max_length=8, **options).sample("train", 4)
            torch.testing.assert_close(loss(batch), expected)
            joined = {
                **batch,
                "position_ids": torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["labels"]),
            }
            assert abs(loss(joined) - expected) > 1e-4


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_without_padding_are_one_row(load, tokenizer, streaming):
    data = load(PAIRS, tokenizer(), padding_free=True, streaming=streaming, shuffle_buffer=1)
    batch = data.sample("train", 2)
    assert set(batch) == {"input_ids", "labels", "position_ids", "index"}
    assert batch["input_ids"].tolist() == [[ONE, TWO, THREE, EOS, FOUR, FIVE, SIX, EOS]]
    assert batch["labels"].tolist() == [[IGNORE, THREE, EOS, IGNORE, FIVE, SIX, EOS, IGNORE]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["index"].tolist() == [0, 1]
    assert data.sample("val", 2)["input_ids"].shape == (2, 4)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_loses_and_repeats_nothing_and_wastes_less_than_half(lengths):
    groups = best_fit_decreasing(lengths, 20)
    sizes = [sum(lengths[i] for i in group) for group in groups]
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(size <= 20 for size in sizes)
    assert all(a + b > 20 for n, a in enumerate(sizes) for b in sizes[:n])
    assert groups == best_fit_decreasing(lengths, 20)


def test_the_fullest_row_with_room_is_filled_first():
    assert best_fit_decreasing([3, 6, 5, 4, 1], 9) == [[1, 0], [2, 3], [4]]
    assert best_fit_decreasing([7, 5, 3, 2], 10) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "set `max_length`"),
        ({"packing": True, "max_length": 8, "streaming": True}, "a stream does not tell"),
        ({"packing": True, "max_length": 8, "padding_free": True}, "need no `padding_free`"),
        ({"template": "x", "prompt": "q"}, "makes the prompt, and so does the column 'q'"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        DatasetsOptions(path="x", **options)


def test_preferences_and_further_columns_are_not_packed(load, tokenizer):
    rows = [{"prompt": "one", "chosen": "two", "rejected": "three"}]
    assert "only texts can be laid end to end" in refusal(load, rows, tokenizer(), packing=True, max_length=8)
    rows = [{**row, "weight": 1.0} for row in PAIRS]
    options = {"prompt": "prompt", "completion": "completion", "columns": {"w": "weight"}}
    assert "only texts can be laid end to end" in refusal(load, rows, tokenizer(), padding_free=True, **options)
    assert load(rows, tokenizer(), **options).sample("train", 2)["w"].tolist() == [1.0, 1.0]


# -- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (LONG, {"max_length": 4, "truncation": "drop"}),
        (LONG, {"max_length": 4, "truncation": "keep_end", "template": "six {{ prompt }}"}),
        ([{"messages": TURNS}, {"messages": TURNS[:1]}], {}),
        ([{"prompt": "one", "chosen": "two", "rejected": "three four"}], {}),
    ],
)
def test_a_stream_gives_the_same_samples_and_tells_the_same(load, tokenizer, caplog, rows, options):
    ready = load(rows, tokenizer(CHAT), shuffle_buffer=1, **options)
    told = [record.getMessage() for record in caplog.records]
    caplog.clear()
    stream = load(rows, tokenizer(CHAT), shuffle_buffer=1, streaming=True, **options)
    for split in ("train", "val"):
        for expected, found in zip(ready[split], stream[split], strict=True):
            assert expected.keys() == found.keys()
            assert all(torch.equal(torch.as_tensor(expected[key]), torch.as_tensor(found[key]))
                       for key in expected if key not in ("prompt", "completion"))  # fmt: skip
            assert all(expected[key] == found[key] for key in ("prompt", "completion") if key in expected)
    list(stream["train"])
    assert [record.getMessage() for record in caplog.records] == told


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_columns_that_are_missing_or_too_many_are_named(load, tokenizer):
    assert "completion: the data has no column 'completions'; did you mean 'completion'?" in refusal(
        load, PAIRS, tokenizer(), prompt="prompt", completion="completions"
    )
    assert "found: `prompt`" in refusal(load, PAIRS, tokenizer(), prompt="prompt")
    assert "found: none of them" in refusal(load, [{"a": "b"}], tokenizer(), task="causal-lm", columns={"x": "a"})
    several = [{**PAIRS[0], "messages": TURNS}]
    assert "(completion, prompt or messages)" in refusal(load, several, tokenizer(CHAT))
    assert len(load(several, tokenizer(CHAT), messages="messages")["train"]) == 1


def test_options_of_a_language_model_are_refused_elsewhere(load, tokenizer):
    rows = [{"text": "one", "label": 0, "prompt": "two"}]
    for option in ({"packing": True, "max_length": 4}, {"truncation": "drop"}, {"train_on": "all"}, {"template": "x"}):
        assert "this is for a language model" in refusal(load, rows, tokenizer(), label="label", **option)
    assert "only a language model" in refusal(load, rows, tokenizer(), prompt="prompt", label="label",
                                              task="classification")  # fmt: skip
    assert "a language model's texts need one" in refusal(load, PAIRS, None, task="causal-lm")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 5, "completion": "two"}, "two texts or two lists of messages; found 5 and 'two'"),
        ({"prompt": "one", "completion": said(("assistant", "two"))}, "two texts or two lists of messages"),
        ({"prompt": [{"from": "user"}], "completion": [{"from": "x"}]}, "each with the texts `role` and `content`"),
        ({"messages": "one"}, "messages: found 'one' where a list of messages is expected"),
        ({"text": 5}, "text: column 'text' holds 5 where a text is expected"),
    ],
)
def test_rows_of_another_kind_are_named(load, tokenizer, row, message):
    found = refusal(load, [row], tokenizer(CHAT), task="causal-lm")
    assert "split 'train', row 0" in found
    assert message in found


# -- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"{GSM8K} is not there")
def test_word_problems_are_tokenised_packed_and_read_back(tmp_path):
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text().splitlines()[:200]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<pad>", "<eos>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    inner.train_from_iterator((text for row in rows for text in row.values()), trainer)
    PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        tmp_path / "tok"
    )
    options = {"path": str(tmp_path / "rows.jsonl"), "val_fraction": 0.1, "tokenizer": str(tmp_path / "tok"),
               "template": "{{ question }}\nAnswer: ", "completion": "answer", "max_length": 1024}  # fmt: skip
    data = hub_or_local(DatasetsOptions(**options))
    decode = data.task.tokenizer.decode
    for sample in data["val"]:
        counted = sample["labels"] != IGNORE
        first = int(counted.nonzero()[0])
        assert decode(sample["input_ids"][: first + 1]) == sample["prompt"]
        assert decode(sample["labels"][counted]) == sample["completion"] + "<eos>"
    packed = hub_or_local(DatasetsOptions(**options, packing=True))
    texts = [decode(sample["input_ids"]) for sample in data["train"]]
    found = [text for row in packed["train"] for text in decode(row["input_ids"]).split("<eos>")[:-1]]
    assert sorted(found) == sorted(text.removesuffix("<eos>") for text in texts)
    assert len(packed["train"]) < len(data["train"]) / 2
