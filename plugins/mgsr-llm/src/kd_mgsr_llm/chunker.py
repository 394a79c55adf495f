"""Phrases of a text, and which tokens they are made of."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from kd_llm_kd_suite.functional import token_ends
from kd_mgsr_llm.options import ChunkerName
from kdcore.data import IGNORE
from kdcore.errors import DataError

Span = tuple[int, int]
"""Where something begins, and where what follows it does."""
Chunker = Callable[[str], list[Span]]
"""Text -> its phrases as ranges of characters: in order, and none in another."""

WORD = re.compile(r"\w+(?:['’\-]\w+)*")
_PREPOSITIONS = (
    "about above across after against along among around as at before behind below beneath beside between beyond by "
    "despite down during except for from in inside into like near of off on onto out outside over past per since than "
    "through throughout till to toward towards under until up upon via with within without"
)
_CONJUNCTIONS = (
    "although and because but if nor once or so that though unless when whenever where whereas whether which while who "
    "yet"
)
_AUXILIARIES = (
    "am are be been being can could did do does had has have is may might must shall should was were will would"
)
SPLITTERS = frozenset(f"{_PREPOSITIONS} {_CONJUNCTIONS} {_AUXILIARIES}".split())
"""Words that a phrase begins with, and never has in its middle."""
KEPT = 20_000
"""Texts whose spans are remembered: those of the data come again in each epoch."""

NOUN_VERB_PREPOSITION = r"""
    NP: {<DT|PRP\$|CD|POS>*<JJ.*|VBG|VBN|CD>*<NN.*>+}
    PP: {<IN|TO><NP>}
    VP: {<MD>?<RB.*>*<VB.*>+<RP|RB.*>*}
"""


def rule_phrases(text: str) -> list[Span]:
    """Phrases by rules for English: runs of words without punctuation, split before prepositions, conjunctions and
    auxiliaries; those of two words and more."""
    phrases: list[list[Span]] = []
    end = None
    for word in WORD.finditer(text):
        joined = end is not None and text[end : word.start()].isspace()
        if not joined or word[0].lower() in SPLITTERS:
            phrases.append([])
        phrases[-1].append(word.span())
        end = word.end()
    return [(words[0][0], words[-1][1]) for words in phrases if len(words) > 1]


def nltk_phrases() -> Chunker:
    """Noun, verb and prepositional phrases by NLTK's tagger and a grammar of tags.

    Raises:
        DataError: if NLTK or its tagger is not installed.
    """
    try:
        import nltk  # type: ignore[import-not-found]

        nltk.pos_tag(["a"])
    except ImportError:
        raise DataError("chunker nltk: NLTK is not installed: `pip install nltk`, or set `chunker: rules`") from None
    except LookupError:
        raise DataError("chunker nltk: NLTK's tagger is not there: `python -m nltk.downloader "
                        "averaged_perceptron_tagger_eng`, or set `chunker: rules`") from None  # fmt: skip
    parser, words = nltk.RegexpParser(NOUN_VERB_PREPOSITION), nltk.tokenize.WordPunctTokenizer()

    def phrases(text: str) -> list[Span]:
        places = list(words.span_tokenize(text))
        if not places:
            return []
        found, first = [], 0
        for part in parser.parse(nltk.pos_tag([text[start:end] for start, end in places])):
            size = len(part.leaves()) if isinstance(part, nltk.Tree) else 1
            if size > 1:
                found.append((places[first][0], places[first + size - 1][1]))
            first += size
        return found

    return phrases


def spacy_phrases() -> Chunker:
    """Noun phrases, with the preposition before them, and verbs with their auxiliaries, by spaCy's English model.

    Raises:
        DataError: if spaCy or the model is not installed.
    """
    try:
        import spacy  # type: ignore[import-not-found]

        nlp = spacy.load("en_core_web_sm")
    except ImportError:
        raise DataError("chunker spacy: spaCy is not installed: `pip install spacy`, or set `chunker: rules`") from None
    except OSError:
        raise DataError("chunker spacy: its English model is not there: `python -m spacy download en_core_web_sm`, or "
                        "set `chunker: rules`") from None  # fmt: skip

    def phrases(text: str) -> list[Span]:
        doc = nlp(text)
        kinds = [{"AUX": "verb", "VERB": "verb"}.get(token.pos_, "") for token in doc]
        for number, chunk in enumerate(doc.noun_chunks):
            start = chunk.start - (chunk.start > 0 and doc[chunk.start - 1].pos_ == "ADP")
            kinds[start : chunk.end] = [f"noun {number}"] * (chunk.end - start)
        runs = [list(run) for kind, run in groupby(range(len(doc)), lambda i: kinds[i]) if kind]
        return [(doc[run[0]].idx, doc[run[-1]].idx + len(doc[run[-1]])) for run in runs if len(run) > 1]

    return phrases


def make_chunker(name: ChunkerName) -> Chunker:
    """The chunker of a name. Raises `DataError` where it needs what is not installed."""
    return rule_phrases if name == "rules" else nltk_phrases() if name == "nltk" else spacy_phrases()


class Spans:
    """The phrases of rows of tokens, as ranges of positions.

    Args:
        tokenizer: one of transformers, or anything with `decode(ids)`.
        chunker: finds the phrases in their text.
    """

    def __init__(self, tokenizer: Any, chunker: ChunkerName = "rules") -> None:
        self.tokenizer, self.chunker = tokenizer, make_chunker(chunker)
        self.special = frozenset(getattr(tokenizer, "all_special_ids", ()))
        self.known: OrderedDict[tuple[int, ...], list[Span]] = OrderedDict()

    def __call__(self, labels: Sequence[int]) -> list[Span]:
        """The phrases in a row: (first position, position after the last), of two tokens and more.

        Each stretch of tokens that count and are not special is a text of its own.
        """
        return [(start + first, start + last) for start, ids in self._texts(labels)
                for first, last in self._spans(tuple(ids))]  # fmt: skip

    def _texts(self, labels: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        start = 0
        for counts, group in groupby(labels, lambda token: token != IGNORE and token not in self.special):
            ids = list(group)
            if counts:
                yield start, ids
            start += len(ids)

    def _spans(self, ids: tuple[int, ...]) -> list[Span]:
        if ids not in self.known:
            self.known[ids] = token_spans(*decoded(self.tokenizer, ids), self.chunker)
            if len(self.known) > KEPT:
                self.known.popitem(last=False)
        return self.known[ids]


def token_spans(text: str, offsets: Sequence[Span], chunker: Chunker) -> list[Span]:
    """The phrases of a text as ranges of its tokens; those of a single token are left out.

    Args:
        text: the text.
        offsets: the characters of each token.
        chunker: finds the phrases.
    """
    seen = [_without_blanks(text, span) for span in offsets]
    found = []
    for start, end in chunker(text):
        inside = [i for i, (first, last) in enumerate(seen) if start <= first < last <= end]
        if len(inside) > 1:
            found.append((inside[0], inside[-1] + 1))
    return found


def _without_blanks(text: str, span: Span) -> Span:
    start, end = span
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())


def decoded(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of some tokens, and the characters of each: from a fast tokenizer, if it makes the same tokens of that
    text again, or else from how the text grows, token by token."""
    text = _text(tokenizer, ids)
    if getattr(tokenizer, "is_fast", False):
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if list(again["input_ids"]) == list(ids):
            return text, [(start, end) for start, end in again["offset_mapping"]]
    ends = token_ends(lambda some: _text(tokenizer, some), ids)
    return text, list(zip([0, *ends], ends, strict=False))


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    if callable(tokenizer):  # of transformers
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    return str(tokenizer.decode(list(ids)))
