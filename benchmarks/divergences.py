"""The generalised JSD over a large vocabulary: time and peak memory of a value with its gradients.

    python benchmarks/divergences.py [--tokens 512] [--rows 2] [--vocabulary 128000] [--width 64] [--rounds 3]

Three formulas see the same tensors: the plain one, TRL's `GKDTrainer.generalized_jsd_loss`, and this project's, each on
logits and, with the last layers in it, on hidden states. Every measurement is a process of its own, and the formulas
take turns (the largest sizes once only); memory is what the peak of resident memory rises above what stood before.
Values and gradients agree to 1e-4, or there is no result. Without sizes, a table over vocabularies and lengths. Needs
`trl`. Targets at 512 tokens and 128,000 entries: at most 0.15 of TRL's memory and 0.5 of its time.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable

import measure
import torch
from torch import Tensor, nn

NAMES = ("rows", "tokens", "vocabulary")
TARGET = (2, 512, 128_000)
SWEEP = [(1, t, v) for v in (8_000, 32_000, 128_000) for t in (256, 512, 1024) if (t, v) != (1024, 128_000)] + [TARGET]
"""Rows, tokens of a row and vocabulary; the target has as many positions as a row of 1,024."""
LARGE = 30_000_000
"""Numbers in the logits above which a formula runs once."""


def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    kept = labels != -100
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    m = torch.logsumexp(torch.stack([q, p]), 0) - torch.log(torch.tensor(2.0))
    rows = 0.5 * (p.exp() * (p - m)).sum(-1) + 0.5 * (q.exp() * (q - m)).sum(-1)
    return rows[kept].mean()


def trl(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    loss: Tensor = GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=0.5)
    return loss


def one(name: str, source: str, rows: int, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """One value and its gradients."""
    from kd_llm_kd_suite.losses import Divergence
    from kdcore.models import Outputs

    torch.manual_seed(0)
    heads = [nn.Linear(width, vocabulary, bias=False) for _ in range(2)]
    heads[1].requires_grad_(False)
    hidden = [torch.randn(rows, tokens, width) for _ in range(2)]
    labels = torch.randint(0, vocabulary, (rows, tokens))
    inputs, wanted = hidden, [hidden[0].requires_grad_(), heads[0].weight]
    if source == "logits":
        with torch.no_grad():
            inputs = [head(x) for head, x in zip(heads, hidden, strict=True)]
        wanted = [inputs[0].requires_grad_()]
    if name == "kd":
        loss = Divergence("jsd", beta=0.5)
        given = [Outputs(logits=x) if source == "logits" else Outputs(embedding=x, head=head)
                 for x, head in zip(inputs, heads, strict=True)]  # fmt: skip

        def value() -> Tensor:
            return loss(*given, {"labels": labels})
    else:
        formula: Callable[..., Tensor] = {"plain": plain, "trl": trl}[name]
        formula(torch.randn(1, 2, 5), torch.randn(1, 2, 5), torch.zeros(1, 2, dtype=torch.long))  # imports

        def value() -> Tensor:
            made = inputs if source == "logits" else [head(x) for head, x in zip(heads, inputs, strict=True)]
            return formula(*made, labels)

    before, start = measure.reset_peak(), time.perf_counter()
    found = value()
    gradients = torch.autograd.grad(found, wanted)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "bytes": measure.peak() - before,
        "value": found.item(),
        "norm": gradients[0].norm().item(),
    }


def compare(sizes: tuple[int, int, int, int], rounds: int) -> list[measure.Row]:
    """Time and memory of all formulas at one size, whose values and gradients agree."""
    rows = []
    for source in ("logits", "hidden"):
        sides = {name: functools.partial(measure.forked, one, name, source, *sizes) for name in ("kd", "plain", "trl")}
        found = measure.in_turn(sides, 1 if math.prod(sizes[:3]) > LARGE else rounds, warm=0)
        for key in ("value", "norm"):
            values = [x[-1][key] for x in found.values()]
            torch.testing.assert_close(values, values[-1:] * len(values), rtol=1e-4, atol=0)
        case = f"[{sizes[0]}, {sizes[1]}] tokens, vocabulary {sizes[2]:,}, from {source}"
        for key, unit, factor in (("seconds", "seconds", 1), ("bytes", "GB", 1e-9)):
            rows.append(measure.row(case, unit, {k: [factor * x[key] for x in those] for k, those in found.items()}))
            measure.show(rows[-1])
    return rows


def main() -> None:
    parser = measure.parser(__doc__, rounds=3)
    for name in ("rows", "tokens", "vocabulary"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--width", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    chosen = tuple(getattr(given, name) or value for name, value in zip(NAMES, TARGET, strict=True))
    sizes = [chosen] if any(getattr(given, name) for name in NAMES) else SWEEP
    print("Liger's kernels need CUDA, and this measures memory of the CPU: skipped")
    one("trl", "hidden", 1, 8, 8, 8)  # imports, once for all processes
    made = []
    for size in sizes:
        if given.only in f"{size[2]} {size[1]}":
            made += compare((*size, given.width), given.rounds)
    measure.write("divergences", made, given)


if __name__ == "__main__":
    main()
