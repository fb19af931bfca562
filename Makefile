# Baton's front door. `make help` lists what is here; scripts/bootstrap.py makes the environment each target needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PORT ?= 8000
MODEL ?= smollm2
ARGS ?=
TRIALS ?= 20
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
PACKAGES := protocol kernels model kvtransfer router engine prefill decode baton bench
SOURCES := $(PACKAGES) examples tests scripts setup.py

.PHONY: help env env-dev serve test test-golden test-clients faults lint check locks check-locks dist bench bench-peers bench-kernels bench-gpu clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  PORT=8000 MODEL=smollm2 ARGS='--prefill 1 --decode 1' go to 'make serve'; ARGS also to test and bench."

env: ## make the environment that serves
	@$(PYTHON) scripts/bootstrap.py

env-dev: ## the same with the tools for tests and checks
	@$(PYTHON) scripts/bootstrap.py --dev

serve: env ## serve MODEL on PORT: router, prefill and decode on this machine
	@exec $(BIN)/baton serve $(MODEL) --port $(PORT) $(ARGS)

test: env-dev ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

test-golden: env-dev ## every golden prompt in every mode and format (a quarter of an hour)
	@$(BIN)/python -m pytest -m matrix tests/e2e/test_golden.py $(ARGS)

test-clients: env-dev ## real clients in environments of their own, made on demand (three minutes on a quiet machine)
	@$(BIN)/python -m tests.clients.heavy $(ARGS)

faults: env-dev ## every fault campaign, one after the other; TRIALS=20 decode kills and the rest in proportion
	@$(BIN)/python -m tests.faults all --trials $(TRIALS) $(ARGS)

lint: env-dev ## formatting, lint rules and types
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy $(SOURCES)

check: lint test ## everything a change must pass

locks: env-dev ## resolve locks/ anew after a change of pyproject.toml (ARGS=--upgrade: to the newest versions)
	@$(BIN)/python scripts/locks.py make $(ARGS)

check-locks: env-dev ## install every lock by a dry run: Python 3.11 to 3.13, torch for CPU and for CUDA
	@$(BIN)/python scripts/locks.py check

dist: env-dev ## build a wheel and an sdist in dist/, native kernels compiled; check that the wheel has them
	@rm -rf dist && mkdir dist
	@echo "building an sdist and a wheel, compiling the native kernels (C++) ..."
	@$(BIN)/python -c "import setuptools.build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')" > $(VENV)/dist.log 2>&1 \
	  || { tail -25 $(VENV)/dist.log; exit 1; }
	@$(BIN)/python -c "import sys, zipfile; names = zipfile.ZipFile(sys.argv[1]).namelist(); \
	  sys.exit(not any('/_native.' in name for name in names) and 'the native kernels were not compiled: $(VENV)/dist.log')" dist/*.whl
	@ls -l dist

bench: env ## measure in under five minutes: a server of its own, or ARGS='--url URL'; writes bench-report/
	@$(BIN)/baton bench small $(ARGS)

bench-peers: env ## measure Baton beside the peers in .peers/ (python -m bench.peers install ...), in turns
	@$(BIN)/python -m bench.peers measure $(ARGS)

bench-kernels: env ## measure each kernel beside its floor
	@$(BIN)/python -m bench.kernels $(ARGS)

bench-gpu: env ## measure the GPU path beside its floors in nine minutes, on one GPU; writes gpu-report/
	@$(BIN)/python -m bench.gpu --out gpu-report $(ARGS)

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find kernels -name '*.so' -delete
