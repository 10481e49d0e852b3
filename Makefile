# `make demo` and `make test` are all that a fresh machine needs besides Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH := build/bench

.PHONY: help demo test faults chaos soak bench skew accuracy lint format lock clean

help: ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: $(READY) ## train, stream, predict and catch a drift, in a minute; DATA=folder (and LABEL=column) for your own clips
	@$(BIN)/python -m tests.system.demo $(if $(DATA),"$(DATA)") $(if $(LABEL),--label "$(LABEL)")

test: $(READY) ## run the tests, on SQLite and on a real Apache Kafka
	@$(BIN)/pytest -q -m "not long"

faults: $(READY) ## run the long tests: a fault at every step of a transaction, workers and brokers that are killed
	@$(BIN)/pytest -q -m long

chaos: $(READY) ## kill workers and the broker while 5,000 chunks pass, and compare with a run that nothing happens to
	@$(BIN)/python -m tests.system.chaos

soak: $(READY) ## an hour of stream at full speed: do memory, threads and open files stay flat?
	@$(BIN)/python -m tests.system.soak

skew: $(READY) ## serve ESC-10 differently from training, in the ways that cost accuracy, to a notebook's loop and to the worker
	@$(BIN)/python -m tests.system.skew $(DATA)

bench: $(BENCH)/.ready ## measure speed beside the peers, in an environment of its own; ARGS='--json FILE' or a part, such as forest
	@$(BENCH)/bin/python -m tests.bench $(ARGS)

accuracy: $(READY) ## train on ESC-10 and on notes, and hold the accuracy on unheard clips against marks; DATA=folder with both
	@$(BIN)/python -m tests.system.accuracy $(if $(DATA),"$(DATA)")

lint: $(READY) ## lint, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## format the code and mend what lint can mend
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: ## pin the newest versions that fit pyproject.toml (needs uv)
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
		--group dev pyproject.toml -o requirements.lock
	uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-header \
		--group dev --group bench pyproject.toml -o tests/bench/requirements.lock

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BENCH)/.ready: tests/bench/requirements.lock pyproject.toml
	@$(PYTHON) -m venv $(BENCH)
	@$(BENCH)/bin/pip install --quiet --disable-pip-version-check --require-hashes -r tests/bench/requirements.lock
	@$(BENCH)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "Earshot needs Python 3.11, 3.12 or 3.13; name one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV); this takes a minute, once."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
