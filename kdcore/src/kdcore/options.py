"""The base of every component's options, and what they may say about downloads."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict


@dataclass(frozen=True)
class Download:
    """Something a recipe would fetch from the network.

    Args:
        name: what, such as `microsoft/resnet-50`.
        source: where from, such as `Hugging Face Hub`.
        size: bytes, or `None` if it cannot be told without the network.
    """

    name: str
    source: str
    size: int | None = None


class Options(BaseModel):
    """Options of a component: every field has a type, a description and, unless it is required, a default.

    Unknown keys are errors. A module of options imports neither torch nor anything heavy.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=())

    def downloads(self) -> list[Download]:
        """What building the component would fetch, without fetching it. Called by `kd run --dry-run`."""
        return []
