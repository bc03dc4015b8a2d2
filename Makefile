.DEFAULT_GOAL := help
# Two busy processes with spinning threads slow each other down many times over.
export OMP_WAIT_POLICY = PASSIVE
# ... but threads that sleep at once wake too late for the next small kernel.
export GOMP_SPINCOUNT = 20000
PYTHON ?= python3
# Of pyproject.toml's extras; EXTRAS=dev,ray for hydra/launcher=ray and its test too.
EXTRAS ?= dev
BIN := .venv/bin
# Modules are compiled when they are first imported: compiling all of them takes a minute, and few are used.
INSTALL = $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check -c constraints.txt

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

# The stamp is written last. Without it a .venv was left half-built, and is built anew: pip takes a package whose files
# were cut off in the middle for an installed one. Build tools come from the lock and build isolation is off, so that a
# package that has no wheel is built by the setuptools named there, whatever the venv or pip's cache holds.
setup: .venv/ready  ## build .venv from constraints.txt, once (about 2 minutes and 5 GB)

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "anode_exp needs Python 3.11 or newer, this is %d.%d; try make setup PYTHON=python3.12" % sys.version_info[:2])'
	@if [ -d .venv ] && [ ! -e .venv/ready ]; then echo ".venv is incomplete: building it anew"; rm -rf .venv; fi
	@rm -f .venv/ready
	@echo "setting up .venv; PyTorch with its CUDA libraries is about 2.5 GB to download"
	$(PYTHON) -m venv .venv
	$(INSTALL) setuptools hatchling editables
	$(INSTALL) --no-build-isolation -e '.[$(EXTRAS)]'
	@$(BIN)/python -m anode_exp --version && touch .venv/ready

train: setup  ## train on bundled handwritten digits, no download (a minute or two on 2 cores)
	$(BIN)/python -m anode_exp train experiment=digits

test: setup  ## run the tests; those on real CIFAR need ANODE_DATA
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rs

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: setup  ## resolve constraints.txt anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --extra ray --no-header pyproject.toml -o constraints.txt

.PHONY: help setup train test check lock
