# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv (and .venv-flower) where it is missing.
PYTHON ?= python3
VENV := .venv
FLOWER := .venv-flower
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECKED := src tests recipes benchmarks

.PHONY: demo test flower lint types base clean
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

# Flower wants older rich, packaging and typer than constraints.txt has, hence an environment of its own.
$(FLOWER)/installed: pyproject.toml constraints-flower.txt
	rm -rf $(FLOWER)
	$(PYTHON) -m venv $(FLOWER)
	PIP_CONSTRAINT=constraints-flower.txt $(FLOWER)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --editable '.[flower]' pytest pytest-timeout
	touch $@

test: $(VENV)/installed-test lint types  ## Lint, types, then every test; those over Flower first.
	@failed=0; $(MAKE) --no-print-directory flower || failed=1; $(BIN)/python -m pytest || failed=1; exit $$failed

flower:  ## The tests over Flower's real processes; left out where Flower cannot be.
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "LEFT OUT: the tests over Flower, which needs Python 3.11 or later"; \
	elif ! $(MAKE) --no-print-directory $(FLOWER)/installed; then \
	  echo "LEFT OUT: the tests over Flower, which could not be installed (see above)"; \
	else \
	  OMP_NUM_THREADS=1 $(FLOWER)/bin/python -m pytest tests/integration/test_flower.py; \
	fi

lint: $(VENV)/installed-test
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(VENV)/installed-test
	$(BIN)/mypy

base: $(VENV)/installed  ## Pretrain the embedded base model anew (see recipes/base).
	$(BIN)/python -m recipes.base.pretrain --out build/base

clean:
	rm -rf $(VENV) $(FLOWER) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
