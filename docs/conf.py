"""Sphinx: `make docs`, or `python -m sphinx -W --keep-going -q -b html docs docs/_build/html`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import catalogue

catalogue.write()

project = "kd"
author = "The kd maintainers"
project_copyright = "The kd maintainers, Apache-2.0"
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "kd"
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence"]
