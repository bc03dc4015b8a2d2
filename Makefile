.DEFAULT_GOAL := help
# Two busy processes with spinning threads slow each other down many times over.
export OMP_WAIT_POLICY = PASSIVE
# ... but threads that sleep at once wake too late for the next small kernel.
export GOMP_SPINCOUNT = 20000
PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18

# The stamp makes set-up run once, and again when what it installs changes.
setup: .venv/ready  ## build .venv from constraints.txt, once (about a minute and 5 GB)

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv; PyTorch with its CUDA libraries is about 2.5 GB to download"
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "anode_exp needs Python 3.11 or newer, this is %d.%d; try make setup PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch .venv/ready

train: setup  ## train on bundled handwritten digits, no download (about 2 minutes on 2 cores)
	$(BIN)/python -m anode_exp train experiment=digits

test: setup  ## run the tests; those on real CIFAR need ANODE_DATA
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -rs

check: setup  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: setup  ## resolve constraints.txt anew from pyproject.toml
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --universal --python-version 3.11 --extra dev --no-header pyproject.toml -o constraints.txt

.PHONY: help setup train test check lock
