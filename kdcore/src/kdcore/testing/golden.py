"""Hold plugins to golden vectors: `python -m kdcore.testing.golden FOLDER [--plugin SLUG]`.

A vector is a file `<slug>-<function>-<n>.npz` with arrays `in_*`, `param_*`, `out_*`, `grad_*` and a JSON string `meta`
whose `options` are the arguments. A plugin's `tests/golden.py` holds `ADAPTERS`: function name -> callable
`(inputs, params, options) -> outputs`, all keyed without their prefixes. An adapter renames and reshapes; the
mathematics is the plugin's own. Inputs and parameters that have a `grad_*` array require a gradient, which is taken of
`outputs["loss"]`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Adapter = Callable[[dict[str, Tensor], dict[str, Tensor], dict[str, Any]], Mapping[str, Tensor]]
TOLERANCE = 1e-5
SMALL = 1e-4
"""Values below it may be what is left of larger ones that cancel, such as gradients through a batch norm: in float32
their last digits depend on the number of threads."""


@dataclass(frozen=True)
class Case:
    """One vector's verdict: the largest relative error over its outputs and gradients, or why there is none."""

    name: str
    error: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether it agrees."""
        return self.error is not None and self.error <= TOLERANCE


def adapters(slug: str, plugins: Path) -> Mapping[str, Adapter]:
    """The adapters of a plugin, from `<plugins>/<slug>/tests/golden.py`; none if it has no such file."""
    path = plugins / slug / "tests" / "golden.py"
    if not path.is_file():
        return {}
    spec = importlib.util.spec_from_file_location(f"golden_{slug.replace('-', '_')}", path)
    if spec is None or spec.loader is None:
        return {}
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Mapping[str, Adapter] = module.ADAPTERS
    return found


def check(path: Path, adapter: Adapter) -> Case:
    """Evaluate one vector."""
    with np.load(path, allow_pickle=False) as arrays:
        groups: dict[str, dict[str, Tensor]] = {"in": {}, "param": {}, "out": {}, "grad": {}}
        for key in arrays.files:
            prefix, _, name = key.partition("_")
            if prefix in groups:
                groups[prefix][name] = _value(np.array(arrays[key]))
        options = json.loads(str(arrays["meta"])).get("options", {})
    for name in groups["grad"]:
        source = groups["in"].get(name, groups["param"].get(name))
        if source is not None:
            source.requires_grad_()
    try:
        outputs = adapter(groups["in"], groups["param"], options)
        errors = [_error(outputs[name], wanted) for name, wanted in groups["out"].items()]
        if groups["grad"]:
            sources = [groups["in"].get(name, groups["param"].get(name)) for name in groups["grad"]]
            grads = torch.autograd.grad(outputs["loss"], [s for s in sources if s is not None])
            errors += [_error(g, w) for g, w in zip(grads, groups["grad"].values(), strict=True)]
    except Exception as error:
        return Case(path.stem, None, f"{type(error).__name__}: {error}")
    return Case(path.stem, max(errors, default=0.0))


def _value(array: Any) -> Any:
    """A tensor; texts stay an array of NumPy."""
    return array if array.dtype.kind == "U" else torch.from_numpy(array)


def _error(got: Any, wanted: Any) -> float:
    """Largest deviation, relative to the largest magnitude wanted, which counts as `SMALL` at least; infinite where
    shapes differ, and for texts that are not the same."""
    if not isinstance(wanted, Tensor):
        return 0.0 if np.array_equal(got, wanted) else float("inf")
    got, wanted = got.detach().to(torch.float64), wanted.to(torch.float64)
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=SMALL))


def run(folder: Path, plugins: Path, only: str | None = None) -> Iterator[Case]:
    """The cases of a folder, for the plugins that have adapters (or the one asked for)."""
    slugs = sorted((p.name for p in plugins.iterdir() if p.is_dir()), key=len, reverse=True)
    for path in sorted(folder.glob("*.npz")):
        slug = next((s for s in slugs if path.stem.startswith(f"{s}-")), None)
        if slug is None or (only and slug != only):
            continue
        function = path.stem[len(slug) + 1 :].rpartition("-")[0]
        adapter = adapters(slug, plugins).get(function)
        yield check(path, adapter) if adapter else Case(path.stem, None, "no adapter")


def main() -> int:
    """Print a row per vector; 0 if all agree."""
    parser = argparse.ArgumentParser(prog="python -m kdcore.testing.golden", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the *.npz files are")
    parser.add_argument("--plugin", help="only this plugin's vectors")
    parser.add_argument(
        "--plugins", type=Path, default=Path("plugins"), help="folder of the plugins (default: plugins)"
    )
    given = parser.parse_args()
    for path in (given.folder, given.plugins):
        if not path.is_dir():
            print(f"{path}: there is no such folder", file=sys.stderr)
            return 2
    cases = list(run(given.folder, given.plugins, given.plugin))
    for case in cases:
        verdict = "ok" if case.passed else "-" if case.note == "no adapter" else "FAILED"
        print(f"{verdict:7}{case.name:44}{'' if case.error is None else f'{case.error:.1e}':>10}  {case.note}")
    failed = [c for c in cases if not c.passed and c.note != "no adapter"]
    agree = sum(c.passed for c in cases)
    print(
        f"{agree} agree to {TOLERANCE:g}, {len(failed)} do not, {len(cases) - agree - len(failed)} have no adapter yet"
    )
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
