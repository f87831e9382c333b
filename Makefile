# Everything runs in .venv, which the first target makes from the pinned versions of requirements.lock.
# Needs only Python 3.11 or newer and make. `make help` lists the targets.

BIN = .venv/bin
STAMP = .venv/.installed
WORKERS = 2

help:
	@echo "make quickstart   train and evaluate four methods on a small task (5 minutes on 2 CPU cores)"
	@echo "make test         run the tests;  make test-slow  run the long proofs"
	@echo "make lint         ruff and ty;    make bench      speed and memory on this machine"
	@echo "make env          only make .venv;  make lock  pin again;  make clean  remove caches and .venv"

env: $(STAMP)

# An environment that is already there is kept and brought to the pinned versions. A pyenv or similar shim can be on the
# PATH without a Python behind it, so candidates are run, not looked up.
$(STAMP): pyproject.toml requirements.lock
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    for python in $(PYTHON) python3.12 python3.11 python3 python; do \
	        if $$python -c "import sys, venv; sys.exit(sys.version_info < (3, 11))" >/dev/null 2>&1; then \
	            found=$$python; break; \
	        fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "make: latentjax needs Python 3.11 or newer (with its venv module); tried: $(PYTHON) python3.12" \
	            "python3.11 python3 python. Give one with: make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    echo "making .venv with $$($$found --version)"; \
	    $$found -m venv --clear .venv || exit 1; \
	fi
	@$(BIN)/python -c "import sys; v = sys.version_info; v >= (3, 11) or sys.exit( \
	    f'make: .venv has Python {v[0]}.{v[1]}, latentjax needs 3.11 or newer: remove .venv and run make again')"
	@echo "installing requirements.lock into .venv (the first time this takes one to two minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python -m eval.quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow --timeout 7200

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check

bench: $(STAMP)
	$(BIN)/python -m benchmarks.train_step --method Coconut
	$(BIN)/python -m benchmarks.generate --method Coconut

lock: $(STAMP)
	$(BIN)/uv pip compile --universal --fork-strategy requires-python --extra train --extra hub --extra dev \
	    --quiet --upgrade pyproject.toml -o requirements.lock

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist

.PHONY: help env quickstart test test-slow lint bench lock clean
