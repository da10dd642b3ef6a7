# `make train` and `make test` do all set-up on a fresh machine, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: train test lint docs clean

# torch first and by its exact version: a range would take another build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

train: $(VENV)/.installed
	$(BIN)/rayllp train $(ARGS)

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@

# Into site/: open site/index.html, no server needed.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# In two processes, each with a Ray cluster of its own; files go to them in order, since tests that keep a cluster's CPUs come last.
# What ARGS says comes last and wins: make test ARGS="tests/test_mgrit.py -n 0"; ARGS="-m study … -n 0 -s" for what is started by hand.
test: $(VENV)/.installed
	$(BIN)/ruff check rayllp tests examples docs
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix rayllp tests examples docs
	$(BIN)/ruff format rayllp tests examples docs

clean:
	rm -rf $(VENV) build site *.egg-info .pytest_cache .mypy_cache .ruff_cache
