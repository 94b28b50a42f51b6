# Two commands matter: `make repro` and `make test`. Both make the environment they need.
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PROFILE ?= default
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PATH := $(abspath $(BIN)):$(PATH)
export GOMP_SPINCOUNT := 0
export OMP_WAIT_POLICY := PASSIVE
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: install repro test test-slow lint docs bench clean browser

install: $(STAMP)

# torch comes first and by its exact version, so that no other package brings in another build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	$(BIN)/edge-export runtime || echo "no llama.cpp: its tests and packages will be left out"
	touch $(STAMP)

# The whole pipeline; PROFILE is default, smoke (every stage, a few steps) or full (for GPUs).
repro: install
	$(BIN)/python pipeline/profile.py $(PROFILE)
	$(BIN)/dvc repro
	@cat reports/tradeoff/report.md reports/rlhf/report.md

# The page of pref-collect is tested in a real browser, Debian's; without one those tests are skipped by name.
browser:
	@command -v chromium >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
	  || echo "no chromium: the browser tests will be skipped"

test: install lint browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: install
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .types/tuneutils && ln -sfn ../../tools .types/tuneutils/tools && ln -sfn ../../shared .types/tuneutils/shared
	MYPYPATH=.types $(BIN)/mypy -p tuneutils.shared
	$(BIN)/lint-imports

docs: install
	$(BIN)/python -m tuneutils.shared.docs

bench: install
	for script in benchmarks/*.py; do $(BIN)/python $$script || exit 1; done

clean:
	rm -rf artifacts .work .types build *.egg-info
