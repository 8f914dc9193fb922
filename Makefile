# run · test · test-forms · test-faults · test-families · bench · bench-growth · bench-start · bench-step · bench-data · bench-replay · bench-memory · bench-methods · bench-forms · lint · lab: each sets up .venv by itself the first time.
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
# A folder of wheels, where there is one: pip knows PIP_FIND_LINKS by itself, uv has to be told.
FIND_LINKS := $(if $(PIP_FIND_LINKS),--find-links "$(PIP_FIND_LINKS)")

.PHONY: run test test-forms test-faults test-families bench bench-growth bench-start bench-step bench-data bench-replay bench-memory bench-methods bench-forms lint lab setup clean

## all six notebooks in order: make run [RUN=name CONFIG=recipe CORPUS=corpus OVERRIDES='{key: value}' …]
run: $(READY)
	@$(PY) -m cpt_helpers run --run "$(RUN)" --config "$(CONFIG)" --corpus "$(CORPUS)" \
		--storage "$(STORAGE)" --overrides "$(OVERRIDES)" --parameters "$(PARAMETERS)"

## every test, real trainings included
test: $(READY)
	@$(PY) -m pytest

## every form of export, quantized and served; full, freeze and LoRA trained for it
test-forms: $(READY)
	@$(PY) -m pytest -m forms

## trainings that are killed, stopped, starved and damaged: half an hour, and its table
test-faults: $(READY)
	@rm -f $(SEEN)
	@CPT_FAULTS_TABLE="$(SEEN)" $(PY) -m pytest -m faults tests/test_faults.py
	@PYTHONPATH=tests $(PY) -m faults.table "$(SEEN)"

## every family of models by every method, ZeRO stage and number of workers: twenty minutes
test-families: $(READY)
	@$(PY) -m pytest -m families

## how fast, beside the guide's settings, DDP and a plain loop: twenty-five minutes
bench: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/speed.py

## how speed and memory grow with workers, parameters, block length: ten minutes
bench-growth: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/growth.py

## where the time from the launch call to the first step goes: four minutes
bench-start: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/start.py

## where a step's time goes, by torch's profiler: three minutes
bench-step: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/step.py

## does cleaning find what was planted, in bounded memory and time? 10 MB, 100 MB, 1 GB
bench-data: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/data.py

## what replaying general text costs and keeps: three trainings of the default, a quarter of an hour
bench-replay: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/replay.py

## the plan's memory against what processes show: eighteen short trainings, twenty minutes
bench-memory: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/memory.py

## what quantizing costs and brings: make bench-forms MODEL=<an exported folder>
bench-forms: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/forms.py $(MODEL)

## all weights, the last layers, or adapters: three trainings of the default, a quarter of an hour
bench-methods: $(READY)
	@PYTHONPATH=. $(PY) benchmarks/methods.py

## style, and notebooks without outputs
lint: $(READY)
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/nbstripout --verify --keep-id notebooks/*.ipynb

## JupyterLab on this machine, with copies of the notebooks on the storage: the checkout stays clean
lab: $(READY)
	@$(PY) -m cpt_helpers.lab "$(STORAGE)"

setup: $(READY)

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), \
		"Python 3.11 is needed, this is " + sys.version.split()[0] + "; say make PYTHON=python3.11"'
	@echo "setting up $(VENV): a few minutes, once"
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check uv==$(shell sed -n 's/^uv==//p' constraints.txt)
	@UV_LINK_MODE=copy $(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) \
		$(FIND_LINKS) -r requirements.txt -c constraints.txt -e .
	@touch $@

## what can be made again; never the storage
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
