# make demo: a teacher and its students on handwritten digits, in a minute.  make test: the whole test suite.
# Both need Python 3.10 or newer, and make their own environment in .venv.
PYTHON ?= python3
bin := .venv/bin
# models of this size gain nothing from more threads, and lose much where the cores have other work
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.PHONY: demo test install clean

demo: install
	$(bin)/fastkd run digits --seeds 8 --device cpu --out runs/demo

test: install
	$(bin)/nbdev-test --n-workers 1
	$(bin)/pytest -q

install: .venv/installed

# a stamp, so that the environment is made once, and again when its description changes
.venv/installed: setup.cfg pyproject.toml
	@echo "Installing into .venv: some minutes and 6 GB, once."
	@$(PYTHON) -c 'import sys; sys.exit("fastkd needs Python 3.10 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3,10) else 0)'
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

clean:
	rm -rf .venv runs
