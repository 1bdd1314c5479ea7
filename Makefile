# SPDX-License-Identifier: GPL-2.0-only
# make demo: boot Debian's kernel, as a PV and as a PVH guest.  make test: everything CI runs.  The rest is for people who work on pyxen.

PYTHON  ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
RUNS    ?= 3

.PHONY: all venv demo test guests lint bench stress clean

all: venv

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "pyxen needs Python 3.11 or later"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "hint: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

# Two stamps: running a guest needs less than testing one.
$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	@echo "==> installing pyxen into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "==> installing pyxen and its test tools into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.run

venv: $(VENV)/.dev

demo: $(VENV)/.run
	@$(BIN)/python examples/demo.py

# Guests of our own. Without a compiler their tests are skipped, with the reason.
guests:
	@if ! command -v gcc >/dev/null; then echo "no gcc: guests/ is not built, its tests are skipped"; \
	elif [ -f guests/Makefile ]; then $(MAKE) --no-print-directory -C guests; fi

test: venv guests
	@$(BIN)/python -m pytest

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@PYTHONPATH=src $(BIN)/lint-imports

bench: venv guests
	@for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b --runs $(RUNS) || exit 1; done

# Ten boots of each mode, boots with preemption every 200 us, 200 lives: minutes of CPU time.
stress: venv
	@$(BIN)/python benchmarks/stress.py --boots 10 --cycles 200

clean:
	@rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	@find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	@if [ -f guests/Makefile ]; then $(MAKE) --no-print-directory -C guests clean; fi
