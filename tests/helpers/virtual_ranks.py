"""Runs with virtual ranks, whose bits must not depend on the number of processes.

As a program, this file trains all of them, for one process of any launcher:

    torchrun --nproc_per_node 2 -m tests.helpers.virtual_ranks <images> <COCO data> <output> <tag> <tag to resume from>

Each run is named <tag>. With a tag to resume from, each is trained a second time, as <tag>_resumed, from a checkpoint
within the last epoch of the run of that name. See tests/engine/test_virtual_ranks.py.
"""

import os
import sys
from pathlib import Path

from tests.helpers.recipes import COMMON

# Name of the run: further options. 24 images make three batches for each of four virtual ranks.
RUNS = {
    'accumulated': {'TRAIN__ACCUMULATION_STEPS': '2', 'TRAIN__CLIP_GRAD': '1', 'DATA__NUM_WORKERS': '1'},
    'bfloat16': {'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'bfloat16', 'AUG__REPEATS': '3', 'TRAIN__LOSS': 'bce'},
    'float16': {'AMP_OPT_LEVEL': 'O1', 'DATA__SAMPLING': 'balanced', 'TRAIN__OPTIMIZER__NAME': 'sgd'},
    'skipped': {'TRAIN__NONFINITE': 'skip', 'DATA__PIPELINE': 'published', 'TRAIN__OPTIMIZER__NAME': 'lamb'},
    'sizes': {
        'DATA__IMG_SIZES': '[14, 28]',
        'DATA__IMG_SIZE_EPOCHS': '[0, 1]',
        'DATA__IMG_SIZE_BATCHES': '[4, 2]',
        'TRAIN__OPTIMIZER__NAME': 'muon',
    },
    'detector': {'MODEL__BOX__CONVS': '[]', 'TRAIN__WARMUP_STEPS': '1', 'DATA__BATCH_SIZE': '1'},
}

VIRTUAL = {'TRAIN__VIRTUAL_RANKS': '4', 'DATA__BATCH_SIZE': '2', 'SAVE_STEPS': '1'}


def options_of(name, images, coco):
    """Options of a run as a dictionary."""
    return COMMON | VIRTUAL | {'DATA__DATA_PATH': str(coco if name == 'detector' else images)} | RUNS[name]


def load(name, images, coco, **options):
    """The program of a run, and its config."""
    import config
    import detection.config
    import detection.main
    import main
    from tests.helpers.paths import TINY, TINY_DETECTOR

    options = options_of(name, images, coco) | {'MODEL__NAME': name} | options
    pairs = [text for key, value in options.items() for text in (key.replace('__', '.'), value)]
    if name == 'detector':
        return detection.main, detection.config.load_config(TINY_DETECTOR, pairs)
    return main, config.load_config(TINY, pairs)


def spoil_an_image():
    """Make the loss of virtual rank 3 NaN in the second update of the last epoch of `skipped`."""
    from engine.trainer import Trainer

    compute_gradient = Trainer.compute_gradient

    def compute(trainer, batches):
        ranks, state = list(trainer.run.own_ranks), trainer.state
        if trainer.run.config.MODEL.NAME == 'skipped' and (state.epoch, state.step) == (1, 1) and 3 in ranks:
            batches[ranks.index(3) * len(batches) // len(ranks)].image[0, 0, 0, 0] = float('nan')
        return compute_gradient(trainer, batches)

    Trainer.compute_gradient = compute


def train_all(images, coco, output, tag, previous=''):
    """Train every run; see the top of this file."""
    spoil_an_image()
    starts = [(tag, '')] + ([(f'{tag}_resumed', previous)] if previous else [])
    for number, (name, (own_tag, origin)) in enumerate((name, start) for name in RUNS for start in starts):
        # Otherwise, torchrun's store still has the addresses of the last run
        os.environ['TORCHELASTIC_RESTART_COUNT'] = str(number)
        resume = Path(output) / name / origin / 'ckpt_epoch_1_step_1.pth' if origin else ''
        program, config = load(name, images, coco, OUTPUT=output, TAG=own_tag, MODEL__RESUME=str(resume))
        program.main(config)


if __name__ == '__main__':
    train_all(*sys.argv[1:])
