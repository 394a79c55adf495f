"""How long `kd list` takes from a cold start, beside the imports it is measured against.

    python benchmarks/startup.py

Prints the median wall and CPU seconds of alternating runs and the two ratios that matter: to the CLI's own libraries
(target at most 2) and to torch (target at most 0.35).
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

KD = str(Path(sys.executable).with_name("kd"))
COMMANDS = {
    "kd list": [KD, "list"],
    "import typer, rich.table, pluggy, pydantic": [sys.executable, "-c", "import typer, rich.table, pluggy, pydantic"],
    "import torch": [sys.executable, "-c", "import torch"],
}


def measure(command: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one run."""
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return after.elapsed - before.elapsed, cpu


def main(rounds: int = 9) -> None:
    for command in COMMANDS.values():
        measure(command)
    runs = [{name: measure(command) for name, command in COMMANDS.items()} for _ in range(rounds)]
    print(f"{'command':46}{'wall s':>8}{'CPU s':>8}   (medians of {rounds} alternating runs)")
    for name in COMMANDS:
        wall, cpu = (statistics.median(run[name][i] for run in runs) for i in (0, 1))
        print(f"{name:46}{wall:8.3f}{cpu:8.3f}")
    for other in list(COMMANDS)[1:]:
        ratios = [statistics.median(run["kd list"][i] / run[other][i] for run in runs) for i in (0, 1)]
        print(f"kd list / {other:36}{ratios[0]:8.2f}{ratios[1]:8.2f}")


if __name__ == "__main__":
    main()
