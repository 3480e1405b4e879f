# Each target sets up its own .venv when missing, and not again while pyproject.toml and constraints.txt are unchanged.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-slow check format clean

setup: $(STAMP)

# torch first and pinned: anything installed before it could pull another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

# The main job on the embedded default: train, then judge base and adapter on the held-out rows.
demo: $(STAMP)
	$(BIN)/training-lens train +experiment=default
	$(BIN)/training-lens compare --run latest

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: check
	$(BIN)/pytest -n 2 -m "not slow"

# The proofs that take long, each of a kind of which another is in `make test`.
test-slow: $(STAMP)
	$(BIN)/pytest -n 2 -m slow

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) outputs .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
