# make train        install into .venv and train the quickstart recipe
# make test         install into .venv and run the test suite
# make lint         formatting, lint and types
# make megablocks   add MegaBlocks, for model.channel.backend=megablocks
# make chromium     Debian's, which tests open the reports in
#
# TORCH_INDEX_URL points pip at an index of CPU wheels, PYTHON chooses the interpreter, TEST_PROCESSES says
# how many processes run the tests, of one thread each.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= quickstart
TEST_PROCESSES ?= 2
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/$(VENV)/torch_extensions
AS_ROOT := $(if $(filter-out 0,$(shell id -u)),sudo)
INDEX := $(if $(TORCH_INDEX_URL),--extra-index-url $(TORCH_INDEX_URL))

.PHONY: train test test-slow test-megablocks lint install megablocks chromium clean

train: $(VENV)/installed
	$(BIN)/deepspeed launch/train.py --deepspeed ds_configs/zero2.json --recipe $(RECIPE)

test: $(VENV)/installed-test $(VENV)/installed-megablocks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(TEST_PROCESSES) --dist loadfile
	$(MAKE) test-megablocks

# by itself: Triton decides when it is imported whether its kernels are for the CPU
test-megablocks: $(VENV)/installed-test $(VENV)/installed-megablocks
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/moe/test_megablocks.py

test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

install: $(VENV)/installed

megablocks: $(VENV)/installed-megablocks

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

# --no-deps: it pins an older torch than it runs with. Where its setup.py finds nvcc it compiles kernels
# that current compilers refuse, and sra_ds has stand-ins for them: torch tells it that there is none.
$(VENV)/installed-megablocks: $(VENV)/installed
	mkdir -p $(VENV)/no-nvcc
	echo 'from torch.utils import cpp_extension; cpp_extension.CUDA_HOME = None' > $(VENV)/no-nvcc/sitecustomize.py
	PYTHONPATH=$(CURDIR)/$(VENV)/no-nvcc $(BIN)/pip install $(INDEX) -c constraints.txt --no-build-isolation --no-deps triton stanford-stk megablocks
	touch $@

chromium:
	command -v chromium || { $(AS_ROOT) apt-get update && $(AS_ROOT) apt-get install -y --no-install-recommends chromium; }

clean:
	rm -rf $(VENV) build *.egg-info
