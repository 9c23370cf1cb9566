# Two commands: `make demo` and `make test`. Both set up what they need in .venv; nothing else is installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIPS := .cache/clips
INSTALLED := .cache/installed

.PHONY: setup demo test test-slow test-install lint docs clips weights clean help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:[^#]*## /\t/'

setup: $(STAMP)  ## make .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (set PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: setup      ## run the whole story on the embedded default, about 20 minutes on two cores
	$(BIN)/speechquilt story toy

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint ## lint, types and tests, under 10 minutes on two cores
	$(BIN)/pytest

test-slow: setup ## the checks that take longer
	$(BIN)/pytest -m slow

test-install:    ## install the package alone in an empty environment, then every command's --help
	rm -rf build $(INSTALLED) && $(PYTHON) -m venv $(INSTALLED)
	$(INSTALLED)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt .
	rm -rf build  # an old one would be packed again
	cd $(INSTALLED) && bin/python -P $(CURDIR)/tests/installed.py

docs: setup      ## build the site into docs/_build; a dead link or a missing reference is an error
	$(BIN)/sphinx-build --quiet --builder html --nitpicky --fail-on-warning --keep-going --fresh-env docs docs/_build
	@echo "made     docs/_build/index.html"

clips: $(CLIPS)/transcription ## fetch five LibriVox recordings (Debian's pocketsphinx-testdata) for the tests on human speech

$(CLIPS)/transcription:
	@command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo "apt-get and dpkg-deb are needed (Debian, Ubuntu)"; exit 1; }
	rm -rf $(CLIPS) && mkdir -p $(CLIPS)/package
	cd $(CLIPS)/package && apt-get -q download pocketsphinx-testdata || { echo "apt-get cannot download pocketsphinx-testdata; run 'apt-get update' as root first, and check the network"; exit 1; }
	dpkg-deb -x $(CLIPS)/package/*.deb $(CLIPS)/package
	mv $(CLIPS)/package/usr/share/pocketsphinx/test/data/librivox/* $(CLIPS)/package/usr/share/doc/pocketsphinx-testdata/copyright $(CLIPS)/
	rm -r $(CLIPS)/package

weights: setup   ## fetch real weights (Whisper tiny.en, SmolLM2-135M, Kokoro-82M; about 200 MB) for `make real` and the tests that use them
	$(BIN)/speechquilt weights --out .cache/weights

clean:           ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) docs/_build docs/api .pytest_cache .mypy_cache .ruff_cache .hypothesis
