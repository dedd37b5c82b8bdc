# make serve [MODEL=path] [ARGS="--workers 4 --port 9000"]   install what is missing, start, Ctrl-C stops
# make test [PYTEST_ARGS="tests/unit"]                       install what tests need, run them
# make observe [ARGS="--listen 9191"]                        Prometheus against the cluster that runs here
# make install [GPU=1]                                       only install (GPU=1: the build for NVIDIA GPUs)
# make lint, make format, make clean

SHELL := /bin/bash
KIND := $(if $(GPU),gpu,cpu)
BIN := .venv/bin

.PHONY: serve observe test install install-test lint format clean

install:
	@ops/install.sh $(KIND)

install-test:
	@ops/install.sh $(KIND) test

serve: install
	@exec $(BIN)/switchyard serve $(if $(MODEL),--model "$(MODEL)") $(ARGS)

observe: install
	@exec $(BIN)/switchyard observe $(ARGS)

test: install-test
	@$(BIN)/python -m pytest $(if $(GPU),,-m "not gpu") $(PYTEST_ARGS)

lint: install-test
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: install-test
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:
	@rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
