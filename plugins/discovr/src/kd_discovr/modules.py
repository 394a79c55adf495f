"""The parts that are trained and thrown away: projection head, decoder, prototypes, and a branch with its teacher."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from kd_discovr.functional import moved_center, normalise_
from kd_discovr.vit import EPS, blocks, init_linear, positions


class DINOHead(nn.Module):
    """Three linear layers, unit length, and a linear layer whose rows have length 1 (Caron et al. 2021, section 3.1).

    Args:
        width: of what comes in.
        outputs: number of output dimensions.
        hidden: width of the two hidden layers.
        bottleneck: width before the last layer.
    """

    def __init__(self, width: int, outputs: int = 16384, hidden: int = 2048, bottleneck: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))  # fmt: skip
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.last_layer = weight_norm(nn.Linear(bottleneck, outputs, bias=False))
        scale = self.last_layer.parametrizations.weight.original0
        scale.data.fill_(1.0)
        scale.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to logits `[..., outputs]`, which are cosines."""
        logits: Tensor = self.last_layer(F.normalize(self.mlp(x), dim=-1))
        return logits


class MAEDecoder(nn.Module):
    """Tokens for every place of a clip, from those of the visible places (Tong et al. 2022, section 3.3).

    Args:
        encoder_width: of the tokens that come in and go out.
        width, layers, heads: of the decoder.
    """

    def __init__(self, encoder_width: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_width, width, bias=False)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.blocks = blocks(width, layers, heads)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.head = nn.Linear(width, encoder_width)
        self.apply(init_linear)

    def forward(self, tokens: Tensor, visible: Tensor, count: int) -> Tensor:
        """The tokens of all places, in their order.

        Args:
            tokens: of the visible places `[B, v, encoder_width]`.
            visible: their indices `[B, v]`.
            count: number of all places N.

        Returns:
            `[B, N, encoder_width]`.
        """
        seen = self.embed(tokens)
        every = self.mask_token.to(seen.dtype).expand(len(seen), count, -1)
        every = every.scatter(1, visible[..., None].expand_as(seen), seen)
        out: Tensor = self.head(self.norm(self.blocks(every + positions(count, seen.shape[-1], seen.device))))
        return out


class Prototypes(nn.Module):
    """Directions `[count, width]` that stand for clusters, shared by both branches."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width))

    def normalise(self) -> None:
        """Bring every row to length 1, in place."""
        normalise_(self.weight)


class Branch(nn.Module):
    """A student encoder with its head, their EMA teachers, and the centre of the teacher's outputs.

    Args:
        encoder: the student's; it has `embed` and `encode`.
        head: options of `DINOHead` beyond the width.
    """

    center: Tensor

    def __init__(self, encoder: Any, **head: int) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"encoder": encoder, "head": DINOHead(encoder.width, **head)})
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1, head["outputs"]))

    def train(self, mode: bool = True) -> Branch:
        """As always, but the teacher stays in evaluation mode: what it says must not depend on dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    @property
    def encoder(self) -> Any:
        """The student's encoder."""
        return self.student["encoder"]

    @property
    def teacher_encoder(self) -> Any:
        """The teacher's encoder."""
        return self.teacher["encoder"]

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """`teacher = momentum * teacher + (1 - momentum) * student`, for all parameters."""
        slow: list[Tensor] = list(self.teacher.parameters())
        fast: list[Tensor] = list(self.student.parameters())
        torch._foreach_mul_(slow, momentum)
        torch._foreach_add_(slow, fast, alpha=1 - momentum)

    def move_center(self, rows: Tensor, momentum: float) -> None:
        """Move the centre towards the mean of these outputs `[B, K]`, those of all processes together."""
        self.center.copy_(moved_center(self.center, rows, momentum))

    def see(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher makes of whole clips: logits `[B, K]` and patch tokens `[B, N, width]`."""
        hidden = self.teacher_encoder.encode(self.teacher_encoder.embed(video))
        return self.teacher["head"](hidden[:, 0]), hidden[:, 1:]

    def views(self, tokens: Tensor) -> Tensor:
        """The student's logits `[V, B, K]` of the visible tokens `[V, B, n, width]` of several views."""
        logits: Tensor = self.student["head"](self.encoder.encode(tokens.flatten(0, 1))[:, 0])
        return logits.unflatten(0, tokens.shape[:2])
