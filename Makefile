# Everything that is needed beside this file: Python 3.11 or 3.12, and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two files at a time. A test that hangs ends its process, and with it the run, which then names the test.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder
VENV_VLLM ?= .venv-vllm
INSTALLED_VLLM := $(VENV_VLLM)/.installed
EXTRA_QLORA ?= .qlora
EXTRA_FAMILIES ?= .families
PYTHON_IS_KNOWN = $(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else f"Python 3.11 or 3.12 is needed, {sys.executable} is {v[0]}.{v[1]}; give another with: make PYTHON=python3.12")'

.PHONY: demo test test-all test-vllm test-qlora test-families check format clean help

help:  ## show the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

demo: $(INSTALLED)  ## run the whole pipeline on a toy world: minutes on 2 CPU cores
	$(BIN)/python jobs/full_pipeline.py

test: $(INSTALLED)  ## run the tests: fast ones first, then those that start Ray
	$(PYTEST) -m "not slow"

test-all: test  ## and then those that take minutes each: kills, ZeRO stages, object stores, autoscaling, jobs
	$(PYTEST) -m slow

test-vllm: $(INSTALLED_VLLM)  ## test the vllm engine on vLLM's CPU build, in an environment of its own
	$(VENV_VLLM)/bin/python -m pytest tests/vllm

test-qlora: $(INSTALLED)  ## test training on weights of 4 bits, with bitsandbytes beside the environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(EXTRA_QLORA) 'bitsandbytes==0.50.2'
	PYTHONPATH=$(EXTRA_QLORA) $(BIN)/python -m pytest tests/qlora

test-families: $(INSTALLED)  ## test model families that need torchvision, with it beside the environment
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(EXTRA_FAMILIES) --requirement tests/families/requirements.txt
	cp tests/vllm/torchvision_shim.py $(EXTRA_FAMILIES)/sitecustomize.py
	PYTHONPATH=$(EXTRA_FAMILIES) $(BIN)/python -m pytest tests/families

check: $(INSTALLED)  ## format, lint, types; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(INSTALLED)  ## format the code and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and the runs
	rm -rf $(VENV) $(VENV_VLLM) $(EXTRA_QLORA) $(EXTRA_FAMILIES) runs

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON_IS_KNOWN)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(INSTALLED)

$(INSTALLED_VLLM): pyproject.toml $(wildcard tests/vllm/requirements.txt tests/vllm/torchvision_shim.py)
	@$(PYTHON_IS_KNOWN)
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement tests/vllm/requirements.txt
	$(VENV_VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	cp tests/vllm/torchvision_shim.py "$$($(VENV_VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	echo 'import torchvision_shim' > "$$($(VENV_VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_shim.pth"
	touch $(INSTALLED_VLLM)
