PYTHON ?= python3
# A worker more than processors, since tests of deadlines and processes wait as often as they work; whoever has done
# its share takes from the others'.
PYTEST_WORKERS := $(shell echo $$(($$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1) + 1)))
PYTEST_ARGS ?= -n $(PYTEST_WORKERS) --dist worksteal

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -q
# Each stamp is written last, so an interrupted install is done again.
INSTALLED := $(VENV)/installed
INSTALLED_DEV := $(VENV)/installed-dev
COMPILE := -q --universal --python-version 3.11 --generate-hashes --no-annotate --no-header pyproject.toml

.PHONY: install run demo test prometheus dashboards faults lint bench lock

install: $(INSTALLED)

run: $(INSTALLED)
	$(BIN)/primerisk serve

demo: $(INSTALLED)
	@$(BIN)/primerisk demo

test: lint prometheus
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# Tests of rules and dashboards ask a real one. Its package would start a service: where there is none to be started,
# in a container, nothing comes of that; elsewhere it is left to you, and those tests are skipped.
prometheus:
	@command -v prometheus >/dev/null || { [ "$$(id -u)" = 0 ] && [ ! -d /run/systemd/system ] \
		&& command -v apt-get >/dev/null && apt-get -qq update \
		&& DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends prometheus >/dev/null; } \
		|| echo 'no prometheus: the tests that need it are skipped'

dashboards: $(INSTALLED_DEV)
	$(BIN)/python -m ops.grafana

faults: $(INSTALLED_DEV)
	$(BIN)/python -m tests.faults --kills 200

lint: $(INSTALLED_DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.quote
	$(BIN)/python -m benchmarks.var
	$(BIN)/python -m benchmarks.http
	$(BIN)/python -m benchmarks.account
	$(BIN)/python -m benchmarks.calls
	$(BIN)/python -m benchmarks.netting
	$(BIN)/python -m benchmarks.fleets
	$(BIN)/python -m benchmarks.crowd
	$(BIN)/python -m benchmarks.screen --load
	$(BIN)/python -m benchmarks.stress
	$(BIN)/python -m benchmarks.sizing
	$(BIN)/python -m benchmarks.loans
	$(BIN)/python -m benchmarks.metrics

lock: $(INSTALLED)
	@$(PIP) install uv
	$(BIN)/uv pip compile $(COMPILE) --extra build -o requirements.lock
	$(BIN)/uv pip compile $(COMPILE) --extra build --extra dev -o requirements-dev.lock

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo 'primerisk needs Python 3.11 or newer: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo 'installing what primerisk needs into $(VENV): a minute or two'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --require-hashes -r requirements.lock
	@PYTHONWARNINGS=ignore $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.lock
	@echo 'installing the tools for lint and tests into $(VENV)'
	$(PIP) install --require-hashes -r requirements-dev.lock
	@touch $@
