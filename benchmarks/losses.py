"""What a loss costs, forward and backward, beside its formula written plainly in PyTorch.

    python benchmarks/losses.py [--rounds 30] [--only rkd]

The plain forms check nothing, mask nothing and take one layout only; both see the same tensors in turn. The median of
the ratios should be at most 1.0.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_classic import functional as K

B, C, D, CH, SIDE = 64, 1000, 512, 64, 14


def kd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="batchmean") * 16


def logitstd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s, t = ((z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True)) for z in (s, t))
    return kd(s, t, y)


def dkd(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    hot = torch.zeros_like(s).scatter_(1, y[:, None], 1).bool()
    ps, pt = F.softmax(s / 4, 1), F.softmax(t / 4, 1)
    two_s, two_t = (torch.cat([(p * hot).sum(1, keepdim=True), (p * ~hot).sum(1, keepdim=True)], 1) for p in (ps, pt))
    target = F.kl_div(two_s.log(), two_t, reduction="sum") * 16 / len(s)
    others = F.kl_div(F.log_softmax(s / 4 - 1000.0 * hot, 1), F.softmax(t / 4 - 1000.0 * hot, 1), reduction="sum")
    return target + 8 * others * 16 / len(s)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def dist(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    s, t = s.softmax(1), t.softmax(1)
    return 2 - pearson(s, t).mean() - pearson(s.T, t.T).mean()


def wsld(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    soft = -(F.softmax(t / 2, 1) * F.log_softmax(s / 2, 1)).sum(1)
    hard, theirs = F.cross_entropy(s, y, reduction="none"), F.cross_entropy(t, y, reduction="none")
    weight = 1 - torch.exp(-(hard / (theirs + 1e-7)).detach())
    return hard.mean() + 2.5 * 4 * (weight * soft).mean()


def at(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(f.pow(2).mean(1).flatten(1)) for f in (s, t))
    return (s - t).pow(2).mean()


def nst(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(f.flatten(2), dim=2) for f in (s, t))
    return sum(w * torch.bmm(a, b.transpose(1, 2)).pow(2).mean() for w, a, b in ((1, t, t), (1, s, s), (-2, s, t)))


def ab(s: Tensor, t: Tensor) -> Tensor:
    loss = (s + 1) ** 2 * ((s > -1) & (t <= 0)).float() + (s - 1) ** 2 * ((s <= 1) & (t > 0)).float()
    return loss.sum() / len(s) * 3 / 1000


def hcl(s: Tensor, t: Tensor) -> Tensor:
    loss, total, weight = F.mse_loss(s, t), 1.0, 1.0
    for size in (4, 2, 1):
        weight /= 2
        loss = loss + weight * F.mse_loss(F.adaptive_avg_pool2d(s, size), F.adaptive_avg_pool2d(t, size))
        total += weight
    return loss / total


def sp(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(f.flatten(1) @ f.flatten(1).T) for f in (s, t))
    return (t - s).pow(2).sum() / len(s) ** 2


def rkd(s: Tensor, t: Tensor) -> Tensor:
    def distances(e: Tensor) -> Tensor:
        square = e.pow(2).sum(1)
        d = (square[:, None] + square[None] - 2 * e @ e.T).clamp(min=1e-12).sqrt()
        d = d * (1 - torch.eye(len(e)))
        return d / d[d > 0].mean()

    def cosines(e: Tensor) -> Tensor:
        u = F.normalize(e[None] - e[:, None], dim=2)
        return torch.bmm(u, u.transpose(1, 2))

    return 25 * F.smooth_l1_loss(distances(s), distances(t)) + 50 * F.smooth_l1_loss(cosines(s), cosines(t))


def pkt(s: Tensor, t: Tensor) -> Tensor:
    def neighbours(x: Tensor) -> Tensor:
        x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
        k = (x @ x.T + 1) / 2
        return k / k.sum(1, keepdim=True)

    s, t = neighbours(s), neighbours(t)
    return (t * torch.log((t + 1e-7) / (s + 1e-7))).mean()


def crd(s: Tensor, t: Tensor) -> Tensor:
    x, noise = s.exp(), (s.shape[1] - 1) / 50000
    first = torch.log(x[:, 0] / (x[:, 0] + noise + 1e-7))
    rest = torch.log(torch.full_like(x[:, 1:], noise) / (x[:, 1:] + noise + 1e-7))
    return -(first.sum() + rest.sum()) / len(s)


def cwd(s: Tensor, t: Tensor) -> Tensor:
    s, t = s.flatten(0, 1).flatten(1), t.flatten(0, 1).flatten(1)
    return F.kl_div(F.log_softmax(s / 4, 1), F.softmax(t / 4, 1), reduction="sum") * 16 / len(s)


def pairwise(s: Tensor, t: Tensor) -> Tensor:
    grams = []
    for f in (s, t):
        f = F.max_pool2d(f, 7, 7, ceil_mode=True).flatten(2)
        f = f / (f.detach().norm(dim=1, keepdim=True) + 1e-8)
        grams.append(torch.einsum("bci,bcj->bij", f, f))
    return (grams[1] - grams[0]).pow(2).sum() / grams[0].shape[-1] ** 2 / len(s)


LOGITS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "kd": (lambda s, t, y: K.kd(s, t), kd),
    "kd standardized": (lambda s, t, y: K.kd(s, t, standardize=True), logitstd),
    "dkd": (K.dkd, dkd),
    "dist": (lambda s, t, y: K.dist(s, t), dist),
    "wsld": (K.wsld, wsld),
}
MAPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "fitnet": (K.fitnet, lambda s, t: F.mse_loss(s, t)),
    "at": (K.at, at), "nst": (K.nst, nst), "ab": (K.ab, ab), "hcl": (K.hcl, hcl), "sp": (K.sp, sp),
    "cwd": (K.cwd, cwd), "skd_pairwise": (K.skd_pairwise, pairwise),
    "mgd": (K.mgd, lambda s, t: 2e-5 * F.mse_loss(s, t, reduction="sum") / len(s)),
}  # fmt: skip
VECTORS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rkd": (K.rkd, rkd), "pkt": (K.pkt, pkt), "crd": (lambda s, t: K.crd(s.exp(), 50000), crd),
}  # fmt: skip


def seconds(loss: Callable[..., Tensor], student: Tensor, rest: tuple[Tensor, ...]) -> float:
    """Forward and backward once."""
    student.grad = None
    start = time.perf_counter()
    loss(student, *rest).backward()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only")
    given = parser.parse_args()
    torch.manual_seed(0)
    logits, maps, vectors = ((torch.randn(shape, requires_grad=True), torch.randn(shape))
                             for shape in ((B, C), (B, CH, SIDE, SIDE), (B, D)))  # fmt: skip
    label = torch.randint(C, (B,))
    print(f"{'':18}{'ours ms':>10}{'plain ms':>10}{'ratio':>8}   ({torch.get_num_threads()} threads)")
    ratios = []
    for table, (student, *rest) in ((LOGITS, (*logits, label)), (MAPS, maps), (VECTORS, vectors)):
        for name, pair in table.items():
            if given.only and name != given.only:
                continue
            torch.testing.assert_close(pair[0](student, *rest), pair[1](student, *rest), rtol=1e-4, atol=1e-5)
            times = []
            for number in range(given.rounds + 4):  # in turn, and each first every other time
                order = pair if number % 2 else pair[::-1]
                found = [seconds(loss, student, tuple(rest)) for loss in order]
                times.append(found if number % 2 else found[::-1])
            times = times[4:]
            ours, plain = (statistics.median(column) for column in zip(*times, strict=True))
            ratios.append(statistics.median(a / b for a, b in times))
            print(f"{name:18}{1e3 * ours:10.3f}{1e3 * plain:10.3f}{ratios[-1]:8.2f}")
    print(f"{'median':18}{'':20}{statistics.median(ratios):8.2f}")


if __name__ == "__main__":
    main()
