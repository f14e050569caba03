# Two commands: `make demo` and `make test`. Both install what they need into .venv first.
# `make test` leaves out what is slow; `make check`, which CI runs, leaves out nothing.
# `make bench-check` says whether a change made calibration slower.
# `make locked` installs the very versions of requirements-dev.lock, which `make lock` writes anew.
# `make faults` tries what can go wrong, two hours at most.
# Another torch build: make install TORCH="torch --index-url URL".

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV := .venv
# Two processes, a file of tests at a time, each with one thread.
WORKERS ?= --numprocesses 2 --dist loadfile
BIN := $(VENV)/bin

.PHONY: demo test install locked lock check bench-check faults lint types clean

demo: $(VENV)/.runs
	$(BIN)/ghostlayers demo

test: install
	$(BIN)/python -m pytest $(WORKERS) -m "not slow"

install: $(VENV)/.installed

# torch comes first and on its own, so that its build is the one named here.
$(VENV)/.runs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# What the tests need beside it.
$(VENV)/.installed: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

locked:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $(VENV)/.runs $(VENV)/.installed

# Not torch, nor what its builds for a GPU bring.
lock: install
	echo '# By `make lock`, for every system. torch comes first, in the build that fits the machine.' > $@.part
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --quiet \
		--no-header --no-annotate --no-emit-index-url --no-emit-package torch > $@.all
	grep -Ev '^(nvidia|cuda|triton)' $@.all >> $@.part
	mv $@.part requirements-dev.lock && rm $@.all

check: install lint types
	$(BIN)/python -m pytest $(WORKERS) --cov --cov-report=term:skip-covered

bench-check: install
	$(BIN)/python benchmarks/check.py

faults: install
	mkdir -p build
	cd tests && $(abspath $(BIN))/python -m faults --table ../build/faults.md

# The documentation into site/, without a network once this is installed. Commands and settings on
# its pages come from the package itself.
.PHONY: docs
docs: $(VENV)/.documents
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.documents: $(VENV)/.runs
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache
