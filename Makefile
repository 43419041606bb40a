# Everything runs in a virtual environment that is created on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run dev test bench check

run: .venv/installed  ## the service, on an embedded PostgreSQL unless DB_HOST is set
	@$(BIN)/python setup_db.py run

dev: .venv/installed  ## the same, reloading when the code changes
	@$(BIN)/python setup_db.py dev

test: .venv/installed  ## the tests, on an embedded PostgreSQL unless DB_HOST is set
	$(BIN)/pytest

bench: .venv/installed  ## the figures and the chart of the README
	$(BIN)/python bench.py

check: .venv/installed  ## lint and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt requirements-dev.txt
	@echo Installing the requirements in .venv
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
