"""Training recipes: settings of main.py that every kind of run must survive; see tests/test_recipes.py.

As a program, this file trains all of them, for one process of any launcher:

    torchrun --nproc_per_node 2 -m tests.helpers.recipes <folder of images> <output>
"""

import os
import sys
from pathlib import Path

# A module with transforms of albumentations and torchvision
LIBRARY_TRANSFORMS = str(Path(__file__).with_name('library_transforms.py'))

# Name of the recipe: options of `tiny_config`, in addition to `COMMON`
RECIPES = {
    'published': {},
    'albumentations': {'IMPORT': LIBRARY_TRANSFORMS, 'AUG__TRANSFORM': 'mixed'},
    'bce': {'TRAIN__LOSS': 'bce', 'TRAIN__BCE_THRESHOLD': '0.2', 'TRAIN__CLASS_WEIGHTS': 'sqrt', 'AUG__REPEATS': '3'},
    'balanced': {
        'DATA__SAMPLING': 'balanced',
        'TRAIN__CLASS_WEIGHTS': 'balanced',
        'AUG__REPEATS': '2',
        'DATA__IMAGES_PER_EPOCH': '16',
    },
    'multi_label': {
        'IMPORT': str(Path(__file__).with_name('several_labels.py')),
        'DATA__DATASET': 'several_labels',
        'DATA__MULTI_LABEL': 'True',
        'TRAIN__LOSS': 'bce',
        'AUG__MIXUP': '0',
        'AUG__CUTMIX': '0',
    },
    'sgd': {'TRAIN__OPTIMIZER__NAME': 'sgd', 'TRAIN__LR_SCHEDULER__NAME': 'linear', 'TRAIN__ACCUMULATION_STEPS': '2'},
    'distilled': {
        'DISTILL__TEACHER': 'timm:msg_transformer_nano',
        'DISTILL__CLASSES': '[0, 1, n03028079]',
        'TRAIN__ACCUMULATION_STEPS': '2',
        'TRAIN__CLIP_GRAD': '1',
    },
    'lamb': {
        'TRAIN__OPTIMIZER__NAME': 'lamb',
        'TRAIN__LR_SCHEDULER__UNIT': 'epoch',
        'TRAIN__LAYER_DECAY': '0.7',
        'TRAIN__NONFINITE': 'skip',
    },
    'muon': {
        'TRAIN__OPTIMIZER__NAME': 'muon',
        'TRAIN__OPTIMIZER__ARGS': 'ns_steps=3 betas=(0.9,0.98)',
        'AMP_OPT_LEVEL': 'O1',
    },
    'channels_last': {
        'MODEL__TYPE': 'timm:resnet18',
        'MODEL__TIMM_ARGS': 'channels=(4,8,8,8) layers=(1,1,1,1)',
        'MODEL__CHANNELS_LAST': 'True',
        'TRAIN__OPTIMIZER__NAME': 'nmuon',
        'AMP_OPT_LEVEL': 'O1',
        'AMP_DTYPE': 'bfloat16',
    },
    'virtual_ranks': {
        'TRAIN__VIRTUAL_RANKS': '4',
        'DATA__BATCH_SIZE': '2',
        'TRAIN__ACCUMULATION_STEPS': '2',
        'TRAIN__CLIP_GRAD': '1',
        'SAVE_STEPS': '1',
    },
    'sizes': {
        'DATA__IMG_SIZES': '[14, 28]',
        'DATA__IMG_SIZE_EPOCHS': '[0, 1]',
        'DATA__IMG_SIZE_BATCHES': '[8, 4]',
        'TRAIN__OPTIMIZER__NAME': 'adan',
    },
}

# Two short epochs with everything that draws random numbers
COMMON = {'TRAIN__EPOCHS': '2', 'SAVE_STEPS': '2', 'SAVE_KEEP': '0', 'DATA__NUM_WORKERS': '0', 'PRINT_FREQ': '1'}
COMMON |= {'MODEL__DROP_PATH_RATE': '0.3', 'MODEL__DROP_RATE': '0.1', 'TRAIN__EMA_DECAY': '0.9'}


def options_of(recipe, folder):
    """Options of a recipe as a dictionary; `{folder}` in a value stands for the folder of images."""
    return COMMON | {key: value.format(folder=folder) for key, value in RECIPES[recipe].items()}


def train_and_resume(tiny_config, **options):
    """Configs of two runs: a whole one, and one resumed from the middle of its second epoch."""
    import main as program
    from tests.helpers.runs import folder_of

    whole = tiny_config(TAG='whole', **options)
    program.main(whole)
    inside = sorted(folder_of(whole).glob('ckpt_epoch_1_step_*.pth'))
    resumed = tiny_config(TAG='resumed', MODEL__RESUME=str(inside[len(inside) // 2]), **options)
    program.main(resumed)
    return whole, resumed


def train_all(folder, output):
    """Train every recipe on a folder of images; each is a run named after it."""
    import main as program
    from config import load_config
    from tests.helpers.paths import TINY

    for number, recipe in enumerate(RECIPES):
        # Otherwise, torchrun's store still has the addresses of the last run
        os.environ['TORCHELASTIC_RESTART_COUNT'] = str(number)
        options = {'DATA__DATA_PATH': str(folder)} | options_of(recipe, folder) | {'OUTPUT': str(output), 'TAG': recipe}
        pairs = [text for key, value in options.items() for text in (key.replace('__', '.'), value)]
        program.main(load_config(TINY, pairs))


if __name__ == '__main__':
    train_all(*sys.argv[1:])
