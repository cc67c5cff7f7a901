# `make demo`: the main job. `make test`: everything that must hold. Both set themselves up on a bare machine.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test install clean
install: $(VENV)/.installed
$(VENV)/.installed: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[all,dev]'
	touch $@

demo: install
	$(BIN)/duo-run demo/austen

test: export OMP_NUM_THREADS = 1  # processes, not threads, share the cores
test: install
	$(BIN)/nbdev_test --n_workers 2
	$(BIN)/pytest -q tests

clean:
	rm -rf $(VENV)
