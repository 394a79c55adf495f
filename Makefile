# Every target sets up what it needs from nothing: Python >= 3.11 with pip, and make.

PYTHON ?= python3
BIN := .venv/bin
MEMBERS := kdcore cli $(sort $(wildcard plugins/*))
WORKERS ?= 2
STAMP := .venv/.ready
BENCH := .venv-bench
AREAS := startup overhead encoders language_models layout options cache divergences scale_out data_path growth

.PHONY: env quickstart test faults lint types docs bench clean

env: $(STAMP)

# torch comes through pip, which is where machines are told of CPU or CUDA builds; uv resolves the rest around it.
$(STAMP): pyproject.toml $(addsuffix /pyproject.toml,$(MEMBERS)) .ci/torchvision_ops.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv torch==2.13.0
	$(BIN)/uv pip install --quiet --python $(BIN)/python --group dev $(addprefix -e ./,$(MEMBERS))
	$(BIN)/python .ci/torchvision_ops.py
	touch $@

quickstart: env
	$(BIN)/kd run quickstart --resume

test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

faults: env
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/killing.py --kills 60
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/killing.py --kills 240 --warm

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: env
	$(BIN)/mypy kdcore/src cli/src

docs: env
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# The peers are in an environment of the benchmarks' own; uv reads the pins of pyproject.toml as constraints.
$(BENCH)/.ready: pyproject.toml $(addsuffix /pyproject.toml,$(MEMBERS)) .ci/torchvision_ops.py benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet uv torch==2.13.0
	$(BENCH)/bin/uv pip install --quiet --python $(BENCH)/bin/python -r benchmarks/requirements.txt $(addprefix -e ./,$(MEMBERS))
	$(BENCH)/bin/python .ci/torchvision_ops.py
	touch $@

bench: $(BENCH)/.ready
	set -e; for area in $(AREAS); do OMP_NUM_THREADS=1 $(BENCH)/bin/python benchmarks/$$area.py $(ARGS); done
	$(BENCH)/bin/python benchmarks/page.py

clean:
	rm -rf .venv $(BENCH) docs/_build runs
