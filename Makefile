# Every target makes what it needs by itself: a Rust toolchain and Python 3.11 or later are all a new machine must have.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt

.PHONY: help
help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## */\1\t/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: demo
demo: build  ## see lmd3 work: offline, without torch, in two minutes
	$(BIN)/lmd3 demo --force

.PHONY: test
test: build $(VENV)/.neural  ## all tests, Rust and Python
	cargo test --release --quiet
	$(BIN)/pytest -q

.PHONY: check
check: build  ## formatting, lints, types
	cargo fmt --check
	cargo clippy --all-targets --all-features --quiet -- -D warnings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest lmd3._lmd3

.PHONY: bench
bench: build $(VENV)/.bench  ## the benchmarks
	cargo bench
	$(BIN)/python benches/scan.py

.PHONY: claims
claims: $(VENV)/.neural build  ## the paper's three claims on small models, into docs/claims.md; LMD3_DATA names the data
	nice $(BIN)/python -m lmd3.experiments.claims

.PHONY: calibrate
calibrate: build  ## docs/calibration.md: error rates, coverage and power of the tests (half an hour)
	OMP_NUM_THREADS=1 $(BIN)/python -m lmd3.analysis.simulate -o docs/calibration.md

.PHONY: bench-approx
bench-approx: build $(VENV)/.neural  ## approximate densities beside an oracle and rivals
	for part in cells jobs powerlaw published neighbors; do $(BIN)/python benches/approx.py $$part || exit 1; done

.PHONY: wheel
wheel: $(VENV)/.installed  ## a wheel into dist/, for any CPU of this kind and Python 3.11 or later
	rm -rf dist
	env -u RUSTFLAGS $(BIN)/maturin build --release --quiet --out dist
	@ls -l dist

.PHONY: build
build: $(VENV)/.installed  ## the extension into .venv
	@command -v cargo >/dev/null || { echo "cargo not found: install a Rust toolchain (rustup) first"; exit 1; }
	VIRTUAL_ENV=$(VENV) $(BIN)/maturin develop --release --uv --quiet

.PHONY: lock
lock: $(VENV)/.installed  ## the newest versions into constraints.txt
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --group neural --group peers --group bench --universal --python-version 3.11 \
		--upgrade --quiet --no-header --no-annotate --no-emit-index-url --output-file constraints.txt

.PHONY: clean
clean:  ## remove everything that the targets made
	rm -rf $(VENV) target dist lmd3-demo

# uv, because the CUDA build of torch is 5 GB: uv links it from its cache where pip copies it for minutes.
$(BIN)/uv:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or later found: install one, or say make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(VENV)/.installed: $(BIN)/uv pyproject.toml constraints.txt
	$(INSTALL) --requirements pyproject.toml --group dev
	@touch $@

$(VENV)/.neural: $(VENV)/.installed
	$(INSTALL) --group neural --group peers
	@touch $@

$(VENV)/.bench: $(VENV)/.installed
	$(INSTALL) --group bench
	@touch $@
