# Each target sets up what it needs in .venv. PYTHON chooses the interpreter that makes it (3.11 or later).
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test quality clean

.venv/installed: requirements.txt constraints.txt demo/requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r requirements.txt -r demo/requirements.txt -r tests/requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python demo/demo.py

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 tests

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv demo/output .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
