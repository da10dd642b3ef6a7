# `make train` and `make test` do all set-up on a fresh machine, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: train test lint clean

# torch first and by its exact version: a range would take another build.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

train: $(VENV)/.installed
	$(BIN)/rayllp train $(ARGS)

test: $(VENV)/.installed
	$(BIN)/ruff check rayllp tests examples
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check --fix rayllp tests examples
	$(BIN)/ruff format rayllp tests examples

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
