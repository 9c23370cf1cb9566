# Two commands: `make demo` and `make test`. Both set up what they need in .venv; nothing else is installed by hand.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIPS := .cache/clips
SPEECH := .cache/speech
TEXTS := .cache/texts
INSTALLED := .cache/installed

.PHONY: setup demo real test test-slow test-install lint docs clips speech texts weights clean help

help:            ## this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed 's/:[^#]*## /\t/'

setup: $(STAMP)  ## make .venv with the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed (set PYTHON=...)"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "venv failed; on Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: setup      ## run the whole story on the embedded default, about 25 minutes on two cores
	$(BIN)/speechquilt story toy

real: setup weights texts speech clips ## the story with real weights, speech and text, about three hours on two cores
	$(BIN)/speechquilt story real

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: setup lint ## lint, types and tests, under 10 minutes on two cores
	$(BIN)/pytest -n auto --dist loadfile

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

# $(call unpack,FOLDER,PACKAGES,LIBRARIES OF): Debian packages, with the shared libraries that one of them needs, into FOLDER/package without root.
define unpack
	@command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || { echo "apt-get and dpkg-deb are needed (Debian, Ubuntu)"; exit 1; }
	rm -rf $(1) && mkdir -p $(1)/package
	cd $(1)/package && apt-get -q download $(2) $(if $(3),$$(apt-cache depends $(3) | sed -n 's/.*Depends: \(lib[ar].*\)/\1/p')) || { echo "apt-get cannot download $(2); run 'apt-get update' as root first, and check the network"; exit 1; }
	cd $(1)/package && for package in *.deb; do dpkg-deb -x $$package . && rm $$package || exit 1; done
endef

clips: $(CLIPS)/transcription ## fetch five LibriVox recordings (Debian's pocketsphinx-testdata) for the tests on human speech

$(CLIPS)/transcription:
	$(call unpack,$(CLIPS),pocketsphinx-testdata)
	mv $(CLIPS)/package/usr/share/pocketsphinx/test/data/librivox/* $(CLIPS)/package/usr/share/doc/pocketsphinx-testdata/copyright $(CLIPS)/
	rm -r $(CLIPS)/package

weights: setup   ## fetch real weights (Whisper tiny.en, SmolLM2-135M, Kokoro-82M; about 200 MB) for `make real` and the tests that use them
	$(BIN)/speechquilt weights --out .cache/weights

speech: $(SPEECH)/copyright ## fetch Flite's four English voices (Debian's libflite1), where it is not installed

$(SPEECH)/copyright:
	$(call unpack,$(SPEECH),libflite1,libflite1)
	mv $(SPEECH)/package/usr/lib $(SPEECH)/
	mv $(SPEECH)/package/usr/share/doc/libflite1/copyright $(SPEECH)/
	rm -r $(SPEECH)/package

texts: $(TEXTS)/fortunes/copyright ## fetch English texts (Debian's wordnet-base, bible-kjv-text, fortunes): sentences to speak, and plain text

$(TEXTS)/fortunes/copyright:
	$(call unpack,$(TEXTS),wordnet-base bible-kjv bible-kjv-text fortunes fortunes-min,bible-kjv)
	mv $(TEXTS)/package/usr/share/wordnet $(TEXTS)/ && mv $(TEXTS)/package/usr/share/doc/wordnet-base/copyright $(TEXTS)/wordnet/
	mkdir $(TEXTS)/bible && LD_LIBRARY_PATH=$$(printf %s: $(TEXTS)/package/lib/* $(TEXTS)/package/usr/lib/*) $(TEXTS)/package/usr/bin/bible -f -p $(TEXTS)/package/usr/lib gen1:1-rev22:21 > $(TEXTS)/bible/verses
	mv $(TEXTS)/package/usr/share/doc/bible-kjv-text/copyright $(TEXTS)/bible/
	mv $(TEXTS)/package/usr/share/games/fortunes $(TEXTS)/ && cp $(TEXTS)/package/usr/share/doc/fortunes/copyright $(TEXTS)/fortunes/
	rm -r $(TEXTS)/package

clean:           ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) docs/_build docs/api .pytest_cache .mypy_cache .ruff_cache .hypothesis
