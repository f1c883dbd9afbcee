# make demo | test | test-all | test-oldest. PIP_ARGS goes to every pip call, e.g.
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
MODEL = models/SmolLM2-135M-Instruct
IN_VENV = .venv/bin/python
OLDEST = transformers==4.57.1
# A process for each core, but for tests that share a GPU's memory.
IN_PARALLEL = $(shell nvidia-smi > /dev/null 2>&1 || echo "-n auto")

.PHONY: demo test test-all test-oldest lint clean

demo: $(MODEL)/config.json
	$(IN_VENV) example.py

test: $(MODEL)/config.json
	$(IN_VENV) -m pytest -m "not slow" $(IN_PARALLEL)

test-all: $(MODEL)/config.json .venv/eval-installed .venv/ray-installed
	$(IN_VENV) -m pytest $(IN_PARALLEL)

# The fast tests with the oldest transformers that pyproject.toml allows, in an environment of its own.
test-oldest: $(MODEL)/config.json
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet $(PIP_ARGS) "$(OLDEST)" -e ".[demo,test]"
	.venv-oldest/bin/python -m pytest -m "not slow" $(IN_PARALLEL)

lint: .venv/installed
	$(IN_VENV) -m ruff format --check .
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m mypy

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(IN_VENV) -m pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	$(IN_VENV) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[demo,test]"
	touch $@

.venv/eval-installed: .venv/installed
	$(IN_VENV) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[eval]"
	touch $@

.venv/ray-installed: .venv/installed
	$(IN_VENV) -m pip install --quiet $(PIP_ARGS) -c constraints.txt -e ".[ray]"
	touch $@

$(MODEL)/config.json: .venv/installed
	$(IN_VENV) tools/demo_model.py $(MODEL) $(PIP_ARGS)
	touch $@

clean:
	rm -rf .venv .venv-oldest models
