# make train   install into .venv and train the quickstart recipe
# make test    install into .venv and run the test suite
# make lint    formatting, lint and types
#
# TORCH_INDEX_URL points pip at an index of CPU wheels, PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= quickstart
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.PHONY: train test test-slow lint install clean

train: $(VENV)/installed
	$(BIN)/deepspeed launch/train.py --deepspeed ds_configs/zero2.json --recipe $(RECIPE)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/installed

# torch first: left to a dependency's range, pip takes the newest CUDA build
$(VENV)/installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(INDEX) -c constraints.txt torch setuptools wheel numpy ninja
	$(BIN)/pip install $(INDEX) -c constraints.txt --no-build-isolation -e .
	$(BIN)/python -m sra_ds.training.prebuild
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install $(INDEX) -c constraints.txt --no-build-isolation -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
