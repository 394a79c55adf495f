"""What a teacher cache saves and costs: time of an epoch, bytes, and the student it makes.

    python benchmarks/cache.py [--rounds 5]

The same student is trained alone, with its teacher, and with caches of it, in turn, each time in a process of its own
whose heap keeps what is freed; the ratio of a cached epoch to one alone should be at most 1.05. Then a small language
model is taught from every codec and from the k largest of 4 to 64 logits, three seeds each: bytes of a token,
perplexity, and the error that the cache itself states.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import Row, begin, forked, in_turn, keep_heap, last_terms, parser, row, show, write
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import kdcore
from kd_demo.digits import digits
from kd_demo.options import DigitsOptions
from kdcore import DataModule, Model, Task
from kdcore.cache import read_facts

SIDES: dict[str, Any] = {
    "cached": {},
    "cached, top-k": {"logits": "top-k", "k": 4},
    "with the teacher": False,
    "alone": None,
}
OF_TEXTS: dict[str, Any] = {
    "cached, hidden": {"logits": "hidden"},
    "cached, top-k": {"logits": "top-k", "k": 32},
    "cached, sampled": {"logits": "sampled"},
    "with the teacher": False,
    "alone": None,
}
CODECS: dict[str, dict[str, Any] | None] = {
    "with the teacher": None, "all, float32": {"dtype": "float32"}, "all, float16": {},
    "all, bfloat16": {"dtype": "bfloat16"}, "all, int8": {"dtype": "int8"}, "hidden, float16": {"logits": "hidden"},
    "sampled, 12": {"logits": "sampled"}, "sampled, 30": {"logits": "sampled", "k": 30},
    **{f"top-k, {k}": {"logits": "top-k", "k": k} for k in (4, 8, 16, 32, 64)},
}  # fmt: skip
LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "bos_token_id": 2,
         "eos_token_id": 3, "pad_token_id": 0}  # fmt: skip
LARGE, SMALL = (
    {"use": "transformers", "config": {**LLAMA, "hidden_size": width, "intermediate_size": 2 * width,
                                       "num_hidden_layers": layers}} for width, layers in ((96, 2), (32, 1))
)  # fmt: skip
TEXTS: dict[str, Any] = {
    "method": "distill", "data": {"use": "sentences", "prompt": 2, "train": 2000}, "trackers": [],
    "train": {"epochs": 2, "batch_size": 32, "optimizer": {"lr": 4e-3}, "save_every": 10_000, "eval_every": 10_000},
}  # fmt: skip


def images(size: int = 32) -> DataModule:
    """The digits, in three channels of `size` pixels."""
    found = digits(DigitsOptions())
    batch = next(iter(found.eval_loader("train", 10_000)))
    image = F.interpolate(batch["image"], (size, size)).expand(-1, 3, -1, -1).contiguous()
    return DataModule({"train": TensorDataset(image, batch["label"])}, Task("classification", num_classes=10))


def epoch(
    side: Any, teacher: Model, student: Model, data: DataModule, folder: str,
    losses: tuple[str, str] = ("cross-entropy", "kd"), batch_size: int = 64,
) -> float:  # fmt: skip
    """Seconds of an epoch: the mean of two. Alone, the student has the first loss; otherwise both."""
    terms = [{"use": loss} for loss in (losses[:1] if side is None else losses)]
    cache = False if side in (None, False) else {"folder": folder, **side}
    steps = 2 * (len(data["train"]) // batch_size)
    with tempfile.TemporaryDirectory() as where:
        result = kdcore.distill(
            None if side is None else copy.deepcopy(teacher), copy.deepcopy(student), data, "distill", losses=terms,
            run_dir=Path(where) / "run", cache=cache,
            train={"steps": steps, "batch_size": batch_size, "save_every": steps + 1, "eval_every": steps + 1},
        )  # fmt: skip
        seconds: float = json.loads((result.path / "run.json").read_text())["timings"]["distill"]["seconds"]
    return seconds / 2


def epochs(given: argparse.Namespace, folder: str) -> list[Row]:
    """Two pairs of networks on images."""
    import timm

    data, found = images(), []
    for big, small in (("resnet34", "resnet10t"), ("resnet50", "mobilenetv3_small_100")):
        case = f"an epoch: {big} teaches {small}, 32 x 32"
        if given.only not in case:
            continue
        models = [Model(timm.create_model(name, num_classes=10)) for name in (big, small)]
        sides = {name: functools.partial(forked, epoch, side, *models, data, folder) for name, side in SIDES.items()}
        found.append(row(case, "s", in_turn(sides, given.rounds), base="alone"))
        show(found[-1])
    return found


def epochs_of_texts(given: argparse.Namespace, folder: str) -> list[Row]:
    """Two language models."""
    case = "an epoch: a Llama of 256 teaches one of 128, 4 layers each"
    if given.only not in case:
        return []
    data, big, small = llamas(640)
    losses = ("next-token", "fkl")
    given_to_all = (big, small, data, folder, losses)
    sides = {name: functools.partial(forked, epoch, side, *given_to_all) for name, side in OF_TEXTS.items()}
    found = row(case, "s", in_turn(sides, given.rounds), base="alone")
    show(found)
    return [found]


def llamas(texts: int) -> tuple[DataModule, Model, Model]:
    """So many generated texts, and two language models with fresh weights."""
    from kd_demo.options import SentencesOptions
    from kd_demo.text import sentences
    from kd_transformers.build import build
    from kd_transformers.options import TransformersOptions

    data = sentences(SentencesOptions(prompt=2, train=texts))
    sizes = ({"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 4} for width in (256, 128))
    big, small = (build(TransformersOptions(config={**LLAMA, **size}), data.task) for size in sizes)
    return data, big, small


def students(given: argparse.Namespace, folder: str) -> list[Row]:
    """A language model taught from each codec."""
    if given.only and given.only not in "texts":
        return []
    alone = {**TEXTS, "losses": [{"use": "next-token"}], "student": LARGE}
    taught = kdcore.run(alone, ["train.epochs=4"], run_dir=f"{folder}/teacher")
    found = []
    for name, cache in CODECS.items():
        results = [_taught(str(taught.path), cache, seed, folder) for seed in range(3)]
        perplexity = [r["perplexity"] for r in results]
        found.append(Row(f"texts: {name}", "val perplexity", {"perplexity": statistics.mean(perplexity)}, {}, 3,
                         {"by seed": perplexity, **results[0]["facts"]}))  # fmt: skip
        show(found[-1])
    return found


def _taught(teacher: str, cache: dict[str, Any] | None, seed: int, folder: str) -> dict[str, Any]:
    more = {} if cache is None else {"cache": {"folder": folder, **cache}}
    recipe = {**TEXTS, "losses": [{"use": "fkl"}], "student": SMALL, "seed": seed,
              "teacher": {**LARGE, "checkpoint": teacher, **more}}  # fmt: skip
    with tempfile.TemporaryDirectory() as where:
        result = kdcore.run(recipe, run_dir=Path(where) / "run")
        term = last_terms(result.path)["fkl"]
    facts: dict[str, Any] = {"last term": round(term, 4)}
    if cache is not None:
        path = kdcore.fill_cache(recipe)["teacher"]
        held = read_facts(path)
        facts |= {"bytes of a token": held["bytes_per_unit"], **held["errors"]["logits"]}
    return {"perplexity": result.metrics["val/perplexity"], "facts": facts}


def main() -> None:
    given = begin(parser(__doc__, rounds=5))
    keep_heap()
    with tempfile.TemporaryDirectory() as folder:
        write("cache", [*epochs(given, folder), *epochs_of_texts(given, folder), *students(given, folder)], given)


if __name__ == "__main__":
    main()
