"""Options of the toy plugin."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from kdcore.options import Download, Options


class PointsOptions(Options):
    size: int = Field(64, description="training samples")
    broken_at: int | None = Field(None, description="index of a sample that cannot be read")


class LinearOptions(Options):
    checkpoint: str | None = Field(None, description="folder of a saved model")
    remote: str | None = Field(None, description="name of weights to download")

    def downloads(self) -> list[Download]:
        return [Download(self.remote, "Toy Hub", 1_500_000 if self.remote == "big" else None)] if self.remote else []


class ToyOptions(Options):
    distance: Literal["l1", "l2"] = Field("l2", description="how logits are compared")
    crash: bool = Field(False, description="raise an error that nobody expects")
