"""What brings the teacher's states to the student's width."""

from __future__ import annotations

from torch import Tensor, nn


class Projectors(nn.Module):
    """A perceptron per hop, then a linear transform that all hops share.

    Args:
        hops: L, the hops including 0.
        teacher: width D of the teacher's states.
        width: width d of the student's states.
        filter_layer: hidden layers of each perceptron: linear, PReLU, layer normalisation, dropout.
        projector_layer: linear layers, without bias, of the shared transform.
        dropout: in the hidden layers.
    """

    def __init__(
        self, hops: int, teacher: int, width: int, *, filter_layer: int = 1, projector_layer: int = 1,
        dropout: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.filters = nn.ModuleList(_perceptron(teacher, width, filter_layer, dropout) for _ in range(hops))
        self.transform = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(projector_layer)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("relu"))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        """The states of each hop, `[n, D]`, as `[n, width]`."""
        return [self.transform(part(state)) for part, state in zip(self.filters, states, strict=True)]


def _perceptron(teacher: int, width: int, hidden: int, dropout: float) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(hidden):
        parts += [nn.Linear(teacher, width), nn.PReLU(), nn.LayerNorm(width), nn.Dropout(dropout)]
        teacher = width
    return nn.Sequential(*parts, nn.Linear(teacher, width))
