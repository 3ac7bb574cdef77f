# `make test` and `make demo` set everything up on a fresh machine, then do their job.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LOG := build/install.log
PUBLISHED := build/published
KERNELS := megablocks==0.10.0 grouped-gemm==0.3.0 stanford-stk==0.7.1
PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
WORKERS ?= 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore

.PHONY: install test test-all demo tables gpu-check browser wordnet lint format

install: $(INSTALLED)

test: lint $(PUBLISHED) browser wordnet
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: lint $(PUBLISHED) browser wordnet
	$(BIN)/python -m pytest -n $(WORKERS)

# The recipe writes into an empty folder only, so that a second demo starts afresh.
demo: install
	rm -rf runs/tiny
	$(BIN)/python -m examples.echovlm --preset tiny --out runs/tiny

# All arms of the tables, some 25 minutes on two cores, and the tables; called again it goes on with what is there.
tables: install wordnet
	$(BIN)/python -m examples.echovlm.grid --preset grid --stand-in --jobs 2 --out runs/grid
	$(BIN)/python -m examples.echovlm.paper_tables runs/grid -o runs/grid/tables

# Chromium for the tests of the report page, which skip without one.
browser:
	@command -v chromium chromium-browser google-chrome > /dev/null || \
	  (apt-get update && apt-get install -y --no-install-recommends chromium) > build/browser.log 2>&1 || \
	  echo "No Chromium, so the page's tests will skip. The full log: build/browser.log"

# WordNet for METEOR, which is left out of the scores without it, and its tests skip.
wordnet:
	@test -f /usr/share/wordnet/data.noun || \
	  (apt-get update && apt-get install -y --no-install-recommends wordnet-base) > build/wordnet.log 2>&1 || \
	  echo "No WordNet, so METEOR's tests will skip. The full log: build/wordnet.log"

# On a machine with a GPU: both stages at a medium size, then the tests that need one.
gpu-check: install
	$(BIN)/python -m benchmarks.training --name $$(hostname)
	$(BIN)/python -m pytest -m gpu

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

# MegaBlocks as published, for the tests that interpret its kernels. Unpacked, not installed, for installing compiles.
# pip runs its set-up for the metadata; the two variables keep that from looking for a CUDA toolkit and a GPU.
# Where this fails the tests skip, and fail in CI.
$(PUBLISHED): Makefile | $(INSTALLED)
	@rm -rf $@ $@.part && mkdir -p $@.part
	@if CUDA_HOME=/ TORCH_CUDA_ARCH_LIST=9.0 $(BIN)/python -m pip download --no-deps --no-build-isolation \
	   --no-binary :all: --dest $@.part $(KERNELS) > $@.log 2>&1 && \
	   for archive in $@.part/*.tar.gz; do tar -xzf $$archive -C $@.part && rm $$archive || exit 1; done; then \
	  mv $@.part $@ && touch $@; \
	else \
	  echo "No sources of MegaBlocks, so its tests will not run. The full log: $@.log"; \
	fi
