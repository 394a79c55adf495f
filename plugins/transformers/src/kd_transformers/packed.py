"""Whether a language model keeps the texts of a packed row apart."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

LENGTHS = ((3, 4), (4, 3))
"""Of the two texts in each of two rows. They differ, for some attention kernels look at one row only."""


def takes_packed(module: Any) -> bool:
    """Whether a causal language model that is given `position_ids` `[B, T]`, which start at 0 again with each text of a
    row, and no attention mask, reads each text as if it stood alone. It depends on the type of model, on its attention
    kernel and on the version of transformers, so it is tried, on 14 tokens.

    The second text of a row must give the logits that it gives alone, and they must not move when the first text
    changes. The model is tried in evaluation mode and without gradient, and left in the modes it was in; no random
    number is drawn.

    Args:
        module: the network, called as `module(input_ids=..., position_ids=..., use_cache=False)`.
    """
    if "position_ids" not in inspect.signature(module.forward).parameters:
        return False
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        return _keeps_apart(module)
    except (RuntimeError, ValueError, TypeError, IndexError):  # what it raises over positions that it cannot read
        return False
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def _keeps_apart(module: Any) -> bool:
    tokens = torch.arange(len(LENGTHS) * sum(LENGTHS[0])) % module.config.get_text_config().vocab_size
    ids = tokens.view(len(LENGTHS), -1)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    second = torch.stack([torch.arange(ids.shape[1]) >= first for first, _ in LENGTHS])
    changed = torch.where(second, ids, ids.flip(1))
    whole = torch.arange(ids.shape[1]).expand_as(ids)

    packed = _logits(module, ids, positions)
    alone = torch.cat([_logits(module, row[None, first:], torch.arange(length)[None])[0]
                       for row, (first, length) in zip(ids, LENGTHS, strict=True)])  # fmt: skip
    leak = (_logits(module, changed, positions) - packed)[second].abs().max()
    seen = (_logits(module, changed, whole) - _logits(module, ids, whole))[second].abs().max()
    rounding = torch.finfo(module.dtype).eps ** 0.5 * packed.std()
    return bool(leak <= 0.01 * seen and (packed[second] - alone).abs().max() <= rounding)


def _logits(module: Any, ids: Tensor, positions: Tensor) -> Tensor:
    device = module.device
    found = module(input_ids=ids.to(device), position_ids=positions.to(device), use_cache=False)
    logits: Tensor = found.logits.float().cpu()
    return logits
