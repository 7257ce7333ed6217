# make demo: prune a real model here (MODEL=smollm2, or gemma).   make test: the test suite.   Both make .venv and install what they need.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Test processes: one for each core.
WORKERS ?= $(shell nproc 2> /dev/null || echo 2)

.PHONY: demo test slow-test lint package clean

demo: .venv/.installed
	$(BIN)/python -m barber_jax.eval.demo .demo $(if $(MODEL),--model $(MODEL))

test: .venv/.installed-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope

slow-test: .venv/.installed-test
	$(BIN)/python -m pytest -m slow --numprocesses $(WORKERS) --dist loadscope

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

package: .venv/.installed-test
	$(BIN)/python -m pytest -m slow tests/end_to_end/test_packaging.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

.venv/.installed-test: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[test]'
	touch $@ .venv/.installed

clean:
	rm -rf .venv .demo build *.egg-info
