"""The data module: rows become samples, samples batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset, IterableDataset, default_collate
from torchvision import tv_tensors

from kd_datasets import corpus, language, pictures, texts
from kd_datasets.language import Encoder
from kd_datasets.load import base_folder, load_splits
from kd_datasets.options import LANGUAGE_ROLES, ColumnsOptions, DatasetsOptions, Kind
from kd_datasets.packing import Packed, alone, best_fit_decreasing, laid_out
from kd_datasets.pictures import Augment, Fit, Sample
from kd_datasets.targets import Classes, column_names, find_classes, find_form, find_kind, find_roles
from kdcore.data import DataModule, Task, vocabulary_fingerprint
from kdcore.errors import DataError
from kdcore.loading import read_many
from kdcore.models import Batch, FromColumns

logger = logging.getLogger(__name__)

Finish = Callable[[Sample], Sample]


def hub_or_local(options: DatasetsOptions) -> DataModule:
    """A data module over a data set of the Hub, a file or a folder.

    Samples are dicts of tensors (and `text`, where there is no tokenizer); see `kdcore.data.BATCH_KEYS`.

    Raises:
        DataError: if the data, a split, a column or a class is not there, or the options do not fit each other.
    """
    splits = load_splits(options)
    first = next(iter(splits.values()))
    roles = find_roles(options, column_names(first))
    kind = find_kind(options, roles, (first.features or {}).get(roles.get("label")))
    classes = find_classes(options, kind, splits, roles.get("label"))
    tokenizer = texts.load_tokenizer(options.tokenizer) if options.tokenizer else None
    if kind == "causal-lm" and tokenizer is None:
        raise DataError("tokenizer: a language model's texts need one; name its folder or Hub id")
    used = column_names(first) if options.template is not None else [*roles.values(), *options.columns.values()]
    splits = {name: _undecoded(rows, used) for name, rows in splits.items()}
    encoder = _encoder(options, roles, tokenizer) if kind == "causal-lm" else None
    _check_language(options, kind, roles, encoder)
    if encoder:
        roles = {role: column for role, column in roles.items() if role not in encoder.roles}
        splits = _tokenised(options, splits, encoder, [*roles.values(), *options.columns.values()])
    samples = Samples(options, roles, kind, classes, tokenizer, encoder, base_folder(options))
    size = _image_size(samples, first=next(iter(splits.values()))) if "image" in roles else None
    return _module(options, splits, samples, size)


def columns_teacher(options: ColumnsOptions, task: Task) -> FromColumns:
    """A teacher whose signals are read from the batch."""
    named = {"logits": options.logits, "embedding": options.embedding}
    return FromColumns({signal: key for signal, key in named.items() if key is not None}, task.labels)


def _module(
    options: DatasetsOptions, splits: Mapping[str, Any], samples: Samples, size: tuple[int, int] | None
) -> DataModule:
    fit = Fit(size, options.crop_fraction) if size else None
    augment = Augment(options.augment, size, samples.kind == "segmentation") if size and options.augment else None
    if options.augment and not size:
        raise DataError("augment: the steps change images, and the data has no column of them: set `image:`")
    crops = any(name in step for step in options.augment for name in ("random-resized-crop", "random-scale-crop"))
    if not options.eval_resize and samples.kind != "segmentation":
        raise DataError(f"eval_resize: only a segmentation can keep the sizes of its images; this is {samples.kind!r}")
    made: dict[str, Any] = {}
    for name, rows in splits.items():
        finish: Finish | None = None if name == "train" and crops else fit
        if name == "train" and (options.packing or options.padding_free):
            finish = alone
        if name != "train" and not options.eval_resize:
            finish = as_it_is
        made[name] = _Stream(rows, samples, finish, name) if options.streaming else _Rows(rows, samples, finish)
    if options.packing and "train" in made:
        groups = best_fit_decreasing(corpus.lengths(splits["train"]), options.max_length or 0)
        made["train"] = Packed(made["train"], groups)
    image = (options.channels, *size) if size else None
    tokenizer = samples.tokenizer
    task = Task(samples.kind, samples.classes.names, _count(samples), image, tokenizer,
                vocabulary_fingerprint(tokenizer) if tokenizer else None)  # fmt: skip
    paddings = texts.paddings(tokenizer) if tokenizer else {}
    return DataModule(made, task, collate=_Collate(fit, paddings, options.padding_free), augment=augment)


def as_it_is(sample: Sample) -> Sample:
    """The sample with plain tensors for image and mask, as large as they are."""
    return {**sample, **{key: sample[key].as_subclass(torch.Tensor) for key in ("image", "mask") if key in sample}}


def _size(image: torch.Tensor) -> str:
    return " x ".join(map(str, image.shape[-2:]))


def _count(samples: Samples) -> int | None:
    if samples.kind == "causal-lm":
        return len(samples.tokenizer)
    return 1 if samples.kind == "regression" else samples.classes.count


def _encoder(options: DatasetsOptions, roles: Mapping[str, str], tokenizer: Any) -> Encoder:
    form = find_form(options, roles)
    own = {role: roles[role] for role in ("text", "text_pair", *LANGUAGE_ROLES) if role in roles}
    return Encoder(options, form, own, tokenizer)


def _check_language(options: DatasetsOptions, kind: Kind, roles: Mapping[str, str], encoder: Encoder | None) -> None:
    """Refuse options that only a language model's texts can follow, where the data is something else."""
    defaults = DatasetsOptions(path=options.path)
    for name in ("template", "train_on", "truncation", "packing", "padding_free"):
        if not encoder and getattr(options, name) != getattr(defaults, name):
            raise DataError(f"{name}: this is for a language model (`task: causal-lm`); the task is {kind!r}")
    joining = "packing" if options.packing else "padding_free" if options.padding_free else None
    if encoder and joining and (encoder.form == "preference" or "image" in roles or options.columns):
        raise DataError(f"{joining}: only texts can be laid end to end, and not preferences, images or further columns")


def _tokenised(
    options: DatasetsOptions, splits: Mapping[str, Any], encoder: Encoder, kept: list[str]
) -> dict[str, Any]:
    """The splits with tokens in place of texts; those of a stream stay as they are until they are read."""
    first: Mapping[str, Any] = next(iter(next(iter(splits.values()))), {})
    answer = first.get(encoder.roles.get("completion") or encoder.roles.get("chosen") or "")
    if isinstance(answer, str) and encoder.tokenizer.eos_token_id is None:
        logger.warning("the tokenizer %r has no token for the end of a text: nothing is appended to completions, and a "
                       "model does not learn where they end", options.tokenizer)  # fmt: skip
    if options.streaming:
        return dict(splits)
    digest = corpus.digest(encoder)
    return {name: corpus.tokenised(rows, encoder, name, kept, digest) for name, rows in splits.items()}


def _undecoded(rows: Any, columns: list[str]) -> Any:
    """Only the columns in use, and pictures as files: they are decoded here, where an error can name the file."""
    rows = rows.select_columns(list(dict.fromkeys(columns)))
    for column, feature in (rows.features or {}).items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(column, datasets.Image(decode=False))
    return rows


def _image_size(samples: Samples, first: Any) -> tuple[int, int]:
    """Height and width in pixels: the option, or those of the first image."""
    size = samples.options.size
    if isinstance(size, int):
        return size, size
    if size is not None:
        return size
    height, width = samples.image(next(iter(first))[samples.roles["image"]]).shape[-2:]
    return height, width


@dataclass(frozen=True)
class Samples:
    """Makes a sample of a row.

    Args:
        options: of the data.
        roles: `role -> column`.
        kind: of the task.
        classes: of the task.
        tokenizer: if texts become tokens.
        encoder: if the texts are a language model's; rows have its fields then, in place of their columns.
        folder: to which paths of picture files are relative.
    """

    options: DatasetsOptions
    roles: Mapping[str, str]
    kind: Kind
    classes: Classes
    tokenizer: Any
    encoder: Encoder | None
    folder: Path

    def __call__(self, row: Mapping[str, Any]) -> Sample:
        """The sample of a row; its image is not yet brought to size."""
        values = {role: row[column] for role, column in self.roles.items()}
        sample: Sample = {}
        if "image" in values:
            sample["image"] = tv_tensors.Image(self.image(values["image"]))
        if "mask" in values:
            picture = pictures.open_picture(values["mask"], self.folder)
            options = self.options
            sample["mask"] = pictures.to_mask(
                picture, self.classes.count or 0, options.ignore_label, options.reduce_labels
            )
            if "image" in sample and sample["image"].shape[-2:] != sample["mask"].shape:
                raise DataError(f"a mask has the size of its image; this one is {_size(sample['mask'])}, and the image "
                                f"{_size(sample['image'])}")  # fmt: skip
        if self.encoder:
            sample |= language.to_sample(row, texts.paddings(self.tokenizer)["input_ids"])
        if "text" in values:
            sample |= self.text(values["text"], values.get("text_pair"))
        if "label" in values and self.kind in ("classification", "multilabel", "regression"):
            sample["label"] = self.label(values["label"])
        return sample | {key: self.number(column, row[column]) for key, column in self.options.columns.items()}

    def image(self, value: Any) -> torch.Tensor:
        """Float `[C, H, W]` in [0, 1]."""
        return pictures.to_image(pictures.open_picture(value, self.folder), self.options.channels)

    def text(self, text: Any, pair: Any) -> Sample:
        """Tokens; without a tokenizer the text itself."""
        if not isinstance(text, str):
            raise DataError(f"text: column {self.roles['text']!r} holds {text!r} where a text is expected")
        if self.tokenizer is None:
            return {"text": text} if pair is None else {"text": text, "text_pair": pair}
        return dict(texts.tokens(self.tokenizer, text, pair, self.options.max_length))

    def label(self, value: Any) -> torch.Tensor:
        """Int `[]`, float `[]` (regression), or float `[C]` of zeros and ones (multilabel)."""
        if self.kind == "regression":
            return torch.tensor(float(value))
        if self.kind == "classification":
            return torch.tensor(self.classes.number(value))
        label = torch.zeros(self.classes.count or 0)
        label[[self.classes.number(entry) for entry in value]] = 1.0
        return label

    def number(self, column: str, value: Any) -> torch.Tensor:
        """A tensor of a further column. Raises `DataError` where it holds no numbers."""
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"columns: column {column!r} holds {value!r:.60}, which is no tensor of numbers") from error


class _Rows(Dataset[Sample]):
    """The samples of a split; `finish` brings images to size here, or it is left to the augmentation or the batch."""

    def __init__(self, rows: Any, samples: Samples, finish: Finish | None) -> None:
        self.rows, self.samples, self.finish = rows, samples, finish
        self.kept: dict[int, Sample] | None = {} if samples.options.in_memory else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        if self.kept is None:
            return self._make(self.rows[index])
        if index not in self.kept:
            self.kept[index] = self._make(self.rows[index])
        return dict(self.kept[index])

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        if self.kept is not None:
            return [self[index] for index in indices]
        return [self._make(row) for row in read_many(self.rows, indices)]

    def _make(self, row: Mapping[str, Any]) -> Sample:
        sample = self.samples(row)
        return self.finish(sample) if self.finish else sample

    def column(self, name: str) -> list[torch.Tensor]:
        """All values of one key, without opening images; only of labels. Raises `KeyError` if there are none."""
        if name != "label" or "label" not in self.samples.roles:
            raise KeyError(name)
        return [self.samples.label(value) for value in self.rows[self.samples.roles["label"]]]


class _Stream(IterableDataset[Sample]):
    """The samples of a stream; those of train in an order that depends on seed and epoch."""

    def __init__(self, rows: Any, samples: Samples, finish: Finish | None, name: str) -> None:
        if name == "train":
            rows = rows.shuffle(seed=samples.options.seed, buffer_size=samples.options.shuffle_buffer)
        self.rows = corpus.TokenisedStream(rows, samples.encoder, name) if samples.encoder else rows
        self.samples, self.finish = samples, finish

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Sample]:
        for row in self.rows:
            sample = self.samples(row)
            yield self.finish(sample) if self.finish else sample


@dataclass(frozen=True)
class _Collate:
    """Samples to a batch: images not yet at size are brought to it, tokens are padded to the longest text."""

    fit: Fit | None
    padding: Mapping[str, int]
    padding_free: bool

    def __call__(self, samples: list[Sample]) -> Batch:
        if self.fit and isinstance(samples[0].get("image"), tv_tensors.Image):
            samples = [self.fit(sample) for sample in samples]
        if "position_ids" in samples[0]:
            return laid_out(samples, self.padding["input_ids"], self.padding_free)
        padded = {
            key: language.padded([sample[key] for sample in samples], value)
            for key, value in self.padding.items()
            if key in samples[0]
        }
        rest = [{key: value for key, value in sample.items() if key not in padded} for sample in samples]
        if len(sizes := {_size(sample["image"]) for sample in samples if "image" in sample}) > 1:
            raise DataError(f"images of different sizes ({', '.join(sorted(sizes))}) do not make a batch: set "
                            "`train.eval_batch_size: 1`, or leave `eval_resize` at true")  # fmt: skip
        return {**padded, **default_collate(rest)}
