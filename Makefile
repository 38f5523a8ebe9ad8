# Everything runs from .venv; `make` alone lists the targets.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := cmpolicy envs data eval conf tests

.DEFAULT_GOAL := help
.PHONY: help install demo test test-numpy2 lint types imports unit attack gpu bench install-lerobot test-lerobot clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv with the pinned set (once; again when the pins change)

# A stamp, so that the install is done once and redone when what it depends on changes.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: '$(PYTHON)' was not found; name a Python 3.11 or newer: make install PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: cmpolicy needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) -V 2>&1);" \
			"name another: make install PYTHON=python3.12" >&2; exit 1; }
	@if [ -x $(BIN)/python ] && ! $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then \
		echo "error: $(VENV) holds an older Python; remove it and run make again: rm -r $(VENV)" >&2; exit 1; fi
	@[ -x $(BIN)/pip ] || $(PYTHON) -m venv $(VENV) || { \
		echo "error: could not create $(VENV); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing the pinned set into $(VENV) (2-3 minutes the first time)"
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

# One torch thread: the steps are small, and a second thread costs more than it gives as soon as
# anything else runs. The other core simulates.
demo: install  ## train a one-step policy, score it and film it, in outputs/demo (12 to 20 minutes, 2 cores)
	@OMP_NUM_THREADS=1 $(BIN)/cmpolicy demo

# The steps run in this order and the first failure ends it; pytest's closing line is the last one.
test: install  ## lint, format, types, import contracts and tests (12 minutes, 2 cores)
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory imports
	@$(MAKE) --no-print-directory unit

# numpy 2 and robosuite exclude each other: an environment of its own, on whatever Python is at hand.
NUMPY2 := .venv-numpy2
test-numpy2:  ## the unit tests with numpy 2, without robosuite (PYTHON=python3.12; 15 minutes)
	@[ -x $(NUMPY2)/bin/pip ] || $(PYTHON) -m venv $(NUMPY2)
	@sed -E '/^(numpy|openpi-client)==/d' constraints.txt > $(NUMPY2)/constraints.txt
	@$(NUMPY2)/bin/pip install --quiet --disable-pip-version-check -c $(NUMPY2)/constraints.txt \
		-e '.[serve,export,image,codecs,view,sweep,wandb]' 'numpy>=2' h5py hatchling hypothesis pytest pytest-timeout pytest-xdist
	OMP_NUM_THREADS=1 $(NUMPY2)/bin/python -m pytest -n $(JOBS) --dist loadfile tests/unit $(PYTEST_ARGS)

lint: install  ## ruff: rules and format
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

types: install  ## mypy (strict)
	$(BIN)/mypy

imports: install  ## import-linter: the layers of the architecture
	$(BIN)/lint-imports

# One torch thread per worker: JOBS workers on JOBS cores.
unit: install  ## pytest alone (JOBS=2 workers; PYTEST_ARGS="-k windows" to choose)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist loadfile $(PYTEST_ARGS)

# The attacks of tests/attack a thousand times as long as in the suite.
attack: install  ## attack server, robot loop, stores and bundles at full counts (hours)
	OMP_NUM_THREADS=1 $(BIN)/pytest -s --timeout 0 tests/attack --attack-scale 1000

# lerobot wants another numpy, torch and diffusers than robosuite and we do: never in one environment.
LEROBOT := .venv-lerobot
LEROBOT_WANTS := 'lerobot[async,pusht]==0.4.4' 'zarr>=3.1.5,<4'
install-lerobot:  ## create .venv-lerobot with lerobot 0.4.4 (9 GB with CUDA's packages)
	@[ -x $(LEROBOT)/bin/python ] || $(PYTHON) -m venv $(LEROBOT)
	@$(LEROBOT)/bin/pip install --quiet --disable-pip-version-check $(LEROBOT_WANTS)

test-lerobot: install install-lerobot  ## data sets and the plug-in with lerobot 0.4.4, in .venv-lerobot
	OMP_NUM_THREADS=1 CMPOLICY_LEROBOT_PYTHON=$(abspath $(LEROBOT))/bin/python \
		$(BIN)/pytest tests/integration/test_real_lerobot.py tests/integration/test_lerobot_plugin.py

gpu: install  ## figures of a GPU, its tests, and ten minutes of training on it
	$(BIN)/cmpolicy bench gpu out=outputs/gpu/figures.json
	$(BIN)/pytest -m gpu
	$(BIN)/cmpolicy bench gpu minutes=10 net=small data.augment=[recentre,mirror] out=outputs/gpu/run

bench: install  ## step, latency and rollout times of this machine
	$(BIN)/cmpolicy bench step
	$(BIN)/cmpolicy bench latency policy=pusht
	$(BIN)/cmpolicy bench rollout policy=pusht

clean:  ## remove caches and build products (not .venv, not outputs)
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
