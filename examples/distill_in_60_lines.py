"""Knowledge distillation in plain PyTorch: no framework, only the loss functions of kd-classic.

A convolutional network learns handwritten digits of which three labels in ten are wrong; its training is stopped
before it knows the wrong ones by heart. A small network then learns the same digits twice, from the same start: alone,
from the labels, and distilled, from the large network's answers. Run it with

    python examples/distill_in_60_lines.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_classic.functional import kd


def network(width: int) -> nn.Sequential:
    """Three convolutions, a mean over the image, a linear layer."""
    layers: list[nn.Module] = []
    for into, out, stride in ((1, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)):
        layers += [nn.Conv2d(into, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def train(net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], epochs: int) -> None:
    """Minimise `loss(logits, rows)` over the training rows."""
    optimizer = torch.optim.AdamW(net.train().parameters(), lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            loss(net(images[rows]), rows).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(net: nn.Module) -> str:
    """The share of test images that a network gets right."""
    return f"{(net.eval()(test_images).argmax(1) == test_labels).float().mean():.1%}"


torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
inputs = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 16
targets = torch.tensor(digits.target)[order]
images, test_images, true_labels, test_labels = inputs[:1200], inputs[1200:], targets[:1200], targets[1200:]
wrong = (true_labels + torch.randint(1, 10, true_labels.shape)) % 10
labels = torch.where(torch.rand(len(images)) < 0.3, wrong, true_labels)

teacher, alone, distilled = network(32), network(12), network(12)
distilled.load_state_dict(alone.state_dict())
train(teacher, lambda logits, rows: F.cross_entropy(logits, labels[rows]), epochs=4)
with torch.no_grad():
    answers = teacher.eval()(images)
train(alone, lambda logits, rows: F.cross_entropy(logits, labels[rows]), epochs=12)
train(distilled, lambda logits, rows: kd(logits, answers[rows], temperature=4), epochs=12)
print(f"teacher {accuracy(teacher)}, student alone {accuracy(alone)}, student distilled {accuracy(distilled)}")
