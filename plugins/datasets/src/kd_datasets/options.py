"""Options of the data sets and of the teacher in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from kdcore.errors import did_you_mean
from kdcore.options import Download, Options

ROLES = ("image", "label", "mask", "text", "text_pair")
LANGUAGE_ROLES = ("prompt", "completion", "messages", "chosen", "rejected")
SUFFIXES = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}
AUGMENTATIONS = ("random-resized-crop", "random-scale-crop", "random-crop", "flip", "vertical-flip", "rotation",
                 "color-jitter", "randaugment", "trivial-augment", "random-erasing")  # fmt: skip
HUB_TIMEOUT = 3.0  # seconds to wait for the Hub to tell a size

Kind = Literal["classification", "multilabel", "regression", "segmentation", "causal-lm", "unlabelled"]


def is_local(path: str) -> bool:
    """Whether a path is meant as a file or folder, not as an id on the Hub."""
    where = Path(path).expanduser()
    looks_local = where.suffix in SUFFIXES or path.startswith((".", "~", "/")) or path.count("/") > 1
    return looks_local or where.exists()


class DatasetsOptions(Options):
    """A data set of the Hub or of this machine: which splits and columns, what they mean, how they are prepared."""

    path: str = Field(
        description="Hub id, a csv, tsv, json, jsonl, parquet or arrow file, a saved data set, or an image folder"
    )
    name: str | None = Field(None, description="configuration of a Hub data set that has several")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub data set")
    splits: dict[str, str] | None = Field(
        None,
        description="our split: theirs, such as `val: train[80%:]`; default: train, val and test if there",
    )
    val_fraction: float | None = Field(None, gt=0, lt=1, description="part of train to be cut off as val")
    seed: int = Field(0, ge=0, description="of the cut, and of the order of a stream")
    image: str | None = Field(None, description="column of images: pictures, or paths of picture files")
    label: str | None = Field(None, description="column of labels: numbers or strings, lists of them for multilabel")
    mask: str | None = Field(None, description="column of masks: pictures whose values are classes")
    text: str | None = Field(None, description="column of texts")
    text_pair: str | None = Field(None, description="column of second texts")
    prompt: str | None = Field(None, description="column of prompts of a language model: texts or lists of messages")
    completion: str | None = Field(None, description="column of their completions: texts or lists of messages")
    messages: str | None = Field(None, description="column of chats: lists of messages, each with `role` and `content`")
    chosen: str | None = Field(None, description="column of the preferred answers to the prompts")
    rejected: str | None = Field(None, description="column of the answers that were not preferred")
    template: str | None = Field(
        None, description="Jinja2 template over the fields of a row that makes the prompt, in place of `prompt`"
    )
    columns: dict[str, str] = Field(
        {}, description="further batch keys: columns of numbers, such as `teacher_logits: logits`"
    )
    task: Kind | None = Field(None, description="what is asked of a model; default: what the columns suggest")
    classes: list[str] | int | None = Field(None, description="class names in label order, or only their number")
    ignore_label: int | None = Field(None, description="value of labels or masks that does not count, such as 255")
    reduce_labels: bool = Field(False, description="masks count from 1, and 0 does not count (ADE20K)")
    size: int | tuple[int, int] | None = Field(
        None, description="side, or height and width, of images; default: as they are"
    )
    eval_resize: bool = Field(
        True,
        description="segmentation: false leaves images and masks of all splits but train as large as they are; where "
        "their sizes differ, with `train.eval_batch_size: 1`",
    )
    crop_fraction: float = Field(
        1.0, gt=0, le=1, description="side of the centre crop, of the resized image (classification)"
    )
    channels: Literal[1, 3] = Field(3, description="1: images are made grey, 3: they are made RGB")
    augment: list[str | dict[str, dict[str, Any]]] = Field(
        [], description=f"steps for train, by name or `name: {{argument: value}}`: {', '.join(AUGMENTATIONS)}"
    )
    tokenizer: str | None = Field(None, description="tokenizer of transformers: folder or Hub id")
    max_length: int | None = Field(None, gt=1, description="tokens of a text that are kept; default: all")
    truncation: Literal["error", "drop", "keep_start", "keep_end"] = Field(
        "keep_start",
        description="of a language model's rows longer than `max_length`: cut their end (keep_start), cut the "
        "beginning of the prompt (keep_end), leave them out (drop), or refuse them (error)",
    )
    train_on: Literal["completion", "all"] = Field(
        "completion", description="what a language model is to predict: completions and assistant turns, or all tokens"
    )
    packing: bool = Field(False, description="fill each row of train with several texts, up to `max_length` tokens")
    padding_free: bool = Field(False, description="lay the texts of a batch of train end to end in one row")
    in_memory: bool = Field(False, description="keep samples once they are decoded: for data that fits into memory")
    streaming: bool = Field(False, description="read while training, without a local copy; needs train.steps")
    shuffle_buffer: int = Field(1000, gt=0, description="samples of a stream among which the next is drawn")

    @field_validator("augment")
    @classmethod
    def _known(cls, steps: list[str | dict[str, dict[str, Any]]]) -> list[str | dict[str, dict[str, Any]]]:
        for name in (name for step in steps for name in ([step] if isinstance(step, str) else step)):
            if name not in AUGMENTATIONS:
                raise ValueError(f"unknown step {name!r}; {did_you_mean(name, AUGMENTATIONS, 'steps')}")
        return steps

    @model_validator(mode="after")
    def _fit_each_other(self) -> DatasetsOptions:
        if self.template is not None and (other := self.prompt or self.messages or self.text):
            raise ValueError(f"`template` makes the prompt, and so does the column {other!r}: leave one of them out")
        if self.packing and self.max_length is None:
            raise ValueError("`packing` fills rows up to `max_length` tokens: set `max_length`")
        if self.packing and self.streaming:
            raise ValueError("`packing` needs the lengths of all texts, which a stream does not tell: leave one of "
                             "`packing` and `streaming` out")  # fmt: skip
        if self.packing and self.padding_free:
            raise ValueError("rows that are packed need no `padding_free`: leave one of them out")
        return self

    def downloads(self) -> list[Download]:
        """The data set and the tokenizer, as far as they are on the Hub; sizes are told where it answers quickly."""
        found = (
            []
            if is_local(self.path)
            else [Download(self.path, "Hugging Face Hub", _hub_size(self.path, self.revision))]
        )
        if self.tokenizer and not Path(self.tokenizer).expanduser().exists():
            found.append(Download(self.tokenizer, "Hugging Face Hub"))
        return found


class ColumnsOptions(Options):
    """A teacher that was run before: its signals stand in the data, see the option `columns` of the data."""

    logits: str | None = Field(None, description="batch key of the logits")
    embedding: str | None = Field(None, description="batch key of the embeddings")

    @model_validator(mode="after")
    def _some(self) -> ColumnsOptions:
        if self.logits is None and self.embedding is None:
            raise ValueError("name the batch key of `logits`, of `embedding`, or of both")
        return self


def _hub_size(path: str, revision: str | None) -> int | None:
    """Bytes of a Hub data set, or `None` where the Hub does not tell."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(path, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT)
    except Exception:  # whatever keeps the Hub from answering, the size is simply not known
        return None
    return sum(file.size or 0 for file in info.siblings or ()) or None
