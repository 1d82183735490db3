# One command each; every target makes the environment it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO_OUT ?= demo-out
# The oldest torch there is for this machine (memlm needs 2.11).
OLDEST_TORCH ?= 2.11.0
# Root of golden cases; empty: tests/golden, and ../shared/golden beside the checkout if present.
GOLDEN ?=
PYTEST := $(BIN)/python -m pytest $(if $(GOLDEN),--golden $(GOLDEN))
export TOKENIZERS_PARALLELISM := false

.PHONY: help demo test lint test-all test-faults test-gpu test-oldest bench docs clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.base  ## train, remember, evaluate, generate: real text, no download, five minutes
	$(BIN)/memlm demo --out $(DEMO_OUT)

test: lint $(VENV)/.dev  ## lint, types, floors and the fast tests
	$(PYTEST)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test-all: lint $(VENV)/.dev  ## every test but those for a GPU
	$(PYTEST) -m 'not gpu'

test-faults: $(VENV)/.dev  ## kills and corruptions in numbers
	$(PYTEST) -m faults

test-gpu: $(VENV)/.dev  ## the tests that need a CUDA device
	$(PYTEST) -m gpu

test-oldest: .venv-oldest/.dev  ## the fast tests on the oldest supported versions
	.venv-oldest/bin/python -m pytest $(if $(GOLDEN),--golden $(GOLDEN))

bench: $(VENV)/.dev  ## every benchmark; results under benchmarks/results
	$(BIN)/python -m benchmarks.run_all

docs: $(VENV)/.docs  ## the documentation site, into site/
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-oldest site build dist $(DEMO_OUT)

# torch first: it decides which build every later package meets.
$(VENV)/.base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.base
	$(PIP) -e '.[docs]'
	@touch $@

.venv-oldest/.dev: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt torch==$(OLDEST_TORCH)
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[test]'
	@touch $@
