# Every target creates what it needs by itself: a Rust toolchain and Python 3.11 are all a new machine must have.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## */\t/' | expand -t 14

$(UV):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv

# Development environment with the extension built into it.
$(VENV)/.installed: $(UV) pyproject.toml constraints.txt
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --group dev
	touch $@

.PHONY: build
build: $(VENV)/.installed  ## build the extension into .venv
	$(UV) pip install --quiet --python $(BIN)/python --no-build-isolation --constraint constraints.txt --editable .

.PHONY: test
test: build  ## the tests, Rust and Python
	cargo test --release --quiet
	$(BIN)/pytest -q

.PHONY: check
check: build  ## formatting, lints, types
	cargo fmt --check
	cargo clippy --all-targets --all-features -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest lmd3._lmd3
