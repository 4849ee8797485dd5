# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECKED := src tests recipes benchmarks

.PHONY: demo test lint types base clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/installed  ## Fine-tune the embedded model on the embedded suite, print the table.
	$(BIN)/manylora train

test: $(VENV)/installed-test lint types  ## Lint, types, then every test.
	$(BIN)/python -m pytest

lint: $(VENV)/installed-test
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(VENV)/installed-test
	$(BIN)/mypy

base: $(VENV)/installed  ## Pretrain the embedded base model anew (see recipes/base).
	$(BIN)/python -m recipes.base.pretrain --out build/base

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
