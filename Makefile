# make demo | make test | make bench: each makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SANITIZED := build/sanitize
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python bench -name '*.h' -o -name '*.cpp' -o -name '*.py' -o -name '*.pyi')

.PHONY: install demo test bench lint format sanitize wheel clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt '.[test]'
	touch $@

demo: install
	$(BIN)/fastcell demo $(ARGS)

test: install lint
	$(BIN)/python -m pytest $(ARGS)

bench: install
	$(BIN)/fastcell bench $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The kernel tests under the address and undefined-behaviour sanitizers.
sanitize: install
	$(BIN)/python tests/sanitize.py $(SANITIZED)

wheel: install
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist $(VENV)
