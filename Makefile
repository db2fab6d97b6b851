# `make run` trains the default recipe; `make test` runs the tests. Each sets itself up on a fresh machine.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIBS := $(VENV)/.libs

.PHONY: run test lint demo bench clean help

help:
	@echo "make run    train the default recipe on text that is on this machine (about 4 minutes)"
	@echo "make demo   the same run with faults, bare and guarded"
	@echo "make test   run the tests"
	@echo "make lint   ruff and mypy"

run: $(READY)
	$(BIN)/poise train

demo: $(READY)
	$(BIN)/poise demo

test: $(LIBS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first and alone: a plain `torch` pulled in by another package would be the newest build for GPUs.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "poise needs Python 3.11 or newer; run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,dev]'
	@touch $(READY)

# Other people's trainers and data tools, for the tests that work with them; without them those tests are skipped.
$(LIBS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[integrations,fast,hf,warc,language,datatrove]'
	@touch $(LIBS)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache build dist
