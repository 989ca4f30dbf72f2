# make repro: from a fresh clone to a trained, evaluated, tracked model. make test: the whole test suite.
# make soak: kills and signals at random moments, and files broken at random, by the thousand.
# make check: before a commit. make coverage: the whole suite, and what it reaches.
# make plots: the plots of experiments, side by side. make ui: runs in MLflow.
# make server: MLflow for a team, with passwords, see docs/team.md.
# make bench: beside MMSegmentation, see benchmarks/README.md.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: install repro check quick test soak coverage lint plots ui server bench lock

install: $(INSTALLED)

repro: $(INSTALLED)
	dvc repro

check: $(INSTALLED)
	$(MAKE) --jobs 2 --output-sync lint quick

quick: $(INSTALLED)
	python -m pytest -m "not slow" --durations 5 --durations-min 1

test: $(INSTALLED)
	python -m pytest

# So many kills, signals in each phase on each number of ranks, and broken inputs at each door. SEED
# chooses other moments.
KILLS := 30
SIGNALS := 10
CASES := 2000
SEED := 0
DOORS := images targets outlines prepared params checkpoints spool serving
soak: $(INSTALLED)
	python -m tests.soak.kills --kills $(KILLS) --seed $(SEED)
	python -m tests.soak.signals --signals $(SIGNALS) --seed $(SEED)
	for door in $(DOORS); do python -m tests.fuzz.$$door --cases $(CASES) || exit; done

coverage: $(INSTALLED)
	coverage erase
	coverage run -m pytest
	coverage combine --quiet
	coverage report

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy

# One page without any network; make plots REVS="main blond-boff" names what is shown.
REVS :=
plots: $(INSTALLED)
	dvc plots diff $(or $(REVS),workspace $$(dvc exp list --name-only))

# The link opens the view "Scores" of the first experiment of a store, which is ours if no other was
# made before; any experiment of ours has this view, under "Views".
ui: $(INSTALLED)
	@echo 'runs by their scores: http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning&viewStateShareKey=scores'
	mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

# ARGS are options of `python -m stages.server`, or of `mlflow server`: --host, --port.
ARGS :=
server: $(INSTALLED)
	python -m stages.server $(ARGS)

# PEER is an environment with MMSegmentation; the default is made where it is missing.
PEER := benchmarks/.venv
ROWS :=
bench: $(INSTALLED) $(filter benchmarks/.venv/.installed,$(PEER)/.installed)
	python -m benchmarks.run $(ROWS) --peer $(PEER) $(ARGS)

benchmarks/.venv/.installed: benchmarks/requirements.txt
	test -x benchmarks/.venv/bin/python || $(PYTHON) -m venv benchmarks/.venv
	benchmarks/.venv/bin/python -m pip install --quiet --requirement $<
	touch $@

# requirements.lock pins every package and its hashes, but for torch, torchvision and what they bring
# for CUDA: each platform has its own builds of these, in the index that pip is set to. pip and
# setuptools come first: they build the one package that has no wheel.
$(INSTALLED): pyproject.toml requirements.lock requirements-torch.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	sed -nE '/^(pip|setuptools)==/,/# via/p' requirements.lock > $(VENV)/first.txt
	python -m pip install --quiet --require-hashes --requirement $(VENV)/first.txt
	python -m pip install --quiet --require-hashes --no-deps --no-build-isolation --requirement requirements.lock
	python -m pip install --quiet --requirement requirements-torch.txt
	python -m pip install --quiet --no-deps --no-build-isolation --editable .
	python -m pip check
	touch $@

# After a change of pyproject.toml. It keeps the versions that requirements.lock has;
# `make lock UPGRADE=--upgrade` takes the newest. uv is there after `make install`.
lock:
	uv pip compile --quiet $(UPGRADE) --extra team --group dev \
	    --python-version 3.11 --python-platform linux \
	    --generate-hashes --annotation-style line --custom-compile-command "make lock" \
	    --constraint requirements-torch.txt --no-emit-package torch --no-emit-package torchvision \
	    --output-file requirements.lock pyproject.toml
