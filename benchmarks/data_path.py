"""Samples per second from disk to batch, and how long a run waits for data.

    python benchmarks/data_path.py [--rounds 5] [--samples 1024] [--only parquet]

kd's own loader (`DataModule.train_loader` over kd-datasets) beside a plain torch `DataLoader` over the same
`datasets.Dataset` with the same preparation written by hand: pictures of a folder, pictures in a parquet file, and
texts that become tokens, in this process and with two worker processes; in turn, on files in the cache of the system.
Starting the workers counts, on both sides. The first batches of kd and of the plain loader are equal bit for bit, or
there is no result; a second plain loader resizes pictures as bytes before they become floats, as many programs do.
Higher is better in these rows.
Last, a run on the folder: the share of its steps that is spent waiting for the loader.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import loops
import measure
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import kdcore
from kdcore import DataModule
from kdcore.data import derive_seed

BATCH, SIDE, CLASSES = 64, 64, 8


def pictures(where: Path, count: int) -> None:
    """JPEG pictures in a folder per class, and the same in a parquet file."""
    rng = np.random.default_rng(0)
    for i in range(count):
        folder = where / "pictures" / "train" / f"class{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8))
        coarse.resize((96, 96)).save(folder / f"{i:05}.jpg", quality=90)
    made = datasets.load_dataset("imagefolder", data_dir=str(where / "pictures"), split="train")
    made.to_parquet(str(where / "pictures.parquet"))


def texts(where: Path, count: int) -> None:
    """Texts of 32 to 96 words with labels, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(8000))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = ["input_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]",
                                        model_input_names=names)  # fmt: skip
    tokenizer.save_pretrained(where / "words")
    rows = [{"text": " ".join(rng.choices(words[2:], k=rng.randrange(32, 97))), "label": i % CLASSES}
            for i in range(count)]  # fmt: skip
    (where / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def module(**options: Any) -> DataModule:
    """The data of kd-datasets."""
    component = kdcore.PluginManager().get("data", "datasets")
    made: DataModule = component.load_target()(component.load_options()(**options))
    return made


class PictureBatch:
    """Decoded, brought to [0, 1] and resized as kd-datasets does it; or, `early`, resized as bytes before."""

    def __init__(self, early: bool) -> None:
        from torchvision.transforms import v2

        steps = [v2.ToDtype(torch.float32, scale=True), v2.Resize((SIDE, SIDE), antialias=True)]
        self.ready = v2.Compose([v2.PILToTensor(), *(steps[::-1] if early else steps)])

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Images and labels."""
        return {"image": torch.stack([self.ready(row["image"].convert("RGB")) for row in samples]),
                "label": torch.tensor([row["label"] for row in samples])}  # fmt: skip


class TextBatch:
    """Tokens, padded to the longest of a batch."""

    def __init__(self, tokenizer: str) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Tokens, mask and labels."""
        found = self.tokenizer([row["text"] for row in samples], padding=True, truncation=True, max_length=128,
                               return_tensors="pt")  # fmt: skip
        return {**found, "label": torch.tensor([row["label"] for row in samples])}


class Plain(torch.utils.data.Sampler[int]):
    """The order of kd's first epoch."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(derive_seed(0, "train", 0))
        return iter(torch.randperm(self.size, generator=generator).tolist())


def kd_loader(data: DataModule, workers: int) -> DataLoader[Any]:
    steps = data.steps_per_epoch("train", BATCH)
    return data.train_loader("train", BATCH, seed=0, start=0, stop=steps or 0, workers=workers)


def plain_loader(rows: datasets.Dataset, collate: Callable[..., Any], workers: int) -> DataLoader[Any]:
    return DataLoader(rows, BATCH, sampler=Plain(len(rows)), drop_last=True, collate_fn=collate, num_workers=workers)


def speed(make: Callable[[], DataLoader[Any]]) -> float:
    """Samples per second of an epoch, the making of the loader's workers included."""
    loader, start, seen = make(), time.perf_counter(), 0
    for batch in loader:
        seen += len(batch["label"])
    return seen / (time.perf_counter() - start)


def agree(ours: dict[str, Any], theirs: dict[str, Any], case: str) -> None:
    for key, value in theirs.items():
        if key in ours and not torch.equal(ours[key], value):
            raise SystemExit(f"{case}: the first batches differ in {key!r}: {ours[key].shape}, {value.shape}")


def compare(case: str, data: DataModule, rows: datasets.Dataset, collates: dict[str, Any], rounds: int) -> Any:
    """All loaders, without and with workers; the first of the plain ones gives what kd's gives."""
    made = []
    for workers in (0, 2):
        loaders = {"kd": functools.partial(kd_loader, data, workers)}
        loaders |= {name: functools.partial(plain_loader, rows, c, workers) for name, c in collates.items()}
        first = next(iter(collates))
        agree(next(iter(loaders["kd"]())), next(iter(loaders[first]())), case)
        sides = {name: functools.partial(speed, loader) for name, loader in loaders.items()}
        found = measure.in_turn(sides, rounds)
        made.append(measure.row(f"{case}, {workers} workers", "samples per second", found))
        measure.show(made[-1])
    return made


def waiting(where: Path, rounds: int) -> list[measure.Row]:
    """A run with a tapped loader: the share of the loop's seconds in which it waited for a batch."""
    from kd_demo.models import cnn
    from kd_demo.options import CNNOptions

    original, found = DataModule.train_loader, {0: [], 2: []}

    def once(workers: int) -> float:
        seconds: list[float] = []

        def timed(self: DataModule, *args: Any, **kwargs: Any) -> Any:
            batches = iter(original(self, *args, **kwargs))
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                seconds.append(time.perf_counter() - start)
                if batch is None:
                    return
                yield batch

        data = module(path=str(where / "pictures"), size=SIDE)
        data = DataModule({"train": data["train"]}, data.task, collate=data.collate)
        big, small = (cnn(CNNOptions(width=w, depth=1), data.task) for w in (16, 8))
        train = {"epochs": 1, "batch_size": BATCH, "workers": workers, "optimizer": {"name": "adamw", "lr": loops.LR}}
        DataModule.train_loader = timed  # type: ignore[assignment, method-assign]
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = kdcore.distill(big, small, data, "kd", train=train, run_dir=Path(folder) / "run").path
                timing = json.loads((path / "run.json").read_text())["timings"]["distill"]
        finally:
            DataModule.train_loader = original  # type: ignore[method-assign]
        return 100 * sum(seconds) / timing["seconds"]

    for _ in range(rounds):
        for workers, shares in found.items():
            shares.append(once(workers))
    named = {f"{workers} workers": shares for workers, shares in found.items()}
    made = measure.row("a run on the folder: waiting for data", "% of the loop", named)
    measure.show(made)
    return [made]


def cases(where: Path) -> dict[str, tuple[DataModule, datasets.Dataset, Any]]:
    """Data on both sides, by name."""
    folder, parquet, lines = where / "pictures", where / "pictures.parquet", where / "texts.jsonl"
    words = str(where / "words")
    images = {"plain": PictureBatch(early=False), "plain, resized as bytes": PictureBatch(early=True)}
    return {
        "image folder": (module(path=str(folder), size=SIDE),
                         datasets.load_dataset("imagefolder", data_dir=str(folder), split="train"), images),
        "parquet of images": (module(path=str(parquet), size=SIDE),
                              datasets.load_dataset("parquet", data_files=str(parquet), split="train"), images),
        "texts": (module(path=str(lines), tokenizer=words, max_length=128),
                  datasets.load_dataset("json", data_files=str(lines), split="train"), {"plain": TextBatch(words)}),
    }  # fmt: skip


def run(given: argparse.Namespace, where: Path) -> list[measure.Row]:
    pictures(where, given.samples)
    texts(where, 4 * given.samples)
    made = []
    for case, (data, rows, collate) in cases(where).items():
        if given.only in case:
            made += compare(case, data, rows, collate, given.rounds)
    return made if given.only else made + waiting(where, min(given.rounds, 3))


def main() -> None:
    parser = measure.parser(__doc__, rounds=5)
    parser.add_argument("--samples", type=int, default=1024, help="pictures; texts are four times as many")
    given = measure.begin(parser)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        made = run(given, Path(folder))
    measure.write("data_path", made, given)


if __name__ == "__main__":
    main()
