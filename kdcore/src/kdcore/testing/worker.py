"""One process of the comparison of two processes with one: `python -m kdcore.testing.worker FOLDER METHOD...`."""

import sys
from pathlib import Path

from kdcore.testing.conformance import run_all

if __name__ == "__main__":
    run_all(Path(sys.argv[1]), sys.argv[2:])
