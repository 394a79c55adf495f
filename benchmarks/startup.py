"""How long commands take from a cold start, beside the imports they are measured against.

    python benchmarks/startup.py [--rounds 9] [--only "kd list"]

`kd --help`, `kd list` and `kd show kd` beside the libraries of a command line alone, `import torch`, and what users of
the peers import; wall and processor seconds of processes of their own, in turn. Targets: `kd list` takes at most 0.35
of `import torch`, and at most twice `import typer, rich.table, pluggy, pydantic`.
"""

from __future__ import annotations

import functools
import resource
import subprocess
import sys
import time
from pathlib import Path

import measure

KD = str(Path(sys.executable).with_name("kd"))
IMPORTS = {
    "the libraries of a command line": "import typer, rich.table, pluggy, pydantic",
    "import torch": "import torch",
    "torchdistill's DistillationBox": "from torchdistill.core.distillation import DistillationBox",
    "TRL's GKDTrainer": "from trl.experimental.gkd import GKDTrainer",
    "import sentence_transformers": "import sentence_transformers",
}
COMMANDS = {"kd list": ["list"], "kd --help": ["--help"], "kd show kd": ["show", "kd"]}


def run(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one run."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    given = measure.parser(__doc__, rounds=9).parse_args()
    wanted = [name for name in COMMANDS if given.only in name]
    commands = {name: [KD, *COMMANDS[name]] for name in wanted}
    commands |= {name: [sys.executable, "-c", line] for name, line in IMPORTS.items()}
    sides = {name: functools.partial(run, command) for name, command in commands.items()}
    found = measure.in_turn(sides, given.rounds)
    rows = []
    for index, unit in enumerate(("s, wall", "s, processor")):
        times = {name: [value[index] for value in values] for name, values in found.items()}
        for name in wanted:
            case = {
                key: values for key, values in times.items() if key == name or key not in commands.keys() & COMMANDS
            }
            rows.append(measure.row(name, unit, {name: case.pop(name), **case}))
            measure.show(rows[-1])
    measure.write("startup", rows, given)


if __name__ == "__main__":
    main()
