# One target a need; `make help` lists them.
#   PYTHON=python3.12   interpreter that makes the environment (3.10 to 3.12; the first one found that fits)
#   VENV=path           environment to use; an existing one is used as it is, and only completed where packages are missing
#   CONFIG=file         what `make train` runs;  OPTS="KEY VALUE …" overrides its keys
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu   smaller download where there is no NVIDIA card

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv venv-dev sample-data train test lint format check

VENV ?= .venv
CONFIG ?= configs/sample/DeMo_SDTPS.yml
OPTS ?=

FITS := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c '$(FITS)' 2>/dev/null && echo $$p && break; done)
PY := $(VENV)/bin/python

# The run's folder, as the shipped configs name it: where it holds a checkpoint, training goes on from there.
RUN := $(patsubst configs/%.yml,runs/%,$(CONFIG))
RESUME = $(if $(findstring OUTPUT_DIR,$(OPTS)),,$(if $(wildcard $(RUN)/last.pth),TEST.WEIGHT $(RUN)/last.pth))
DATA := $(if $(filter configs/sample/%,$(filter-out configs/sample/vit_%,$(CONFIG))),sample-data)
SAMPLE := $(or $(filter RGBNT100 MSVR310,$(basename $(notdir $(CONFIG)))),RGBNT201)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n '2,5s/^#//p' Makefile

# Bring the environment up to the requirements files $(1); does nothing where they are satisfied already.
define install
	@if [ ! -x "$(PY)" ]; then \
		[ -n "$(PYTHON)" ] && $(PYTHON) -c '$(FITS)' || { \
			echo "error: Python 3.10, 3.11 or 3.12 is needed, and '$(or $(PYTHON),python3)' is not one;" \
				"name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
		echo "Making the environment $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv "$(VENV)" || { \
			echo "error: no environment could be made; on Debian and Ubuntu install python3-venv, remove $(VENV)," \
				"and run again, or use an existing one: make VENV=path" >&2; exit 1; }; \
	fi
	@"$(PY)" -c '$(FITS)' || { echo "error: $(VENV) has $$("$(PY)" -V); Python 3.10, 3.11 or 3.12 is needed" >&2; exit 1; }
	@missing=$$("$(PY)" .ci/missing_requirements.py $(1)) || { \
		echo "Installing into $(VENV):" $$missing; \
		"$(PY)" -m pip install --disable-pip-version-check $(addprefix -r ,$(1)); }
endef

venv: ## make the environment .venv and install what training needs
	$(call install,requirements.txt)

venv-dev: ## the same, with what tests and lint need
	$(call install,requirements.txt requirements-dev.txt)

sample-data: venv
	@[ -d datasets/sample/$(SAMPLE) ] || "$(PY)" -m data.synthetic --out datasets/sample --dataset $(SAMPLE) --preset mini --masks

train: venv $(DATA) ## train CONFIG, by default SDTPS on sample data; goes on where it stopped
	@$(if $(RESUME),echo "Going on from $(RUN)/last.pth. To start anew: remove $(RUN) or give OPTS='OUTPUT_DIR path'",true)
	"$(PY)" train_net.py --config_file $(CONFIG) $(RESUME) $(OPTS)

test: venv-dev ## run the tests (CPU, a few minutes)
	OMP_NUM_THREADS=1 "$(PY)" -m pytest -q -n 2 --dist loadgroup

lint: venv-dev ## ruff and mypy
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .
	"$(PY)" -m mypy

format: venv-dev ## format the code and fix what ruff can fix
	"$(PY)" -m ruff check --fix .
	"$(PY)" -m ruff format .

check: lint test ## everything that has to pass
