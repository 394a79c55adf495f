"""Options of the method and of triples as data."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from kd_transformers.options import TransformersOptions
from kdcore.errors import did_you_mean
from kdcore.options import Download, Options, Sampling

NAMES = ("Alex", "Chris", "Jamie", "Taylor", "Jordan", "Casey", "Riley", "Morgan", "Avery", "Quinn",
         "Rowan", "Skyler", "Dakota", "Reese", "Emerson", "Finley", "Harper", "Hayden", "Jessie", "Kendall",
         "Logan", "Parker", "Peyton", "Robin", "Sage", "Sawyer", "Sidney", "Tatum", "Terry", "Dana")  # fmt: skip
"""First names that do not tell a gender."""

Fractions = tuple[float, float, float]


class Relation(Options):
    """How a relation is put into words. PersonX and PersonY become names in item and connector."""

    intro: str = Field("", description="question that opens a prompt")
    item: str = Field(description="Jinja2 template of an example, with the fields number, head and tail; the prompt's "
                      "last one ends before the tail")  # fmt: skip
    connector: str = Field(description="words between event and tail, for the critic")


RELATIONS: dict[str, Relation] = {
    name: Relation(**texts)
    for name, texts in yaml.safe_load((files("kd_symbolic_kd") / "relations.yaml").read_text(encoding="utf-8")).items()
}
"""The relations of ATOMIC, from `relations.yaml`."""


class EventSampling(Sampling):
    """How events are drawn."""

    max_tokens: int = Field(12, gt=0, description="tokens of an event, at most")
    top_p: float = Field(0.9, gt=0, le=1, description="nucleus: the likeliest tokens with this probability together")
    n: int = Field(100, gt=0, description="events asked for with each prompt")
    stop: tuple[str, ...] = Field(("\n\n",), description="texts at which an event ends; one that does not is dropped")
    presence_penalty: float = Field(0.5, description="taken from the logit of a token that is there already")
    frequency_penalty: float = Field(0.5, description="the same for each time that it is there")
    logprobs: bool = Field(True, description="ask for the log-probability of each event")


class InferenceSampling(Sampling):
    """How tails are drawn."""

    max_tokens: int = Field(12, gt=0, description="tokens of a tail, at most")
    top_p: float = Field(0.5, gt=0, le=1, description="nucleus: the likeliest tokens with this probability together")
    n: int = Field(10, gt=0, description="tails asked for with each event and relation")
    stop: tuple[str, ...] = Field(("\n",), description="texts at which a tail ends")
    logprobs: bool = Field(True, description="ask for the log-probability of each tail")


class CriticOptions(TransformersOptions):
    """The critic: an encoder of transformers, and what stands on it."""

    model: str | None = Field(
        "FacebookAI/roberta-large-mnli", description="Hub id or local folder; null with a `model_type` in `config`"
    )
    head: Literal["encoder"] = Field("encoder", description="the critic brings its own head")
    pooling: Literal["mean", "cls"] = Field("cls", description="what its pooler reads: the first token, or the mean")
    hidden: int = Field(512, gt=0, description="width of the hidden layer of its head")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout before both layers of its head")
    prior: float | None = Field(
        0.77, gt=0, lt=1, description="share of valid triples that its last bias starts from; null: the labels' own"
    )
    recall: float = Field(0.8, gt=0, lt=1, description="recall at which its precision is measured while it is trained")
    patience: int = Field(10, gt=0, description="evaluations without a better precision after which it stops")
    plateau: int = Field(5, gt=0, description="evaluations without a better precision after which its rate falls")
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="what its rate is multiplied by then")
    passes: int = Field(5, gt=0, description="scorings of a triple, each with other names, that are averaged")
    max_length: int = Field(64, gt=4, description="tokens of an event and a tail that it reads, at most")


class SymbolicKDOptions(Options):
    """Events and tails written by a teacher, filtered by a critic."""

    relations: tuple[str, ...] = Field(
        ("xAttr", "xReact", "xEffect", "xIntent", "xWant", "xNeed", "HinderedBy"),
        min_length=1,
        description="relations that tails are asked for",
    )
    templates: dict[str, Relation] = Field(
        {}, description="how relations are put into words, where they are not ATOMIC's or not as shipped"
    )
    event_template: str = Field(
        "{{ number }}. Event: {{ event }}",
        description="Jinja2 template of a numbered event; the prompt's last one ends before the event",
    )
    event_prefix: str = Field("PersonX", description="what an event has to begin with")
    event_characters: str = Field(
        r"[A-Za-z0-9'\",.\-’$ ]*", description="regular expression that all of an event has to match"
    )
    seed_events: int = Field(100, gt=0, description="events of the training data that prompts draw from")
    event_prompts: int = Field(1000, gt=0, description="prompts for events")
    event_shots: int = Field(10, gt=0, description="events shown in a prompt for another")
    event_sampling: EventSampling = Field(EventSampling(), description="how events are drawn")
    keep_fraction: float = Field(0.8, gt=0, le=1, description="share of the events kept, the likeliest first")
    inference_shots: int = Field(5, gt=0, description="examples shown in a prompt for tails, at most")
    inference_sampling: InferenceSampling = Field(InferenceSampling(), description="how tails are drawn")
    names: tuple[str, ...] = Field(
        NAMES, min_length=2, description="names for PersonX and PersonY in examples, and for the critic"
    )
    query_names: tuple[str, str] = Field(("Alex", "Chris"), description="names for them in the event asked about")
    shortest_tail: int = Field(3, gt=0, description="characters of the shortest tail that is kept")
    fractions: Fractions = Field((0.8, 0.1, 0.1), description="shares of train, val and test in the corpus, by event")
    critic: CriticOptions = Field(CriticOptions(), description="the model that tells valid triples from others")
    filter: Literal["critic", "random", "none"] = Field(
        "critic", description="critic: keep what it accepts; random: as many triples, at random; none: all, no critic"
    )
    target_recall: float = Field(
        0.8, gt=0, lt=1, description="share of the valid triples that the cut-off keeps; lower is stricter"
    )
    cutoff_splits: Literal["val+test", "val"] = Field(
        "val+test", description="labelled splits the cut-off comes from; val alone leaves test untouched"
    )
    max_new_tokens: int = Field(12, gt=0, description="tokens of the student's answers, at most")
    shard_size: int = Field(64, gt=0, description="prompts after which the teacher's answers are written to disk")

    @field_validator("fractions")
    @classmethod
    def _sums_to_one(cls, value: Fractions) -> Fractions:
        return checked_fractions(value)

    @model_validator(mode="after")
    def _every_relation_has_words(self) -> SymbolicKDOptions:
        for name in self.relations:
            if name not in self.templates and name not in RELATIONS:
                raise ValueError(f"relations: there is no template for {name!r}; give `templates: {{{name}: "
                                 f"{{item: ..., connector: ...}}}}`, or {did_you_mean(name, self.words)}")  # fmt: skip
        return self

    @property
    def words(self) -> dict[str, Relation]:
        """Every relation that has templates: those shipped, changed and joined by the recipe's."""
        return {**RELATIONS, **self.templates}

    def downloads(self) -> list[Download]:
        """The critic's encoder."""
        return [] if self.filter == "none" else self.critic.downloads()


class TextFormatOptions(Options):
    """How triples become texts for a language model."""

    special_tokens: tuple[str, str, str, str, str] = Field(
        ("<head>", "</head>", "<relation>", "</relation>", "[GEN]"),
        description="tokens around the head, around the relation, and before the tail",
    )
    max_length: int = Field(64, gt=8, description="tokens of a triple, at most; longer heads are cut")


class TriplesOptions(TextFormatOptions):
    """Triples of head, relation and tail in files."""

    path: str = Field(
        description="file of triples: JSON lines with head, relation and tail; a table of these columns (.tsv); or "
        "ATOMIC's evaluation format, `head @@ relation`, tab, `tail| tail` (.tsv)"
    )
    labelled: str | None = Field(
        None, description="file of triples with `valid`, for the critic; default: those of `path` that have it"
    )
    tokenizer: str = Field(description="tokenizer of the student: Hub id or local folder of transformers")
    relations: tuple[str, ...] = Field((), description="relations that are read; default: all")
    drop_tails: tuple[str, ...] = Field(("none",), description="tails that mean that there is none")
    drop_unjudged: bool = Field(False, description="leave out labels of -9, no judgement, instead of taking them as "
                                "not valid")  # fmt: skip
    fractions: Fractions = Field((0.8, 0.1, 0.1), description="shares of train, val and test, by head, where a file "
                                 "has no column `split`")  # fmt: skip
    seed: int = Field(0, ge=0, description="of the split")

    @field_validator("fractions")
    @classmethod
    def _sums_to_one(cls, value: Fractions) -> Fractions:
        return checked_fractions(value)

    def downloads(self) -> list[Download]:
        """The tokenizer, unless it lies in a folder or in the Hub's cache."""
        settings: Any = {"model": self.tokenizer, "pretrained": False}
        return [] if Path(self.tokenizer).is_dir() else TransformersOptions(**settings).downloads()


def checked_fractions(value: Fractions) -> Fractions:
    """Shares of three splits. Raises `ValueError` if they are not positive or do not make one."""
    if min(value) <= 0 or abs(sum(value) - 1) > 1e-6:
        raise ValueError("give three positive shares that sum to one, such as [0.8, 0.1, 0.1]")
    return value


class WorldOptions(Options):
    """A toy world of events and what follows from them."""

    labelled: int = Field(600, gt=0, description="labelled triples for a critic")
    mistakes: float = Field(0.3, ge=0, le=1, description="share of labelled triples that do not hold")
    seed: int = Field(0, ge=0, description="of the labelled triples")


class ScriptedWorldOptions(Options):
    """A scripted teacher that knows most of the toy world."""

    mistakes: float = Field(0.3, ge=0, le=1, description="share of its tails that do not hold")
