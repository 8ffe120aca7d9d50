# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vsprefill project
#
# `make help` lists the targets. Variables: PYTHON (interpreter for the environment), VENV, PIP_ARGS (extra arguments
# of every pip call), INSTALLER (pip: without uv), VLLM_TARGET (cpu, cuda, auto), WORKERS (processes of `make test`).

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PY := $(VENV)/bin/python

# Passed on through the environment, so that no quoting can go wrong.
export PIP_ARGS INSTALLER VLLM_TARGET PROMPT MODEL
export MAKE_GOAL := $(firstword $(MAKECMDGOALS))

SETUP = $(PYTHON) scripts/setup_env.py --venv $(VENV)

.DEFAULT_GOAL := help
.PHONY: help setup demo test fuzz versions docs lint format bench-cpu eval clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo '  Python 3.11 or newer is needed: PYTHON=/path/to/python3.11'
	@echo '  Where the CPU build of torch is not found: PIP_ARGS="--extra-index-url <PyTorch CPU wheel index>"'

setup:  ## make .venv with vLLM (CPU build, or CUDA where there is a GPU) and this package
	@$(SETUP) --extras demo,test

demo: setup  ## serve the needle model, ask a question about a long text (PROMPT=file MODEL=path-or-id)
	@$(PY) -m examples.demo $${PROMPT:+--prompt "$$PROMPT"} $${MODEL:+--model "$$MODEL"} $(DEMO_ARGS)

test:  ## run the whole test suite (PYTEST_ARGS="-k select -x", WORKERS=0 for one process)
	@$(SETUP) --extras demo,test,train,eval
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(PYTEST_ARGS)

fuzz:  ## random problems for the kernels, in Triton's interpreter (FUZZ_ARGS="--seconds 60 --seed 0")
	@$(SETUP) --extras demo,test,train
	@$(PY) -m tests.kernels.fuzz --tiny --workers $(WORKERS) $(FUZZ_ARGS)

versions:  ## the plugin on the other releases of vLLM that it supports (downloads each)
	@$(SETUP) --extras demo,test,train
	@$(PY) scripts/check_vllm_versions.py

bench-cpu: setup  ## time to first token against the stock CPU backend
	@$(PY) -m benchmarks.cpu_ttft $(BENCH_ARGS)

EVAL_ARGS ?= --lengths 12k --samples 1
eval:  ## sparse against dense prefill on a text, with a model of yours (MODEL=path-or-id EVAL_ARGS="--data book.txt")
	@$(SETUP) --extras demo,test,eval
	@$(PY) -m vllm_vsprefill.cli eval --model "$${MODEL:-examples/needle/model}" \
		--out "build/eval/$(or $(notdir $(MODEL:/=)),needle)" $(EVAL_ARGS)

docs:  ## the pages of docs/ as a site in build/site, their tables written anew
	@$(SETUP) --extras docs
	@$(PY) scripts/make_docs.py
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint:  ## format and lint checks, types, licence headers
	@$(SETUP) --extras dev,demo,test,train,eval
	@status=0; \
	for check in "-m ruff check ." "-m ruff format --check ." "-m reuse lint --quiet" scripts/check_sources.py \
			"scripts/make_docs.py --check" "-m mypy"; do \
		$(PY) $$check || { echo "failed: $$check"; status=1; }; \
	done; \
	exit $$status

format:  ## rewrite sources in the project's format
	@$(SETUP) --extras dev,demo,test,train,eval
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

clean:  ## remove caches and build outputs
	rm -rf build dist *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .triton .coverage
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove the environment as well
	rm -rf $(VENV)
