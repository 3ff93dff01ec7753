# `make sweep` and `make test` need nothing before them but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: sweep test test-slow gpu lint format types

sweep: $(VENV)/.ready
	$(BIN)/python -m raystar.tune --space search_spaces/loss.yaml

# Two files of tests at a time, each on one thread: most of the time goes into starting Ray and MLflow.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(VENV)/.ready
	$(PYTEST) -m "not slow"

# Whole sweeps, killed processes, clusters, groups of workers.
test-slow: $(VENV)/.ready
	$(PYTEST) -m slow

# What only a GPU can show; with RAYSTAR_GPU_TESTS=cpu, what of it a CPU can.
gpu: $(VENV)/.ready
	$(BIN)/python -m pytest tests/gpu

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(VENV)/.ready
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

types: $(VENV)/.ready
	$(BIN)/mypy

# A marker inside, so that an environment whose installation broke off is finished, not used.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"raystar needs Python 3.11 or later; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.12 ...")'
	@echo "setting up $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,tpe]'
	@touch $@
