# make demo [DATA=fashion-mnist]   the main job on a fresh machine, with a bundle run in an environment without torch
# make test                        set up and pass the tests
# make check                       format, lint, types and tests
# make docs                        build the documentation into site/

PYTHON ?= python3
DATA ?= digits
VENV := .venv
RUN_VENV := .venv-run
BIN := $(VENV)/bin
# Each on one thread: workers that share cores would wait for one another's threads.
WORKERS ?= 2
BUNDLE := runs/demo-$(DATA)/$(DATA).bundle
# Fashion-MNIST for as many epochs as fit in a few minutes; model_zoo/recipes/fashion-mnist.toml has the full run.
DEMO_fashion-mnist := --epochs 8

.PHONY: demo test check format lint types docs clean

demo: $(VENV)/demo.done
	$(BIN)/cveff train model_zoo/recipes/$(DATA).toml --out runs/demo-$(DATA) $(DEMO_$(DATA)) --overwrite --set deploy.out=$(BUNDLE)
	$(BIN)/python tools/sample_images.py $(DATA) runs/demo-$(DATA)/images
	test -x $(RUN_VENV)/bin/python || $(PYTHON) -m venv $(RUN_VENV)
	$(RUN_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r $(BUNDLE)/requirements.txt
	@echo
	@echo "The bundle in an environment without torch:"
	! $(RUN_VENV)/bin/python -c "import torch" 2>/dev/null
	$(RUN_VENV)/bin/python $(BUNDLE)/run.py runs/demo-$(DATA)/images
	@echo
	@echo "Report: $(BUNDLE)/report.html"

test: $(VENV)/dev.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: lint types test

format: $(VENV)/dev.done
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/dev.done
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/dev.done
	$(BIN)/mypy

docs: $(VENV)/dev.done $(VENV)/docs.done
	$(BIN)/python tools/cli_reference.py --check
	$(BIN)/mkdocs build --strict --quiet

$(BIN)/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'cveff needs Python 3.11 or newer, this is ' + sys.version.split()[0])"
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.done: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[openvino]"
	touch $@

$(VENV)/dev.done: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev,zoo]"
	touch $@ $(VENV)/demo.done

$(VENV)/docs.done: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(RUN_VENV) runs site build dist .mypy_cache .pytest_cache .ruff_cache
