"""One process of the comparison of two processes with one: `python -m kdcore.testing.worker METHOD FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdcore import api
from kdcore.testing.conformance import cut_recipe


def _always_eval(self: nn.Module, mode: bool = True) -> nn.Module:
    return nn.Module.train(self, False)


def main() -> None:
    """Run the shortened quickstart without what differs between processes by nature."""
    for layer in (_BatchNorm, nn.Dropout):
        layer.train = _always_eval  # type: ignore[method-assign, assignment]
    recipe = cut_recipe(sys.argv[1])
    recipe["train"]["save_every"] = 1000
    api.run(recipe, run_dir=Path(sys.argv[2]))


if __name__ == "__main__":
    main()
