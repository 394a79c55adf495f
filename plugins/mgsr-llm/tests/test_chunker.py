import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kd_demo.grammar import TOKENIZER
from kd_mgsr_llm.chunker import Spans, decoded, make_chunker, rule_phrases, token_spans
from kdcore.data import IGNORE
from kdcore.errors import DataError

TEXT = "The old dentist's drill, polished in the market and sold; nobody was paying for it. Why?"


def phrases(text: str) -> list[str]:
    return [text[start:end] for start, end in rule_phrases(text)]


@pytest.fixture(scope="module")
def fast() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on two sentences."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator([TEXT, "naïve café in Zürich"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def test_rules_split_at_punctuation_and_before_prepositions_conjunctions_and_auxiliaries():
    assert phrases(TEXT) == ["The old dentist's drill", "in the market", "and sold", "was paying", "for it"]
    assert phrases("") == phrases("word") == phrases("one, two, three") == []


def test_whole_word_tokenizer_gives_phrases_as_positions():
    ids = TOKENIZER.encode("the old dentist drilled the molar . today the dentist polished near the river .")
    labels = [IGNORE, IGNORE, *ids, TOKENIZER.end_id, IGNORE]
    found = [TOKENIZER.decode(labels[start:end]) for start, end in Spans(TOKENIZER)(labels)]
    assert found == ["the old dentist drilled the molar", "today the dentist polished", "near the river"]


def test_fast_tokenizer_maps_phrases_to_tokens_exactly(fast):
    ids = fast.encode(TEXT)
    found = [fast.decode(ids[start:end]).strip() for start, end in Spans(fast)(ids)]
    assert found == phrases(TEXT)


def test_offsets_by_growing_text_are_those_of_the_fast_tokenizer(fast):
    ids = fast.encode(TEXT)
    quick = decoded(fast, ids)
    slow = decoded(SimpleNamespace(decode=fast.decode), ids)
    assert quick == slow


def test_tokens_that_no_encoding_gives_are_mapped_by_growing_text(fast):
    ids = [i for character in "old drill in naïve Zürich" for i in fast.encode(character)]
    assert fast.encode("old drill in naïve Zürich") != ids
    text, offsets = decoded(fast, ids)
    assert text == "old drill in naïve Zürich"
    assert offsets[0] == (0, 1)
    assert offsets[-1][1] == len(text)
    assert all(one[1] == two[0] for one, two in pairwise(offsets))
    found = [fast.decode(ids[start:end]).strip() for start, end in token_spans(text, offsets, rule_phrases)]
    assert found == ["old drill", "in naïve Zürich"]


def test_special_tokens_and_gaps_end_a_text(fast):
    one, two = fast.encode("old drill"), fast.encode("sold market")
    end = fast.eos_token_id
    labels = [IGNORE, *one, end, *two, IGNORE, *one]
    first, second, third = 1, 2 + len(one), 3 + len(one) + len(two)
    assert Spans(fast)(labels) == [(first, first + len(one)), (second, second + len(two)), (third, third + len(one))]


def test_phrase_of_one_token_is_left_out():
    assert token_spans("two words", [(0, 9)], rule_phrases) == []
    assert token_spans("two words", [(0, 3), (3, 9)], rule_phrases) == [(0, 2)]


def test_text_is_chunked_once(monkeypatch):
    spans, calls = Spans(TOKENIZER), []
    monkeypatch.setattr(spans, "chunker", lambda text: calls.append(text) or rule_phrases(text))
    labels = [*TOKENIZER.encode("the old dentist"), IGNORE]
    assert spans(labels) == spans(labels)
    assert calls == ["the old dentist"]


@pytest.mark.parametrize("name", ["nltk", "spacy"])
def test_library_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=f"pip install {name}"):
        make_chunker(name)


def test_models_of_libraries_that_are_missing_are_named(monkeypatch):
    def missing(error: type[Exception]):
        def refuse(*args):
            raise error("not found")

        return refuse

    nltk, spacy = ModuleType("nltk"), ModuleType("spacy")
    nltk.pos_tag, spacy.load = missing(LookupError), missing(OSError)
    monkeypatch.setitem(sys.modules, "nltk", nltk)
    monkeypatch.setitem(sys.modules, "spacy", spacy)
    with pytest.raises(DataError, match=r"nltk\.downloader"):
        make_chunker("nltk")
    with pytest.raises(DataError, match="spacy download"):
        make_chunker("spacy")
