# make demo: a teacher and its students on handwritten digits, in two minutes.  make test: the whole test suite.
# Both need Python 3.10 or newer, and make their own environment in .venv.
PYTHON ?= python3
bin := .venv/bin
# models of this size gain nothing from more threads, and lose much where the cores have other work
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

.PHONY: demo test docs site-check install clean dist

demo: install
	$(bin)/fastkd run digits --seeds 8 --device cpu --out runs/demo

# pytest runs in the background and writes to a file, which is shown once the notebooks are done
test: install
	@echo 'Running notebooks and pytest side by side: about 4 minutes on two cores. The notebooks report first, then pytest.'
	@log=$$(mktemp) || exit 1; PYTHONUNBUFFERED=1 $(bin)/pytest -q >"$$log" 2>&1 & pytest=$$!; \
	trap 'kill $$pytest $$tail 2>/dev/null; rm -f "$$log"' EXIT; trap 'exit 130' INT TERM; \
	$(bin)/nbdev-test --n-workers 1 --do-print; notebooks=$$?; \
	[ $$notebooks = 0 ] && echo 'The notebooks passed; pytest:' || echo 'The notebooks FAILED, see above; pytest:'; \
	tail -n +1 -f "$$log" & tail=$$!; wait $$pytest; tests=$$?; sleep 1; \
	[ $$notebooks = 0 ] && [ $$tests = 0 ]

# the site, in _docs/
docs: .venv/docs-installed
	$(bin)/python -W ignore docs/build.py

# a look at every page in Chromium: make site-check SHOTS=FOLDER, which must lie outside of this one
site-check: .venv/docs-installed
	$(bin)/python docs/site_check.py $(if $(SHOTS),"$(SHOTS)")

install: .venv/installed

# a stamp, so that the environment is made once, and again when its description changes
.venv/installed: setup.cfg pyproject.toml
	@echo "Installing into .venv: some minutes and 6 GB, once."
	@$(PYTHON) -c 'import sys; sys.exit("fastkd needs Python 3.10 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3,10) else 0)'
	$(PYTHON) -m venv .venv
	$(bin)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $@

.venv/docs-installed: .venv/installed
	$(bin)/python -m pip install --disable-pip-version-check --quiet -e ".[docs]"
	@touch $@

# what a release uploads, checked: dist/fastkd-VERSION.tar.gz and the wheel that is built from it
dist: install
	$(bin)/python -m pip install --disable-pip-version-check --quiet -e ".[release]"
	rm -rf dist
	$(bin)/python -m build
	$(bin)/python -m twine check --strict dist/*

clean:
	rm -rf .venv runs
