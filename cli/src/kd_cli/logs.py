"""What of the log reaches the terminal: warnings of kd and its plugins, and no noise of the libraries below."""

from __future__ import annotations

import logging
import os
import sys

from kd_cli.errors import is_main_process, say

_LIBRARIES = ("accelerate", "asyncio", "datasets", "filelock", "fsspec", "httpx", "huggingface_hub", "matplotlib", "py",
              "tensorboard", "timm", "torch", "torchvision", "transformers", "urllib3")  # fmt: skip
_QUIET = {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "error", "TORCH_CPP_LOG_LEVEL": "ERROR",
          "LOGLEVEL": "ERROR", "TF_CPP_MIN_LOG_LEVEL": "3"}  # fmt: skip


class _Handler(logging.Handler):
    """Writes to whatever stderr is at that moment: under a live display it is not the one of the start."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(
                record.levelname.lower(), self.format(record), "yellow" if record.levelno >= logging.WARNING else "blue"
            )
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


def set_up(verbose: int = 0) -> None:
    """Send the log to stderr: warnings; with 1, what kd does; with 2, all there is, other libraries included."""
    root = logging.getLogger()
    root.handlers = [h for h in root.handlers if not isinstance(h, _Handler)] + [_Handler()]
    root.setLevel({0: logging.WARNING, 1: logging.INFO}.get(verbose, logging.DEBUG))
    if not is_main_process():
        root.setLevel(logging.ERROR)
    if verbose < 2:
        bars = {} if sys.stderr.isatty() else {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        for name, value in {**_QUIET, **bars}.items():
            os.environ.setdefault(name, value)
        for name in _LIBRARIES:
            logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(verbose < 2)
