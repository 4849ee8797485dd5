# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECKED := src tests recipes benchmarks

.PHONY: demo test browser lint types base clean
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

test: $(VENV)/installed-test browser lint types  ## Lint, types, then every test.
	$(BIN)/python -m pytest

browser:  ## Install Chromium where it is missing and apt-get may; the browser tests skip without one.
	@[ -z "$$MANYLORA_CHROMIUM" ] || exit 0; \
	for name in chromium chromium-browser google-chrome google-chrome-stable; do \
	  ! command -v $$name >/dev/null || exit 0; \
	done; \
	command -v apt-get >/dev/null || { echo "no Chromium: the browser tests will skip"; exit 0; }; \
	as_root=; [ "$$(id -u)" = 0 ] || as_root="sudo -n"; \
	$$as_root true 2>/dev/null || { echo "no Chromium, no right to install it: the browser tests will skip"; exit 0; }; \
	echo "installing Chromium for the browser tests"; \
	{ $$as_root apt-get -qq update && \
	  $$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install chromium; \
	} >/dev/null || echo "Chromium could not be installed: the browser tests will skip"

lint: $(VENV)/installed-test
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: $(VENV)/installed-test
	$(BIN)/mypy

base: $(VENV)/installed  ## Pretrain the embedded base model anew (see recipes/base).
	$(BIN)/python -m recipes.base.pretrain --out build/base

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
