# Each target creates .venv the first time. The line above a target says what it does.
PYTHON ?= python3
RUN ?= cpt-cpu
CONFIG ?=
CORPUS ?=
STORAGE ?=
OVERRIDES ?=
PARAMETERS ?=

SEEN := benchmarks/results/faults.jsonl

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
# A folder of wheels, if there is one: pip reads PIP_FIND_LINKS, uv needs an option.
FIND_LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")

.PHONY: run test test-forms test-faults test-families bench bench-growth bench-start bench-step bench-data bench-replay bench-memory bench-methods bench-forms lint lab setup clean

## run the six notebooks in order: make run [RUN=name CONFIG=recipe CORPUS=corpus OVERRIDES='{key: value}' …]
run: $(READY)
	@$(PY) -m cpt_helpers run --run "$(RUN)" --config "$(CONFIG)" --corpus "$(CORPUS)" \
		--storage "$(STORAGE)" --overrides "$(OVERRIDES)" --parameters "$(PARAMETERS)"

## run all tests; some of them train tiny models
test: $(READY)
	@$(PY) -m pytest

## train with each method (full, freeze, LoRA); export, quantize and serve each model
test-forms: $(READY)
	@$(PY) -m pytest -m forms

## inject faults into trainings (kills, pauses, full disks, damaged files) and write a table of results: 30 minutes
test-faults: $(READY)
	@rm -f $(SEEN)
	@CPT_FAULTS_TABLE="$(SEEN)" $(PY) -m pytest -m faults tests/test_faults.py
	@PYTHONPATH=tests $(PY) -m faults.table "$(SEEN)"

## train each model family with each method, ZeRO stage and number of workers: 20 minutes
test-families: $(READY)
	@$(PY) -m pytest -m families

## compare the training speed with that of the guide's settings, DDP and a plain loop: 25 minutes
bench: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/speed.py

## measure speed and memory by number of workers, model size and block length: 10 minutes
bench-growth: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/growth.py

## measure each part of the time from the launch to the first step: 4 minutes
bench-start: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/start.py

## profile one step with torch's profiler: 3 minutes
bench-step: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/step.py

## measure the duplicates that cleaning finds, its time and its memory, on 10 MB to 1 GB of text
bench-data: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/data.py

## measure the effect of replaying general text, in three trainings of the default: 15 minutes
bench-replay: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/replay.py

## compare the planned memory with the measured memory, in 18 short trainings: 20 minutes
bench-memory: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/memory.py

## measure size, speed and perplexity of quantized models: MODEL=<an exported folder>
bench-forms: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/forms.py $(MODEL)

## compare full, freeze and LoRA training of the default: 15 minutes
bench-methods: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/methods.py

## check style, notebook outputs, the direction of imports, and types
lint: $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/nbstripout --verify --keep-id notebooks/*.ipynb
	@$(VENV)/bin/lint-imports
	@$(VENV)/bin/mypy

## copy the notebooks to the storage and start JupyterLab there
lab: $(READY)
	@$(PY) -m cpt_helpers lab --storage "$(STORAGE)"

setup: $(READY)

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), \
		"this is Python " + sys.version.split()[0] + ", expected 3.11; use make PYTHON=python3.11"'
	@echo "setting up $(VENV): a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check uv==$(shell sed -n 's/^uv==//p' constraints.txt)
	@UV_LINK_MODE=copy $(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) \
		$(FIND_LINKS) -r requirements.txt -c constraints.txt -e .
	@touch $@

## remove .venv and the caches, but not the storage
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
