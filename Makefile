# `make demo` and `make test` install everything they need into .venv.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: demo test lint docs bench real-size clean

demo: .venv/installed
	$(BIN)/audio-lens demo

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/python .ci/typecheck.py

docs: .venv/installed
	$(BIN)/python -m mkdocs build --strict

bench: .venv/installed
	$(BIN)/python benchmarks/lens.py
	$(BIN)/python benchmarks/sweeps.py

real-size: .venv/installed
	$(BIN)/python benchmarks/real_size.py

clean:
	rm -rf .venv build dist out *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
