"""Real images for the leaderboard, as parquet files that `use: datasets` reads.

    python benchmarks/leaderboard/prepare.py mnist t10k-images-idx3-ubyte.gz t10k-labels-idx1-ubyte.gz OUT
    python benchmarks/leaderboard/prepare.py fashion fashion-mnist-sprite.png OUT

The first are the two test files of MNIST (LeCun, Cortes and Burges): 8,000 images to train on, 2,000 to test. The
second is the picture of 900 images from the documentation of Fashion-MNIST (Xiao, Rasul and Vollgraf): 720 and 180.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Picture

CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def mnist(images: Path, labels: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images `[N, 28, 28]` and labels `[N]` by split, from gzipped IDX files."""
    pixels = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    classes = np.frombuffer(gzip.decompress(labels.read_bytes()), np.uint8, offset=8)
    return {"train": (pixels[:8000], classes[:8000]), "test": (pixels[8000:], classes[8000:])}


def fashion(sprite: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels by split, from a grid of 30 x 30 tiles: three rows of tiles are a class."""
    grid = np.asarray(Picture.open(sprite))[..., 0].reshape(30, 28, 30, 28).transpose(0, 2, 1, 3)
    classes = np.repeat(np.arange(30)[:, None] // 3, 30, axis=1)
    columns = {"train": slice(0, 24), "test": slice(24, 30)}
    return {name: (grid[:, part].reshape(-1, 28, 28), classes[:, part].flatten()) for name, part in columns.items()}


def write(splits: dict[str, tuple[np.ndarray, np.ndarray]], names: list[str], out: Path) -> None:
    """A parquet file per split."""
    out.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=names)})
    for name, (pixels, classes) in splits.items():
        rows = {"image": [Picture.fromarray(image) for image in pixels], "label": classes.tolist()}
        Dataset.from_dict(rows, features=features).to_parquet(out / f"{name}.parquet")
        print(f"{out / name}.parquet: {len(classes)} images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    digits = kinds.add_parser("mnist")
    digits.add_argument("images", type=Path)
    digits.add_argument("labels", type=Path)
    clothes = kinds.add_parser("fashion")
    clothes.add_argument("sprite", type=Path)
    for kind in (digits, clothes):
        kind.add_argument("out", type=Path)
    given = parser.parse_args()
    if given.kind == "mnist":
        write(mnist(given.images, given.labels), [str(digit) for digit in range(10)], given.out)
    else:
        write(fashion(given.sprite), CLOTHES, given.out)


if __name__ == "__main__":
    main()
