# One word for everything one does here. `make` alone lists the words.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

BIN := .venv/bin
SOURCES := orchestration assets evaluation ml infra benchmarks
PYTEST := $(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile

# Dagster keeps its instance in this folder (dagster.yaml), and no tool reports home.
export DAGSTER_HOME := $(CURDIR)
export DO_NOT_TRACK := 1
export DAGSTER_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DVC_NO_ANALYTICS := 1
export GX_ANALYTICS_ENABLED := false
export SKYPILOT_DISABLE_USAGE_COLLECTION := 1
export GRADIO_ANALYTICS_ENABLED := False
export RAY_USAGE_STATS_ENABLED := 0
export DAFT_ANALYTICS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false

# uv trusts the certificates that this system trusts, as pip does.
export UV_SYSTEM_CERTS ?= true

.PHONY: help setup setup-vbench demo ui test test-quick test-all lint format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv from environments/main.txt (1 to 3 minutes; at once when nothing changed)
	@environments/setup.sh

setup-vbench: setup ## Make .venv-vbench, the environment that VBench is scored in
	@$(BIN)/python -m evaluation.vbench_environment

demo: setup setup-vbench ## Walk the whole house on this machine: footage to released model and bill
	@$(BIN)/opensora demo

ui: setup ## Start Dagster and MLflow, print their addresses, stop both on Ctrl-C
	@$(BIN)/opensora ui

test: setup setup-vbench ## Run every test but those that need a GPU or a Slurm cluster
	@echo 'Not run: tests that need hardware. With a CUDA device: $(BIN)/pytest -m gpu; with a Slurm cluster: $(BIN)/pytest -m slurm'
	@$(PYTEST)

test-quick: setup ## Run the tests that take less than 20 s each
	@$(PYTEST) -m 'not slow and not gpu and not slurm'

test-all: setup setup-vbench ## Run every test, those that need a GPU and a Slurm cluster too
	@$(PYTEST) -m ''

lint: setup ## Check style, types, floors and that the definitions load
	@$(BIN)/ruff check $(SOURCES) tests
	@$(BIN)/ruff format --check $(SOURCES) tests
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/dg check defs

format: setup ## Rewrite the sources in the house's style
	@$(BIN)/ruff check --fix $(SOURCES) tests
	@$(BIN)/ruff format $(SOURCES) tests

clean: ## Remove both environments and the tools' caches; workspace and Dagster's history stay
	rm -rf .venv .venv-vbench .mypy_cache .ruff_cache .pytest_cache .import_linter_cache dist
