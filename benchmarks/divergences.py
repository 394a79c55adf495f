"""The generalised JSD over a large vocabulary: time and peak memory of a value with its gradients.

    python benchmarks/divergences.py [--tokens 1024] [--rows 2] [--vocabulary 128000] [--width 64] [--rounds 3]

Three formulas see the same tensors: the plain one, TRL's `GKDTrainer.generalized_jsd_loss`, and this project's, each on
logits and, with the last layers in it, on hidden states. Every measurement is a process of its own, one thread, and the
formulas take turns; memory is what the peak of resident memory rises above what stood before. Needs `trl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn


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


def peak() -> int:
    """The largest resident memory since it was last reset, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(name: str, source: str, rows: int, tokens: int, vocabulary: int, width: int) -> dict[str, float]:
    """One value and its gradients."""
    from kd_llm_kd_suite.losses import Divergence
    from kdcore.models import Outputs

    torch.set_num_threads(1)
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

    Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.perf_counter()
    found = value()
    gradients = torch.autograd.grad(found, wanted)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "bytes": peak() - before, "value": found.item(), "norm": gradients[0].norm().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("rows", 2), ("tokens", 1024), ("vocabulary", 128_000), ("width", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("rows", "tokens", "vocabulary", "width")}
    if args.one:
        print(json.dumps(measure(*args.one, **sizes)))
        return
    cases = [(name, source) for source in ("logits", "hidden") for name in ("plain", "trl", "kd")]
    found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            command = [sys.executable, __file__, *(f"--{k}={v}" for k, v in sizes.items()), "--one", *case]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"[{args.rows}, {args.tokens}] tokens, vocabulary {args.vocabulary}, width {args.width}, float32, 1 thread")
    print(f"{'from':8} {'formula':8} {'seconds':>8} {'/ plain':>8} {'/ trl':>7} {'GB':>7} {'/ plain':>8} {'/ trl':>7}"
          f" {'value':>12} {'gradient':>12}")  # fmt: skip
    for source in ("logits", "hidden"):
        s, b = ({name: statistics.median(x[key] for x in found[name, source]) for name in ("plain", "trl", "kd")}
                for key in ("seconds", "bytes"))  # fmt: skip
        for name in ("plain", "trl", "kd"):
            one = found[name, source][0]
            print(f"{source:8} {name:8} {s[name]:8.2f} {s[name] / s['plain']:8.2f} {s[name] / s['trl']:7.2f} "
                  f"{b[name] / 1e9:7.2f} {b[name] / b['plain']:8.2f} {b[name] / b['trl']:7.2f} "
                  f"{one['value']:12.6f} {one['norm']:12.6e}")  # fmt: skip


if __name__ == "__main__":
    main()
