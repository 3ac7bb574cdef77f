# `make test` and `make demo` set everything up on a fresh machine, then do their job.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOG := build/install.log
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: install test test-all demo lint format

install: $(INSTALLED)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS)

# The recipe writes into an empty folder only, so that a second demo starts afresh.
demo: install
	rm -rf runs/tiny
	$(BIN)/python -m examples.echovlm --preset tiny --out runs/tiny

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

format: install
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# Runs once, and again when the dependencies change; a virtual environment that works is kept.
$(INSTALLED): pyproject.toml constraints.txt
	@python=$$(for name in $(PYTHON); do \
	  $$name -c '$(RECENT)' 2>/dev/null && echo $$name && break; \
	done); \
	if [ -z "$$python" ]; then \
	  echo "moe-adapter needs Python 3.11 or newer, found none as: $(PYTHON) (name one: make PYTHON=...)"; exit 1; \
	fi >&2; \
	mkdir -p $(dir $(LOG)); \
	echo "Installing into $(VENV): minutes the first time (log: $(LOG))"; \
	if ! { $(BIN)/python -c 'import pip; $(RECENT)' || $$python -m venv --clear $(VENV); } > $(LOG) 2>&1 || \
	   ! $(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]' >> $(LOG) 2>&1; then \
	  echo "Install failed: it needs a network, 7 GB of disk and the venv module. The full log: $(LOG)"; exit 1; \
	fi >&2
	@touch $@
