"""A toy world of events and what follows from them, and a scripted teacher that knows most of it."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

from kd_symbolic_kd.data import TripleData
from kd_symbolic_kd.options import NAMES, ScriptedWorldOptions, TextFormatOptions, WorldOptions
from kd_symbolic_kd.options import RELATIONS as WORDS
from kdcore.data import Task
from kdcore.errors import RecipeError
from kdcore.options import Sampling
from kdcore.text import Answer, Prompt, TextTeacher

RELATIONS = {"xNeed": "needed", "xWant": "wants", "xReact": "feels"}
"""Relations, and the word by which the teacher tells one in a prompt."""

FACTS: dict[str, dict[str, tuple[str, ...]]] = {
    "buys": {"xNeed": ("to have money", "to visit a market"), "xWant": ("to carry it home", "to unpack it"),
             "xReact": ("pleased", "poorer")},
    "loses": {"xNeed": ("to be careless", "to have it before"), "xWant": ("to search everywhere", "to ask PersonY"),
              "xReact": ("upset", "worried")},
    "paints": {"xNeed": ("to mix colours", "to get a brush"), "xWant": ("to let it dry", "to clean up"),
               "xReact": ("creative", "stained")},
    "repairs": {"xNeed": ("to find the fault", "to bring tools"), "xWant": ("to test it", "to be thanked"),
                "xReact": ("useful", "skilled")},
    "wins": {"xNeed": ("to enter a contest", "to train hard"), "xWant": ("to celebrate", "to tell PersonY"),
             "xReact": ("proud", "lucky")},
    "steals": {"xNeed": ("to break a window", "to wear a mask"), "xWant": ("to hide", "to escape"),
               "xReact": ("guilty", "nervous")},
}  # fmt: skip
"""What holds of an event: it depends on the verb and the relation alone."""

MYTHS = {
    "xNeed": ("to ask a wizard", "to whistle thrice", "to wear red shoes"),
    "xWant": ("to fly to the moon", "to become a frog", "to thank the stars"),
    "xReact": ("invisible", "weightless", "enchanted"),
}
"""What never holds, but is widely believed: of every verb and relation one."""

NOUNS = ("boat", "bicycle", "guitar", "lamp", "mirror", "carpet", "radio", "statue", "clock", "necklace", "drum",
         "sofa", "kite", "vase", "ladder")  # fmt: skip
VERBS = tuple(FACTS)
HELD_OUT = {0: "val", 1: "test"}


def event(verb: str, noun: str) -> str:
    """An event as text."""
    return f"PersonX {verb} the {noun}"


def split_of(verb: str, noun: str) -> str:
    """Every verb and every noun occurs in each split; one event in five is for `val`, one for `test`."""
    return HELD_OUT.get((VERBS.index(verb) + NOUNS.index(noun)) % 5, "train")


def valid(head: str, relation: str, tail: str) -> bool:
    """The truth of the toy world."""
    return tail in FACTS[head.split()[1]][relation]


def guess(rng: random.Random, verb: str, relation: str, mistakes: float) -> tuple[str, float]:
    """A tail, and its probability: valid with probability `1 - mistakes`, or else the myth about this verb, or in one
    mistake of ten what holds of another verb."""
    own, myth = FACTS[verb][relation], MYTHS[relation][VERBS.index(verb) % 3]
    others = [tail for other in VERBS if other != verb for tail in FACTS[other][relation]]
    if rng.random() >= mistakes:
        return rng.choice(own), (1 - mistakes) / len(own)
    if rng.random() < 0.9:
        return myth, 0.9 * mistakes
    return rng.choice(others), 0.1 * mistakes / len(others)


class ScriptedWorld(TextTeacher):
    """Goes on with a prompt by a script: after `Event:` an event, after a word that tells a relation a tail for the
    event in the last paragraph. It knows only events of the training split."""

    name = "scripted-world"

    def __init__(self, options: ScriptedWorldOptions, task: Task) -> None:
        self.options = options

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[list[Answer]]:
        """Raises `RecipeError` on a prompt that the script does not know."""
        return [[self._answer(str(prompt), sampling, random.Random(f"{seed}-{i}")) for i in range(sampling.n)]
                for prompt, seed in zip(prompts, seeds, strict=True)]  # fmt: skip

    def _answer(self, prompt: str, sampling: Sampling, rng: random.Random) -> Answer:
        last = prompt.split("\n\n")[-1]
        if last.rstrip().endswith("Event:"):
            text, probability = self._event(rng)
        else:
            text, probability = self._tail(last, rng)
        words = text.split(" ")
        text, finish = (
            " ".join(words[: sampling.max_tokens + 1]),
            "length" if len(words) > sampling.max_tokens else "stop",
        )
        for stop in sampling.stop:
            text, found, _ = text.partition(stop)
            finish = "stop" if found else finish
        return Answer(text, finish, math.log(probability) - 0.1 * len(words), len(text.split()))

    def _event(self, rng: random.Random) -> tuple[str, float]:
        known = [event(verb, noun) for verb in VERBS for noun in NOUNS if split_of(verb, noun) == "train"]
        if rng.random() < 0.05:  # some do not begin as events do, and some go on and on
            return rng.choice([" Someone sleeps.", " PersonX " + "and so on " * 10]), 0.01
        return f" {rng.choice(known)}\n\n\n", 0.95 / len(known)

    def _tail(self, asked: str, rng: random.Random) -> tuple[str, float]:
        words = asked.replace(".", " ").replace(",", " ").split()
        verb = next((word for word in words if word in FACTS), None)
        relation = next((name for name, cue in RELATIONS.items() if cue in words), None)
        if verb is None or relation is None:
            raise RecipeError(f"the scripted world does not know how to go on after {asked[-60:]!r}; it knows the "
                              f"relations {', '.join(RELATIONS)}")  # fmt: skip
        tail, probability = guess(rng, verb, relation, self.options.mistakes)
        return f" {tail.replace('PersonY', 'Chris')}.\n", probability


def world(options: WorldOptions) -> TripleData:
    """The facts of all events, split by event, and labelled guesses of the same kind as the teacher's for a critic."""
    facts = [{"head": event(verb, noun), "relation": relation, "tail": tail, "split": split_of(verb, noun)}
             for verb in VERBS for noun in NOUNS for relation, tails in FACTS[verb].items()
             for tail in tails]  # fmt: skip
    words = {row[key] for row in facts for key in ("head", "relation", "tail")}
    words |= {relation.connector for relation in WORDS.values()} | {myth for myths in MYTHS.values() for myth in myths}
    tokenizer = word_tokenizer(word for text in sorted(words | {*NAMES}) for word in text.replace(",", " ,").split())
    return TripleData(facts, list(_labelled(options)), tokenizer, TextFormatOptions())


def _labelled(options: WorldOptions) -> Iterator[dict[str, Any]]:
    rng = random.Random(options.seed)
    for _ in range(options.labelled):
        verb, noun, relation = rng.choice(VERBS), rng.choice(NOUNS), rng.choice([*RELATIONS])
        tail = guess(rng, verb, relation, options.mistakes)[0]
        yield {"head": event(verb, noun), "relation": relation, "tail": tail,
               "valid": int(valid(event(verb, noun), relation, tail)),
               "split": split_of(verb, noun)}  # fmt: skip


def word_tokenizer(words: Iterator[str]) -> Any:
    """A tokenizer of transformers for whole words; a pair of texts is `[CLS] a [SEP] b [SEP]`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>")
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((*special, *words)))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]", eos_token="</s>")  # fmt: skip
