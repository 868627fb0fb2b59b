# make demo | make test | make bench: each makes its own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SANITIZED := build/sanitize
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc cmake python bench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cmake' -o -name '*.py' -o -name '*.pyi')

.PHONY: install demo test bench lint format sanitize test-native test-aarch64 wheel clean

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(PIP_OPTIONS) '.[test]'
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

# The kernels without Python, here and on an emulated 64-bit Arm (Debian: g++-aarch64-linux-gnu,
# qemu-user).
NATIVE_FLAGS := -std=c++17 -O2 -ffp-contract=off -Wall -Wextra -fopenmp -Icsrc -DFASTCELL_ISA=baseline
NATIVE_SOURCES := tests/native/kernels.cpp $(wildcard csrc/cpu/*.cpp)

test-native:
	mkdir -p build
	$(CXX) $(NATIVE_FLAGS) $(NATIVE_SOURCES) -o build/kernels
	build/kernels

test-aarch64:
	mkdir -p build
	aarch64-linux-gnu-g++ -static $(NATIVE_FLAGS) $(NATIVE_SOURCES) -o build/kernels-aarch64
	qemu-aarch64 build/kernels-aarch64

wheel: install
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf build dist $(VENV)
