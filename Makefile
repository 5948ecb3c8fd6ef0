# make generate PROMPT="a red ball moving right"    a video in outputs/
# make test                                         linters, and the tests that take seconds: minutes in all
# make test-slow                                    types, and the tests that take longer: cubins, trainings, large kernels
# make test-long                                    tests that take many minutes each, run by hand
# make test-oldest                                  the model families with the oldest Diffusers that is supported
# make test-diffusers DIFFUSERS=PATH                Diffusers' own tests, of a checkout, with BLADE applied
# make test-report                                  the profiler's report in Debian's Chromium, installed if missing
# make docs                                         the documentation in site/; a link that leads nowhere is an error
# make wheel                                        sdist and wheel in dist/, checked as a package index does
#
# All set up .venv if it is missing. Overridable: PYTHON, VENV, TORCH, WORKERS, and ARGS with further options of
# blade-generate, such as ARGS="--compare --seed 3", or of test-diffusers, such as ARGS="--group models".

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
WORKERS ?= 2
OLDEST ?= diffusers==0.36.0
DIFFUSERS ?=
PROMPT ?= a red ball moving right
ARGS ?=

BIN := $(VENV)/bin
CHROMIUM := /usr/bin/chromium
AS_ROOT := $(if $(filter 0,$(shell id -u)),,sudo)
SOURCES := blade kernels pipelines scripts examples tests setup.py
# PyTorch goes first, so that the package finds it and leaves it as it is.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15

# A misspelled variable would be ignored, and `make generate PROMT=...` make another video.
KNOWN := PYTHON VENV TORCH WORKERS OLDEST DIFFUSERS PROMPT ARGS SHELL MAKE MAKEFLAGS MAKEOVERRIDES
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(filter-out $(KNOWN),$(GIVEN))
ifneq ($(UNKNOWN),)
$(error unknown variable $(UNKNOWN); there are PYTHON, VENV, TORCH, WORKERS, OLDEST, DIFFUSERS, PROMPT and ARGS)
endif

ifeq ($(filter test-diffusers,$(MAKECMDGOALS))-$(DIFFUSERS),test-diffusers-)
$(error name a checkout of Diffusers: make test-diffusers DIFFUSERS=../diffusers)
endif

.PHONY: generate test test-slow test-long test-oldest test-diffusers test-report docs wheel clean

# The prompt travels in the environment, where no character of it means anything to a shell.
generate: export BLADE_PROMPT = $(value PROMPT)
generate: $(VENV)/.installed
	@$(BIN)/blade-generate --prompt="$$BLADE_PROMPT" $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(PYTEST) -m "not slow and not long and not browser"

test-slow: $(VENV)/.installed-dev
	$(BIN)/mypy
	$(PYTEST) -m "slow and not long and not browser"

test-long: $(VENV)/.installed-dev
	$(PYTEST) -m long

test-oldest: $(VENV)-oldest/.oldest
	OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -n $(WORKERS) tests/pipelines tests/blade/attention \
	  tests/blade/students tests/blade/models/test_untrusted.py

# By hand: some twenty minutes of two cores. The table is in outputs/diffusers-tests/.
test-diffusers: $(VENV)/.installed-diffusers-tests
	$(BIN)/python scripts/run_diffusers_tests.py "$(DIFFUSERS)" --workers $(WORKERS) $(ARGS)

test-report: $(VENV)/.installed-browser | $(CHROMIUM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/report

# The variable silences the theme's advertisement of its successor.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel is built from the sdist, so that neither lacks a file.
wheel: $(VENV)/.installed-dev
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

$(CHROMIUM):
	$(AS_ROOT) apt-get update
	$(AS_ROOT) apt-get install --yes --no-install-recommends chromium

$(VENV)-oldest/.oldest: pyproject.toml
	@$(MAKE) VENV=$(VENV)-oldest $(VENV)-oldest/.installed-dev
	$(VENV)-oldest/bin/python -m pip install --disable-pip-version-check "$(OLDEST)"
	# Diffusers 0.36 cannot be imported beside a torchao that PEFT takes
	$(VENV)-oldest/bin/python -m pip uninstall --yes torchao
	@touch $@

$(VENV)/.torch-installed:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'error: Python 3.11 or newer is needed; name one with PYTHON=python3.12, for example'; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(INSTALL) "$(TORCH)"
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch-installed
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.torch-installed
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-browser: pyproject.toml | $(VENV)/.torch-installed
	$(INSTALL) -e ".[dev,browser]"
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

$(VENV)/.installed-diffusers-tests: pyproject.toml | $(VENV)/.torch-installed
	$(INSTALL) -e ".[dev,diffusers-tests]"
	@touch $@ $(VENV)/.installed-dev $(VENV)/.installed

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist site
