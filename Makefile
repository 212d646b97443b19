# Two commands do everything, installation included: make demo, make test.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo demo-detection app test test-slow test-timm test-versions rehearsal growth speedrun lint format docs site clean

PYTHON ?= python3
VENV ?= .venv
OUTPUT ?= output
SEED ?= 0
RESUME ?=
REQUEUES ?= 0
IMAGENETTE ?=

PY := $(VENV)/bin/python
CONFIG := configs/msg_digits_p2_win7_56.yaml
DIGITS := $(OUTPUT)/digits
TAG := demo_seed$(SEED)
RUN := $(OUTPUT)/msg_digits_p2_win7_56/$(TAG)
LAST = $$(ls -v $(dir $<)ckpt_epoch_*.pth | grep -v _step_ | tail -n 1)

STORED := msg_transformer_nano
PHOTOGRAPHS := docs/photographs

GROWING := $(patsubst %,configs/msg_%_p4_win7_224.yaml,tiny small base)
PEER := swin_tiny_patch4_window7_224
DETECTION_CONFIG := detection/configs/digits.yaml
DIGITS_COCO := $(OUTPUT)/digits_coco
DETECTION_RUN := $(OUTPUT)/cascade_mask_rcnn_msg_digits/$(TAG)
DETECTION := $(PY) -m detection.main --cfg $(DETECTION_CONFIG) --data-path $(DIGITS_COCO) --output $(OUTPUT) --tag $(TAG)

help:
	@echo "make demo            install, train on handwritten digits, evaluate, draw ($(OUTPUT)/demo_*.png)"
	@echo "make demo-detection  the same with a detector, on digits pasted on photographs"
	@echo "make app             a web page that shows what the network looks at (RESUME=<checkpoint>: another one)"
	@echo "make test            install, lint, and run the tests that take seconds"
	@echo "make test-slow       the tests that take minutes: compilation, demos, ten kills, two nodes"
	@echo "make test-timm       timm's own tests of a network, from its source archive, on ours"
	@echo "make test-versions   the network's tests with the oldest and newest torch, timm and NumPy that are allowed"
	@echo "make rehearsal       kill and resume a run of 300 epochs 30 times, and compare it with an uninterrupted one"
	@echo "make growth          how time and memory grow with the image and the batch: $(OUTPUT)/growth_*.md and .png"
	@echo "make speedrun        time from scratch to 80 % on Imagenette (IMAGENETTE=<folder>: the images at 112 px)"
	@echo "make format          format the code"
	@echo "make docs            draw the figures and write docs/configuration.md and docs/command_line.md"
	@echo "make site            build the documentation site: open $(OUTPUT)/site/index.html"
	@echo "make clean           remove $(OUTPUT) and $(VENV)"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) OUTPUT=$(OUTPUT) SEED=$(SEED)"

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-export.txt requirements-app.txt requirements-docs.txt \
		requirements-trackers.txt $(VENV)/installed
	$(PY) -m pip install --quiet -r requirements-dev.txt
	touch $@

$(DIGITS)/made: tools/make_digits.py data/digits.py | $(VENV)/installed
	$(PY) -m tools.make_digits --output $(DIGITS)
	touch $@

# A changed config starts a new run; an interrupted run resumes.
$(RUN)/trained: $(CONFIG) | $(DIGITS)/made
	if [ $(CONFIG) -nt $(RUN)/config.yaml ]; then rm -rf $(RUN); fi
	$(PY) main.py --cfg $(CONFIG) --data-path $(DIGITS) --output $(OUTPUT) --tag $(TAG) --opts SEED $(SEED)
	touch $@

# The last checkpoint, not the best one, which was selected on these same images.
$(RUN)/evaluation.txt: $(RUN)/trained
	$(PY) main.py --cfg $(CONFIG) --data-path $(DIGITS) --output $(OUTPUT) --tag $(TAG) --eval --resume $(LAST) | tee $@

$(OUTPUT)/demo_curves_seed$(SEED).png: $(RUN)/trained
	$(PY) -m tools.plot --run $(RUN) --output $@

$(OUTPUT)/demo_predictions_seed$(SEED).png: $(RUN)/trained
	$(PY) -m tools.predict $(DIGITS)/val --limit 48 --resume $(LAST) --output $@ > /dev/null

$(OUTPUT)/demo_photographs.txt: models/weights/$(STORED).safetensors $(wildcard $(PHOTOGRAPHS)/*/*.jpg) | $(VENV)/installed
	mkdir -p $(@D)
	$(PY) -m tools.predict $(PHOTOGRAPHS) --words --weights $(STORED) > $@

$(OUTPUT)/demo_photographs.png: models/weights/$(STORED).safetensors $(wildcard $(PHOTOGRAPHS)/*/*.jpg) | $(VENV)/installed
	$(PY) -m tools.visualize.gallery $(PHOTOGRAPHS) --weights $(STORED) --output $@ > /dev/null

demo: $(RUN)/evaluation.txt $(OUTPUT)/demo_curves_seed$(SEED).png $(OUTPUT)/demo_predictions_seed$(SEED).png \
		$(OUTPUT)/demo_photographs.txt $(OUTPUT)/demo_photographs.png
	@grep 'Accuracy of the network' $< | sed 's/.*INFO //'
	@echo "$(STORED) knows ten classes. Photographs in folders n... show one of them, those in other/ do not. Its guesses:"
	@sed 's|$(PHOTOGRAPHS)/||' $(OUTPUT)/demo_photographs.txt
	@echo "Look at $(OUTPUT)/demo_curves_seed$(SEED).png, $(OUTPUT)/demo_predictions_seed$(SEED).png and $(OUTPUT)/demo_photographs.png"

$(VENV)/installed-app: requirements-app.txt $(VENV)/installed
	$(PY) -m pip install --quiet -r requirements-app.txt
	touch $@

app: $(VENV)/installed-app
	$(PY) -m tools.app $(if $(RESUME),--resume $(RESUME),--weights $(STORED) --examples $(PHOTOGRAPHS))

lint: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(DIGITS_COCO)/made: detection/tools/make_digits_coco.py data/digits.py | $(VENV)/installed
	$(PY) -m detection.tools.make_digits_coco --output $(DIGITS_COCO)
	touch $@

$(DETECTION_RUN)/trained: $(DETECTION_CONFIG) | $(DIGITS_COCO)/made
	if [ $(DETECTION_CONFIG) -nt $(DETECTION_RUN)/config.yaml ]; then rm -rf $(DETECTION_RUN); fi
	$(DETECTION) --opts SEED $(SEED)
	touch $@

$(DETECTION_RUN)/evaluation.txt: $(DETECTION_RUN)/trained
	$(DETECTION) --eval --resume $(LAST) | tee $@

$(OUTPUT)/demo_detections_seed$(SEED)/drawn: $(DETECTION_RUN)/trained
	$(PY) -m detection.tools.predict $(DIGITS_COCO)/val --limit 12 --resume $(LAST) --output $(@D)
	touch $@

$(OUTPUT)/demo_detection_curves_seed$(SEED).png: $(DETECTION_RUN)/trained
	$(PY) -m tools.plot --run $(DETECTION_RUN) --output $@

demo-detection: $(DETECTION_RUN)/evaluation.txt $(OUTPUT)/demo_detections_seed$(SEED)/drawn \
		$(OUTPUT)/demo_detection_curves_seed$(SEED).png
	@grep '^|' $<
	@echo "Look at $(OUTPUT)/demo_detection_curves_seed$(SEED).png and at the pictures in $(OUTPUT)/demo_detections_seed$(SEED)"

# One thread per process: the tests are small, and two processes share the cores. Each has half of the files, so that
# what the tests of a file share is made once; who is done first takes over from the other.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not slow' -n 2 --dist worksteal

test-slow: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -n 2 --dist worksteal

$(OUTPUT)/timm/downloaded: requirements.txt | $(VENV)/installed-dev
	rm -rf $(@D) && mkdir -p $(@D)
	$(PY) -m pip download --quiet --no-deps --no-binary timm --dest $(@D) $$(grep '^timm==' $<)
	tar -xzf $(@D)/timm-*.tar.gz -C $(@D) --strip-components=1 --wildcards '*/tests/test_models.py' '*/pyproject.toml'
	touch $@

test-timm: $(OUTPUT)/timm/downloaded
	OMP_NUM_THREADS=1 $(PY) -m pytest -c $(<D)/pyproject.toml -p tests.helpers.timm_plugin -n 2 -rx $(<D)/tests/test_models.py

# The network's tests with the oldest and the newest versions that pyproject.toml allows; torchvision is torch's.
OLDEST := torch==2.10.0 torchvision==0.25.0 timm==1.0.27 numpy==2.0.2
NEWEST := 'torch<3' torchvision 'timm<2' numpy

$(OUTPUT)/versions/oldest/installed: VERSIONS := $(OLDEST)
$(OUTPUT)/versions/newest/installed: VERSIONS := $(NEWEST)
$(OUTPUT)/versions/%/installed: Makefile requirements.txt
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	grep -vE '^(torch|torchvision|timm|numpy)==' requirements.txt > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet -r $(@D)/requirements.txt $(VERSIONS) \
		$$(grep -hoE '^(pytest|onnx)[^ ]*' requirements-dev.txt requirements-export.txt)
	touch $@

test-versions: $(OUTPUT)/versions/oldest/installed $(OUTPUT)/versions/newest/installed
	for installed in $^; do \
		OMP_NUM_THREADS=1 $${installed%/installed}/bin/python -m pytest -m 'not slow' -n 2 tests/models; done

$(OUTPUT)/names/made: tools/rehearsal/names.py | $(VENV)/installed
	rm -rf $(@D)
	$(PY) -m tools.rehearsal.names --output $(@D)
	touch $@

# With REQUEUES=4, a SLURM job too, which is requeued that often: tools/rehearsal/slurm_node.sh starts a SLURM.
rehearsal: $(OUTPUT)/names/made
	rm -rf $(OUTPUT)/rehearsal
	$(PY) -m tools.rehearsal --output $(OUTPUT)/rehearsal --processes 4 1 2 --kills 30 --slurm $(REQUEUES) -- \
		main.py --cfg configs/rehearsal_imagenet.yaml --data-path $(OUTPUT)/names

# About 40 minutes on two cores.
growth: $(VENV)/installed
	$(PY) -m tools.benchmark $(GROWING) $(PEER) --compile eager --threads 1 2 --batches 1 --sizes 224 448 672 896 1120 1344 \
		--rounds 3 --output $(OUTPUT)/growth_size
	$(PY) -m tools.benchmark $(GROWING) $(PEER) --compile eager --threads 2 --batches 1 4 16 64 --rounds 3 --output $(OUTPUT)/growth_batch

# On two idle cores. Networks and seeds that were timed before are not repeated.
speedrun: $(VENV)/installed
	@test -n '$(IMAGENETTE)' || { echo 'Name the images: make speedrun IMAGENETTE=<folder> (docs/reproducing.md, "Imagenette at 112 px")'; exit 1; }
	$(PY) -m tools.speedrun --data-path '$(IMAGENETTE)' --output $(OUTPUT)/speedrun

format: $(VENV)/installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/installed
	$(PY) -m tools.draw_figures --output docs
	$(PY) -m tools.draw_figures --output docs --figures study exchange_study --formats pdf
	$(PY) -m tools.visualize.gallery $(PHOTOGRAPHS) --weights $(STORED) --output docs/photographs.png
	$(PY) -m tools.list_config > docs/configuration.md
	$(PY) -m tools.list_commands > docs/command_line.md

$(VENV)/installed-docs: requirements-docs.txt | $(VENV)/installed
	$(PY) -m pip install --quiet -r requirements-docs.txt
	touch $@

# A broken link or docstring is an error. With --quiet, mkdocs would ignore it. The variable silences an advertisement.
site: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --config-file tools/site/mkdocs.yml --site-dir $(abspath $(OUTPUT))/site
	@echo "Look at $(OUTPUT)/site/index.html"

clean:
	rm -rf $(OUTPUT) $(VENV)
