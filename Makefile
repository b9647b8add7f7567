# `make demo` and `make test` do all their own set-up; both stop at the first error.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
export ORT_DISABLE_TELEMETRY := 1

.PHONY: demo test lint setup

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

setup: $(VENV)/.installed

demo: setup
	$(BIN)/compile examples/tiny-qwen2 --target x86 --quant a16w8 -o build/demo
	$(BIN)/python -m tools.generate build/demo --compare examples/tiny-qwen2 --prompt "Once upon a time"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest
