# Two commands do everything, set-up included: make demo, make test.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow lint format figures clean

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= output
SEED ?= 0

PY := $(VENV)/bin/python
CONFIG := configs/msg_digits_p2_win7_56.yaml
DIGITS := $(OUTPUT)/digits
TAG := demo_seed$(SEED)
RUN := $(OUTPUT)/msg_digits_p2_win7_56/$(TAG)
LAST = $$(ls -v $(RUN)/ckpt_epoch_*.pth | grep -v _step_ | tail -n 1)

help:
	@echo "make demo       set up, make the digits, train on them, evaluate, draw ($(OUTPUT)/demo_*.png)"
	@echo "make test       set up, lint, and run the tests that take seconds"
	@echo "make test-slow  the tests that take minutes: compilation, the demo, 20 kills, two nodes"
	@echo "make format     put the code into the project's format"
	@echo "make figures    draw the README's figures again"
	@echo "make clean      remove $(OUTPUT) and $(VENV)"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) OUTPUT=$(OUTPUT) SEED=$(SEED)"

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(DIGITS)/made: tools/make_digits.py | $(VENV)/installed
	$(PY) -m tools.make_digits --output $(DIGITS)
	touch $@

# A run under another config is started afresh; an interrupted one goes on.
$(RUN)/trained: $(CONFIG) | $(DIGITS)/made
	if [ $(CONFIG) -nt $(RUN)/config.yaml ]; then rm -rf $(RUN); fi
	$(PY) main.py --cfg $(CONFIG) --data-path $(DIGITS) --output $(OUTPUT) --tag $(TAG) --opts SEED $(SEED)
	touch $@

# The last checkpoint, not the best one, which was chosen on these same images.
$(RUN)/evaluation.txt: $(RUN)/trained
	$(PY) main.py --cfg $(CONFIG) --data-path $(DIGITS) --output $(OUTPUT) --tag $(TAG) --eval --resume $(LAST) | tee $@

$(OUTPUT)/demo_curves_seed$(SEED).png: $(RUN)/trained
	$(PY) -m tools.plot --run $(RUN) --output $@

$(OUTPUT)/demo_predictions_seed$(SEED).png: $(RUN)/trained
	$(PY) -m tools.predict $(DIGITS)/val --limit 48 --cfg $(CONFIG) --resume $(LAST) --output $@ | tail -n 2

demo: $(RUN)/evaluation.txt $(OUTPUT)/demo_curves_seed$(SEED).png $(OUTPUT)/demo_predictions_seed$(SEED).png
	@grep 'Accuracy of the network' $< | sed 's/.*INFO //'
	@echo "Look at $(OUTPUT)/demo_curves_seed$(SEED).png and $(OUTPUT)/demo_predictions_seed$(SEED).png"

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# One thread a process: the tests are small, and two processes share the cores.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not slow' -n 2

test-slow: $(VENV)/installed-dev
	$(PY) -m pytest -m slow

format: $(VENV)/installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

figures: $(VENV)/installed
	$(PY) -m tools.draw_figures --output docs

clean:
	rm -rf $(OUTPUT) $(VENV)
