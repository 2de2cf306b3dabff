# `make help` lists the targets. scripts/install.sh installs, into .venv and .venv-vllm, and only when a lock changed.
# Settings: PYTHON, VENV, LOCK (see scripts/install.sh), HOST, PORT, MODEL (see scripts/run.sh), BENCH, TESTS.

VENV ?= .venv
export VENV
SOURCES := $(wildcard app.py client.py bench tests)

.DEFAULT_GOAL := help
.PHONY: help run test test-clients bench lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+): .*## /  make \1	/' | expand -t 16
	@echo 'Examples: PORT=9000 make run; make run MODEL=gemma3:270m; make test TESTS="tests/test_scripts.py -x"'

run: ## install what is missing, start the server, pull MODEL (smollm2:135m), wait until both are ready
	@scripts/install.sh
	@scripts/run.sh

test: lint ## check formatting, lint and types, then run the tests on all four engines (TESTS selects some)
	@scripts/install.sh --dev --vllm
	$(VENV)/bin/python -m pytest $(TESTS)

test-clients: ## run the official clients of every protocol against a server of their own (TESTS passes arguments)
	@scripts/install.sh
	@scripts/test-clients.sh $(TESTS)

bench: ## measure against the peers and print the table (BENCH passes arguments)
	@scripts/install.sh --dev
	$(VENV)/bin/python bench/bench.py $(BENCH)

lint: ## check formatting, lint and types
	@scripts/install.sh --dev
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy $(SOURCES)

format: ## format the code and apply safe fixes
	@scripts/install.sh --dev
	$(VENV)/bin/python -m ruff format .
	$(VENV)/bin/python -m ruff check --fix .

clean: ## remove caches and build output (.venv and .venv-vllm stay; remove them by hand to start over)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
