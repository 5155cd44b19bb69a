# Needs Python 3.11 and make. Everything else is installed into .venv, at the versions in constraints.txt; for the tests
# with Axolotl, which pins other versions, into .venv-axolotl, at those in constraints-axolotl.txt.

# Another interpreter: make PYTHON=/path/to/python3.11
PYTHON ?= $(shell for p in python3.11 python3; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
AXOLOTL := .venv-axolotl
AXOLOTL_STAMP := $(AXOLOTL)/.installed
# Passed on to pytest: make test PYTEST_ARGS="-x -k gate"
PYTEST_ARGS ?=
AXOLOTL_ARGS ?=
# beside Axolotl's own tests, some of the callback's, with the versions of transformers and TRL that Axolotl pins
AXOLOTL_TESTS ?= tests/axolotl tests/hf/test_settings.py tests/hf/test_trl_cli.py::test_a_resume_goes_on \
  tests/hf/test_gradients.py::test_sft_gradients_are_those_of_the_weighted_loss
AXOLOTL_COMPAT := $(addprefix tests/hf/test_,gradients.py peft.py setup.py trl_cli.py)
# Tests run in so many processes of one thread each; their models are too small for a second thread to help.
WORKERS ?= 2
# Which tests, beside those that the two above name
SELECTED ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Nothing here needs the network or a GPU once the environment is built.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# threads that wait go to sleep: spinning ones bring a busy machine of few cores nearly to a halt
export OMP_WAIT_POLICY ?= passive
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# pip is told not to byte-compile (that halves the installation); Python does so at the first import, if it may.
unexport PYTHONDONTWRITEBYTECODE

MAKEFLAGS += --no-builtin-rules
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help env demo test pytest axolotl check lint types imports docs bench compat clean distclean

# Makes targets one after the other, goes on after one that fails, and says the results of all at the end.
define each
@failed=0; results=; for target in $(1); do \
  if $(MAKE) --no-print-directory $$target; then result=passed; else result=FAILED; failed=1; fi; \
  results="$$results  $$target: $$result"; done; echo "make $@:$$results"; exit $$failed
endef

help: ## list the targets
	@sed -n 's/^\([a-z]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | while IFS="$$(printf '\t')" read -r t d; do \
	  printf '  make %-10s %s\n' "$$t" "$$d"; done

env: $(STAMP) ## build .venv (the other targets do so when they need it)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
	  echo "Python 3.11 was not found (looked for python3.11 and python3). Try: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@echo "Installing into $(VENV); the first time takes a minute or two."
	$(BIN)/python -m pip install -qq --no-input --no-compile -c constraints.txt -e ".[trl,audit,demo,dev,docs]"
	@touch $@

demo: $(STAMP) ## a fine-tuning run on poisoned data, with and without the defence
	$(BIN)/python -m examples.demo

test: $(STAMP) ## tests and doctests, without the slow ones; without PYTEST_ARGS also those with Axolotl
	$(call each,pytest $(if $(strip $(PYTEST_ARGS)),,axolotl))

pytest: $(STAMP) ## tests and doctests, without those with Axolotl
	$(PYTEST) $(SELECTED) $(PYTEST_ARGS)

$(AXOLOTL_STAMP): pyproject.toml constraints-axolotl.txt
	@test -x $(AXOLOTL)/bin/python || test -n "$(PYTHON)" || { echo "Python 3.11 was not found" >&2; exit 1; }
	@test -x $(AXOLOTL)/bin/python || "$(PYTHON)" -m venv $(AXOLOTL)
	@echo "Installing Axolotl and what it pins into $(AXOLOTL); the first time takes a few minutes."
	$(AXOLOTL)/bin/python -m pip install -qq --no-input --no-compile -c constraints-axolotl.txt -e ".[axolotl]" \
	  pytest pytest-timeout
	@touch $@

axolotl: $(AXOLOTL_STAMP) ## tests with Axolotl and the versions that it pins, in .venv-axolotl
	CUDA_VISIBLE_DEVICES= AXOLOTL_DO_NOT_TRACK=1 $(AXOLOTL)/bin/python -m pytest -p no:anyio $(SELECTED) $(AXOLOTL_ARGS) $(AXOLOTL_TESTS)

check: export SELECTED := -m "slow_sample or not slow"
check: $(STAMP) ## all that a change must pass: the four below, then the tests with a sample of the slow ones
	$(call each,lint types imports docs pytest axolotl)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## pyright
	$(BIN)/pyright

imports: $(STAMP) ## import-linter: which package may import which, and the layers of the core
	$(BIN)/lint-imports --no-logo

docs: $(STAMP) ## the documentation, into docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

bench: $(STAMP) ## what the gate costs per step
	$(BIN)/python bench/overhead.py

compat: $(STAMP) ## the table of docs/compatibility.md, from tests that run now; takes half an hour
	$(BIN)/python -m pytest -m "slow or not slow" --compat tests/hf
	@$(MAKE) axolotl AXOLOTL_ARGS='--compat -m "slow or not slow"' AXOLOTL_TESTS="tests/axolotl $(AXOLOTL_COMPAT)"
	$(BIN)/python -m tests.compat

clean: ## remove what builds and tests leave behind
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path './.venv*' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## remove the environments as well
	rm -rf $(VENV) $(AXOLOTL)
