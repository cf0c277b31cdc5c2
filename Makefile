# The two to know: `make demo` and `make test`. Both make the environment first.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo test test-units test-services many optimized serve check lint types openapi atlas bench faults lock clean
.DEFAULT_GOAL := help

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: apt-get install python3 python3-venv"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is too old: Python 3.11 or newer is needed"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 cannot make environments: apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## Start the service, edit a fact over REST, roll it back, stop.
	$(BIN)/errata demo

serve: $(READY)  ## Keep the service up at http://127.0.0.1:8000 (Ctrl-C ends it).
	$(BIN)/errata serve

test: test-units test-services  ## Run the tests; `make -j2 test` takes two cores and half the time.

test-units: $(READY)
	$(BIN)/python -m pytest tests/unit

test-services: $(READY)
	$(BIN)/python -m pytest --ignore tests/unit

many: $(READY)  ## Run what the API promises on PostgreSQL, Redis and S3, as many machines have it.
	$(BIN)/python -m pytest --stack many tests/contract tests/e2e/test_first_way.py

optimized: $(READY)  ## Run the tests with every process under python -O, as PYTHONOPTIMIZE=1 does.
	PYTHONOPTIMIZE=1 $(BIN)/python -m pytest -W "ignore:assertions not in test modules"

check: lint types openapi-check  ## Linter, formatter, types, OpenAPI drift.

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

openapi-check: $(READY)
	$(BIN)/python -m openapi.export --check

openapi: $(READY)  ## Write openapi/openapi.json anew.
	$(BIN)/python -m openapi.export

atlas: $(READY)  ## Train the bundled base again (under 15 minutes on 2 cores).
	$(BIN)/python -m editing.atlas.train

bench: $(READY)  ## Measure everything (hours); figures in bench-*.json.
	$(BIN)/errata bench editing --json bench-editing.json
	$(BIN)/errata bench finetuning --json bench-finetuning.json --plot bench-finetuning.png
	$(BIN)/errata bench load --json bench-load.json
	$(BIN)/errata bench merging --json bench-merging.json
	$(BIN)/errata bench serving --json bench-serving.json --plot bench-serving.png

faults: $(READY)  ## Strike a running service at every point, twenty times each (an hour); faults.json.
	$(BIN)/python -m tests.faults.matrix --json faults.json

lock: $(READY)  ## Pin what is installed now.
	$(BIN)/python -m pip freeze --exclude-editable | sed -E 's/^(torch==[0-9.]+).*/\1/' > requirements.lock

clean:  ## Remove the environment and the service's data.
	rm -rf $(VENV) .errata
