"""A small grammar: sentences about themes, the themes grouped into topics, and the tokenizer of their words."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable

THEMES: dict[str, dict[str, tuple[str, str]]] = {
    "weather": {
        "storm": ("thunder gale lightning tempest squall cloudburst", "rumbled raged flashed flooded"),
        "heat": ("drought sunshine heatwave haze desert dust", "scorched glowed parched shimmered"),
        "snow": ("blizzard frost icicle snowflake glacier sleet", "froze drifted melted whitened"),
    },
    "cooking": {
        "baking": ("dough flour oven yeast crust cake", "kneaded baked rose sweetened"),
        "grill": ("steak charcoal skewer marinade barbecue sausage", "grilled smoked seared sizzled"),
        "soup": ("broth ladle lentil stew cauldron onion", "simmered stirred boiled seasoned"),
    },
    "sport": {
        "football": ("goalkeeper striker penalty referee stadium midfielder", "tackled dribbled scored defended"),
        "tennis": ("racket serve umpire backhand volley net", "rallied smashed faulted returned"),
        "swimming": ("butterfly lane goggles freestyle relay swimmer", "dived splashed floated paddled"),
    },
    "music": {
        "orchestra": ("violin conductor symphony cello oboe overture", "conducted bowed rehearsed crescendoed"),
        "rock": ("guitarist drummer amplifier riff encore bassist", "strummed drummed distorted headlined"),
        "choir": ("soprano hymn tenor psalm organist carol", "sang chanted hummed harmonised"),
    },
    "travel": {
        "rail": ("locomotive platform carriage signal viaduct sleeper", "shunted derailed whistled coupled"),
        "sea": ("ferry anchor harbour captain lighthouse schooner", "sailed docked moored capsized"),
        "air": ("airliner runway pilot cockpit turbulence hangar", "landed taxied hovered ascended"),
    },
    "medicine": {
        "teeth": ("dentist molar enamel cavity brace filling", "drilled polished extracted flossed"),
        "surgery": ("surgeon scalpel anaesthetic incision suture transplant", "operated stitched bandaged bled"),
        "eyes": ("retina pupil optician cataract lens cornea", "blinked squinted focused dilated"),
    },
}
"""Nouns and verbs of each theme, by topic. The themes are what stays hidden behind the topics."""

ADJECTIVES = ["old", "young", "famous", "quiet", "heavy", "strange", "small", "bright"]
PLACES = ["city", "village", "valley", "river", "market", "square"]
TIMES = ["yesterday", "today", "again", "suddenly", "later", "often"]
TEMPLATES = tuple(line.split() for line in (
    "the ADJECTIVE NOUN VERB the NOUN",
    "TIME the NOUN VERB near the PLACE",
    "a NOUN and a NOUN VERB in the PLACE",
    "the NOUN VERB and the ADJECTIVE NOUN VERB TIME",
    "in the PLACE a NOUN VERB the ADJECTIVE NOUN",
))  # fmt: skip
TOPICS = tuple(THEMES)
THEME_LIST = tuple((TOPICS.index(topic), theme) for topic in TOPICS for theme in THEMES[topic])
"""(topic number, theme) of each theme, in the order of their numbers."""

_WORDS = [tuple(words.split() for words in THEMES[TOPICS[topic]][theme]) for topic, theme in THEME_LIST]
_COMMON = {"ADJECTIVE": ADJECTIVES, "PLACE": PLACES, "TIME": TIMES}


def sentence(rng: random.Random, theme: int, confusion: float) -> str:
    """A sentence about a theme; each noun and verb comes with probability `confusion` from another theme."""
    return " ".join(_word(rng, slot, theme, confusion) for slot in rng.choice(TEMPLATES)) + " ."


def nouns(theme: int) -> list[str]:
    """The nouns of a theme."""
    return _WORDS[theme][0]


def _word(rng: random.Random, slot: str, theme: int, confusion: float) -> str:
    if slot in _COMMON:
        return rng.choice(_COMMON[slot])
    if slot not in ("NOUN", "VERB"):
        return slot
    if rng.random() < confusion:
        theme = (theme + rng.randrange(1, len(_WORDS))) % len(_WORDS)
    return rng.choice(_WORDS[theme][slot == "VERB"])


class Tokenizer:
    """Whole words of a fixed vocabulary, in lower case, separated by blanks.

    Attributes:
        words: the vocabulary in the order of the ids.
        pad_id, unknown_id, start_id, end_id: ids of `<pad>`, `<unk>`, `<s>` and `</s>`.
        fingerprint: a digest of the vocabulary; equal fingerprints mean equal ids.
    """

    SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
    pad_id, unknown_id, start_id, end_id = range(4)

    def __init__(self, words: Iterable[str]) -> None:
        self.words = (*self.SPECIAL, *sorted(set(words)))
        self.fingerprint = hashlib.blake2b("\n".join(self.words).encode(), digest_size=8).hexdigest()
        self._ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Ids of the words of a text; `unknown_id` for words that are not in the vocabulary."""
        return [self._ids.get(word, self.unknown_id) for word in text.lower().split()]

    def decode(self, ids: Iterable[int]) -> str:
        """The words of the ids, without padding, start and end."""
        return " ".join(self.words[int(i)] for i in ids if int(i) not in (self.pad_id, self.start_id, self.end_id))


def vocabulary() -> set[str]:
    """Every word that a sentence can hold."""
    fixed = {word for template in TEMPLATES for word in template if word.islower()}
    return (
        {word for words in (*_COMMON.values(), *(w for pair in _WORDS for w in pair)) for word in words} | fixed | {"."}
    )


TOKENIZER = Tokenizer(vocabulary())
"""The tokenizer of all sentences of the grammar."""
