"""Adapters from the arrays of golden vectors to this plugin's functions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_symbolic_kd import functional

Tensors = dict[str, Tensor]


def criticcut(inputs: Tensors, params: Tensors, options: dict[str, Any]) -> Tensors:
    splits = [(inputs[f"{split}_labels"].numpy(), inputs[f"{split}_preds"].numpy()) for split in ("val", "test")]
    rows = []
    for recall in options["recalls"]:
        cut = functional.mean_cut_off(splits, recall)
        own = [functional.cut_off(*split, recall).precision for split in splits]
        rows.append([cut, *own, np.mean([functional.precision_above(*split, cut) for split in splits])])
    names = ("cutoff", "val_precision", "test_precision", "mean_precision")
    return {name: torch.tensor(np.array(column)) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def eventfilter(inputs: dict[str, Any], params: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    events = [str(event) for event in inputs["events"]]
    logprobs = [float(value) for value in inputs["logprob"]]
    kept = functional.clean_events(events, logprobs, keep_fraction=options["keep_fraction"])
    names = options["PersonX"], options["PersonY"]
    return {"kept": np.array([events[i] for i in kept]),
            "tails": np.array([functional.clean_tail(str(tail), *names) for tail in inputs["tails"]])}  # fmt: skip


ADAPTERS = {"criticcut": criticcut, "eventfilter": eventfilter}
