# Every target makes the virtual environment when it is missing. It needs Python >= 3.11, make and git.
# To use an environment of your own, install into it once (pip install -e '.[dev]' -c constraints.txt)
# and name it: `make test VENV=path/to/env`.

VENV   ?= .venv
PRESET ?= tiny
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	"$$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

# An environment that the reader brought is used as it is; ours is kept in step with the declared dependencies.
ifeq ($(origin VENV),file)
READY := $(STAMP)
else
READY := $(if $(wildcard $(BIN)/llama2),,$(STAMP))
endif

.DEFAULT_GOAL := help
.PHONY: help setup run chat test test-full bench lab docs readme clean distclean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## make the virtual environment (the other targets do it when needed)

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt
	@test -x $(BIN)/python || test -n "$(PYTHON)" || { \
	  echo "No Python 3.11 or newer with venv was found. Install one (Debian/Ubuntu: python3 and python3-venv) or give PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the dependencies (once; this takes some minutes)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $(STAMP)

run: $(READY)  ## train the small Llama 2-Chat from raw text to a chat model, then write its report
	@$(BIN)/llama2 run --preset $(PRESET) </dev/null

chat: $(READY)  ## talk to the model that `make run` trained
	@$(BIN)/llama2 chat --preset $(PRESET)

test: $(READY)  ## export in sync, notebooks clean, every notebook executed, pytest
	@$(BIN)/python tools/run_tests.py </dev/null

test-full: $(READY)  ## the same with the slow tests
	@$(BIN)/python tools/run_tests.py --slow </dev/null

bench: $(READY)  ## measure speed side by side with other libraries
	@$(BIN)/python -m benchmarks

lab: $(READY)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab nbs/index.ipynb

docs: $(READY)  ## build the web site of the notebooks in _docs/
	@$(BIN)/python tools/build_site.py </dev/null

readme: $(READY)  ## run the front page afresh and write README.md from it
	@$(BIN)/python tools/make_readme.py

clean:  ## remove the site, builds and caches (trained models stay)
	rm -rf _docs _proc .quarto build dist *.egg-info .pytest_cache .hypothesis
	find llama2_nbdev nbs tests tools -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	find nbs -name .ipynb_checkpoints -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean  ## remove the trained models and the virtual environment as well
	rm -rf runs .venv
