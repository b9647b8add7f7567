# Every target does its own set-up and stops at the first error.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SERVE  := .venv-serve
export ORT_DISABLE_TELEMETRY := 1

.PHONY: demo test test-fast test-arm lint docs wheel setup serving plugins plugins-sm70 plugins-cpu

PINNED := -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PINNED) --editable '.[test,docs]'
	touch $@

# What compiles and runs, without what tests need.
$(VENV)/.hf: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python $(PINNED) --editable '.[hf]'
	touch $@

# The Triton server of the tests wants NumPy 1, and its wheel is for Linux on x86-64 only; elsewhere its tests are skipped.
$(SERVE)/.installed: tests/serving/requirements.txt
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --no-deps --requirement $<
	touch $@

setup: $(VENV)/.installed

serving: $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(SERVE)/.installed)

demo: $(VENV)/.hf
	$(BIN)/python -m instantrt.tools.demo build/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(shell find plugins tests tools -name '*.cu' -o -name '*.h' -o -name '*.cpp')

# Two workers, each with half of the tests in their order, until one is done and takes from the other: a module's
# fixtures are made twice only where it is cut. What is dearest is made once for both, tests/once.py.
test: lint docs serving
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -rs

# What a developer runs after each edit.
test-fast: setup
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict --site-dir build/docs

# For this platform where the plugin library is in plugins/lib, for any where it is not. What an earlier build left
# there would be packed.
wheel: setup
	rm -rf build/lib* build/bdist*
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

# The plugin library into the Python package, for `--plugin auto` and for wheels. TENSORRT: folders that hold TensorRT's
# include/, one for each major that is to load it, separated by semicolons.
plugins:
	cmake -S plugins -B build/plugins -G Ninja -DTensorRT_ROOT="$(TENSORRT)"
	cmake --build build/plugins --target instantrt_plugins all
	rm -f plugins/lib/libinstantrt_plugins.* plugins/lib/libinstantrt_register_trt*
	cmake --install build/plugins --prefix plugins/lib

# The same for Volta, whose last compiler is NVRTC 12: pip install .[kernels-sm70]
plugins-sm70:
	cmake -S plugins/sm70 -B build/plugins-sm70 -G Ninja -DTensorRT_ROOT="$(TENSORRT)" -DPYTHON=$(PYTHON)
	cmake --build build/plugins-sm70
	cmake --install build/plugins-sm70 --prefix plugins/lib
	test -e plugins/lib/libinstantrt_plugins_sm70.so

# The operators of x86 artifacts, which need a C++ compiler and cmake.
plugins-cpu:
	cmake -S plugins/cpu -B build/plugins-cpu
	cmake --build build/plugins-cpu
	cmake --install build/plugins-cpu --prefix plugins/lib

# The aarch64 ONNX Runtime under emulation; needs a Debian machine's package sources, installs nothing on it.
.venv-arm/python: tools/arm_setup.sh
	tools/arm_setup.sh .venv-arm

test-arm: setup .venv-arm/python
	ARM_PYTHON=.venv-arm/python $(BIN)/python -m pytest -m arm -rA
