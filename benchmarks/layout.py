"""What a frozen convolutional teacher gains from another layout: `python benchmarks/layout.py [--rounds 7]`.

A loop by hand (teacher without gradient, student forward and backward, AdamW) with the teacher as it is, with its
batch norms folded into its convolutions, in the memory format `channels_last`, and both. The ratios are the changed
loop over the plain one: below 1 is a gain. The losses of all variants agree to 1e-4 relative, which is checked.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import measure
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

STUDENT = "resnet18"
CASES = (("resnet34", 32), ("resnet50", 32), ("resnet50", 64), ("mobilenetv3_large_100", 64), ("regnety_008", 64))
BATCH, CLASSES = 32, 100


def folded(teacher: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose batch norms that follow a convolution are folded into it; the activation that
    timm writes into some of its norms stays in their place."""
    made = copy.deepcopy(teacher).eval()
    parents = dict(made.named_modules())
    traced = torch.fx.Tracer()
    traced.is_leaf_module = lambda module, name: not list(module.children()) or isinstance(module, nn.BatchNorm2d)
    nodes = [node for node in traced.trace(made).nodes if node.op == "call_module"]
    for node in nodes:
        norm, source = parents[node.target], node.args[0]
        if not isinstance(norm, nn.BatchNorm2d) or getattr(source, "op", "") != "call_module" or len(source.users) > 1:
            continue
        if isinstance(conv := parents[source.target], nn.Conv2d):
            _set(made, source.target, fuse_conv_bn_eval(conv, norm))
            rest = nn.Sequential(norm.drop, norm.act) if isinstance(norm, BatchNormAct2d) else nn.Identity()
            _set(made, node.target, rest)
    return made


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def loop(teacher: nn.Module, images: list[Tensor], labels: list[Tensor], last: bool) -> tuple[float, float]:
    """Seconds per step, and the last loss."""
    torch.manual_seed(0)
    student = timm.create_model(STUDENT, num_classes=CLASSES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    start = time.perf_counter()
    for image, label in zip(images, labels, strict=True):
        with torch.no_grad():
            seen = image.contiguous(memory_format=torch.channels_last) if last else image
            theirs = teacher(seen)
        ours = student(image)
        loss = F.cross_entropy(ours, label) + F.kl_div(
            (ours / 4).log_softmax(1), (theirs / 4).softmax(1), reduction="batchmean"
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(images), loss.item()


def forwards(teacher: nn.Module, images: list[Tensor], last: bool) -> float:
    """Seconds of the teacher's forward alone."""
    start = time.perf_counter()
    with torch.no_grad():
        for image in images:
            teacher(image.contiguous(memory_format=torch.channels_last) if last else image)
    return (time.perf_counter() - start) / len(images)


def case(name: str, side: int, rounds: int, steps: int) -> list[measure.Row]:
    """The whole step, and the teacher's forward alone."""
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=CLASSES).eval().requires_grad_(False)
    images = [torch.randn(BATCH, 3, side, side) for _ in range(steps)]
    labels = [torch.randint(CLASSES, (BATCH,)) for _ in range(steps)]
    fold = folded(plain)
    teachers = {"plain": (plain, False), "folded": (fold, False), "channels_last": (plain, True),
                "both": (fold, True)}  # fmt: skip
    teachers = {key: (copy.deepcopy(net).to(memory_format=torch.channels_last) if last else net, last)
                for key, (net, last) in teachers.items()}  # fmt: skip
    whole: dict[str, Callable[[], tuple[float, float]]] = {
        key: (lambda net=net, last=last: loop(net, images, labels, last)) for key, (net, last) in teachers.items()
    }
    found = measure.in_turn(whole, rounds)
    losses = [value[-1][1] for value in found.values()]
    torch.testing.assert_close(losses, [losses[0]] * len(losses), rtol=1e-4, atol=0)
    alone = measure.in_turn(
        {key: (lambda net=net, last=last: forwards(net, images, last)) for key, (net, last) in teachers.items()}, rounds
    )
    title = f"{name} at {side}x{side}"
    return [
        measure.row(f"{title}: step", "ms", {k: [1e3 * v[0] for v in values] for k, values in found.items()}, "plain"),
        measure.row(
            f"{title}: teacher alone", "ms", {k: [1e3 * v for v in values] for k, values in alone.items()}, "plain"
        ),
    ]


def main() -> None:
    parser = measure.parser(__doc__, rounds=5)
    parser.add_argument("--steps", type=int, default=3)
    given = measure.begin(parser)
    rows = []
    for name, side in CASES:
        if given.only in f"{name} {side}":
            rows += case(name, side, given.rounds, given.steps)
            for made in rows[-2:]:
                measure.show(made)
    measure.write("layout", rows, given)


if __name__ == "__main__":
    main()
