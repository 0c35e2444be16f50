# Each target sets up what it needs in .venv. PYTHON chooses the interpreter that makes it (3.11 or later).
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo demo-sd3 demo-flux reproduce related test test-long quality docs clean

.venv/installed: requirements.txt requirements-evaluate.txt constraints.txt demo/requirements.txt tests/requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r requirements.txt -r requirements-evaluate.txt -r demo/requirements.txt -r tests/requirements.txt
	touch $@

demo: .venv/installed
	$(BIN)/python demo/demo.py

demo-sd3: .venv/installed
	$(BIN)/python demo/demo.py --family sd3

# FLUX.1, whose tiny base pipeline is trained first: low-rank adapters by train_adt_lora.py.
demo-flux: .venv/installed
	$(BIN)/python demo/demo.py --family flux

# All methods in all worlds, three seeds: three to ten hours on two cores; started again, it goes on where it was.
reproduce: .venv/installed
	$(BIN)/python demo/reproduce.py

# The related systems; from `reproduce`'s starts, where they are there: about seven hours on two cores.
related: .venv/installed
	$(BIN)/python demo/reproduce_related.py

test: .venv/installed
	$(BIN)/python -m pytest -q -n 2 tests

# What `make test` leaves out.
test-long: .venv/installed
	$(BIN)/python -m pytest -q -n 2 -m long tests

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/check_copies.py

# Writes docs/options.md.
docs: .venv/installed
	$(BIN)/python docs/write_options.py

clean:
	rm -rf .venv benchmarks/output demo/output demo/output-sd3 demo/output-flux demo/assets/sd3 demo/assets/flux .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
