# make repro: from a fresh clone to a trained, evaluated, tracked model. make test: the whole test suite.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: install repro test lint ui

install: $(INSTALLED)

repro: $(INSTALLED)
	dvc repro

test: $(INSTALLED)
	python -m pytest

lint: $(INSTALLED)
	ruff check
	ruff format --check
	mypy

ui: $(INSTALLED)
	mlflow ui --backend-store-uri sqlite:///mlflow.db --host 127.0.0.1 --port 5000

# requirements.lock pins every package; pyproject.toml says which of them the project asks for.
$(INSTALLED): pyproject.toml requirements.lock
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	python -m pip install --quiet --upgrade "pip>=25.1"
	python -m pip install --quiet --constraint requirements.lock --editable . --group dev
	touch $@
