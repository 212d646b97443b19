"""The config tree: every key with its published default, and how files, options and flags are merged into it.

`load_config` is the way in; `get_config` adds the command line's flags. The tree that comes out is checked and frozen:
values derived at run time (scaled learning rates, rank, output folder) are local values elsewhere.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config_tree import ConfigError, ConfigTree, get
from models.build import check_network

__all__ = ['TREE', 'ConfigError', 'check_job', 'get_config', 'load_config']

_C = CfgNode()

# Config files this one starts from, relative to it
_C.BASE = ['']
# Mixed precision: O0 none, O1 autocast, O2 Apex's half-precision model; '' is O1 on a GPU and O0 elsewhere
_C.AMP_OPT_LEVEL = ''
# Half-precision type of O1: float16 (published; with a loss scaler) or bfloat16
_C.AMP_DTYPE = 'float16'
# Who does O1 and O2: native (PyTorch), apex (NVIDIA Apex, release 25.05 or before), or auto: Apex where it is installed
_C.AMP_BACKEND = 'auto'
# Multiply fp32 matrices in TensorFloat-32 on GPUs that can: faster, with 10 bits of mantissa in place of 23
_C.TF32 = False
# Device: auto (a GPU where there is one), cuda, mps (Apple's) or cpu
_C.DEVICE = 'auto'
# Only algorithms that give the same bits each time, also where they are slower
_C.DETERMINISTIC = False
# How torch.compile works: default, reduce-overhead (CUDA graphs: for small batches) or max-autotune (compiles longer)
_C.COMPILE_MODE = 'default'
# Folder of all runs; '' is output. A run writes into <OUTPUT>/<MODEL.NAME>/<TAG>
_C.OUTPUT = ''
# Name of this run among those of its model
_C.TAG = 'default'
# Epochs between checkpoints
_C.SAVE_FREQ = 1
# Updates between checkpoints inside an epoch; 0 saves at the ends of epochs only
_C.SAVE_STEPS = 0
# Newest checkpoints to keep, of both kinds together; 0 keeps all. The best one is kept besides
_C.SAVE_KEEP = 0
# Updates (batches, in an evaluation) between log lines
_C.PRINT_FREQ = 100
# Write the run's metrics for TensorBoard too, into the run's folder
_C.TENSORBOARD = True
# Random seed; rank r uses SEED + r
_C.SEED = 0
# Evaluate MODEL.RESUME or MODEL.PRETRAINED and stop
_C.EVAL_MODE = False
# Measure images/s of the network and stop
_C.THROUGHPUT_MODE = False
# GPU to use where no launcher sets the LOCAL_RANK variable
_C.LOCAL_RANK = 0

_C.DATA = CfgNode()
# Images a process and step
_C.DATA.BATCH_SIZE = 128
# Folder with train/<class>/ and val/<class>/
_C.DATA.DATA_PATH = ''
# Layout of DATA_PATH: imagenet, a tree of class folders
_C.DATA.DATASET = 'imagenet'
# Side of the square images the network sees, in pixels
_C.DATA.IMG_SIZE = 224
# Resampling of images: nearest, bilinear or bicubic
_C.DATA.INTERPOLATION = 'bicubic'
# Load into page-locked memory, for faster copies to a GPU
_C.DATA.PIN_MEMORY = True
# Loader processes a rank; 0 loads in the training process
_C.DATA.NUM_WORKERS = 8

_C.MODEL = CfgNode()
# Architecture: msg
_C.MODEL.TYPE = 'msg'
# Name of the model: the run's folder and log lines carry it
_C.MODEL.NAME = 'msg_tiny_p4_win7_224'
# Checkpoint to continue or evaluate; goes before TRAIN.AUTO_RESUME
_C.MODEL.RESUME = ''
# Checkpoint whose weights start a new run; the head may have other classes
_C.MODEL.PRETRAINED = ''
# Classes; 0 gives features
_C.MODEL.NUM_CLASSES = 1000
# Dropout after the position embedding, the attention's projection and in the MLPs
_C.MODEL.DROP_RATE = 0.0
# Dropout after the attention's softmax
_C.MODEL.ATTN_DROP_RATE = 0.0
# Stochastic depth of the last block, rising linearly from 0 at the first
_C.MODEL.DROP_PATH_RATE = 0.1
# Label smoothing
_C.MODEL.LABEL_SMOOTHING = 0.1

_C.MODEL.MSG = CfgNode()
# Side of a patch, in pixels
_C.MODEL.MSG.PATCH_SIZE = 4
# Image channels: 3 (RGB) or 1 (grey)
_C.MODEL.MSG.IN_CHANS = 3
# Channels of the first stage; they double with each stage
_C.MODEL.MSG.EMBED_DIM = 96
# Blocks per stage
_C.MODEL.MSG.DEPTHS = [2, 2, 6, 2]
# Attention heads per stage
_C.MODEL.MSG.NUM_HEADS = [3, 6, 12, 24]
# Side of a window, in patches
_C.MODEL.MSG.WINDOW_SIZE = 7
# Hidden channels of the MLPs, over the stage's channels
_C.MODEL.MSG.MLP_RATIO = 4.0
# Learned bias on query, key and value
_C.MODEL.MSG.QKV_BIAS = True
# Factor on query times key; None is (channels a head)^-0.5
_C.MODEL.MSG.QK_SCALE = None
# Absolute position embedding
_C.MODEL.MSG.APE = False
# Norm after the patch embedding
_C.MODEL.MSG.PATCH_NORM = True
# Side of a shuffle region per stage, in windows
_C.MODEL.MSG.SHUF_SIZE = [4, 4, 2, 1]
# Exchange of MSG tokens: shuf or none
_C.MODEL.MSG.MANIP_TYPE = 'shuf'
# Patch embedding: patch (v1) or overlap (v2)
_C.MODEL.MSG.EMBED_TYPE = 'patch'
# Merging between stages: patch (v1) or overlap (v2)
_C.MODEL.MSG.MERGE_TYPE = 'patch'

_C.TRAIN = CfgNode()
# First epoch, where no checkpoint says another
_C.TRAIN.START_EPOCH = 0
# Epoch the run ends before
_C.TRAIN.EPOCHS = 300
# Epochs of linear warm-up
_C.TRAIN.WARMUP_EPOCHS = 20
# Weight decay, except of norms, biases and position parameters
_C.TRAIN.WEIGHT_DECAY = 0.05
# Peak learning rate for 512 images an update; scaled with their number, like the next two
_C.TRAIN.BASE_LR = 5e-4
# Learning rate at the first update
_C.TRAIN.WARMUP_LR = 5e-7
# Learning rate the cosine ends at
_C.TRAIN.MIN_LR = 5e-6
# Largest norm of the gradient; 0 leaves it alone
_C.TRAIN.CLIP_GRAD = 5.0
# Continue from the newest checkpoint in the run's folder
_C.TRAIN.AUTO_RESUME = True
# Batches whose gradients make one update; 0 and 1 are the same
_C.TRAIN.ACCUMULATION_STEPS = 0
# On a loss or a gradient norm that is not finite, on any rank: stop the run before the update, or skip the update
_C.TRAIN.NONFINITE = 'stop'
# Most updates in a row that may be skipped, also where float16 overflows
_C.TRAIN.NONFINITE_LIMIT = 20
# Decay of the exponential moving average of the weights, such as 0.9999; 0 keeps no average
_C.TRAIN.EMA_DECAY = 0.0
# Recompute activations in the backward pass, for memory
_C.TRAIN.USE_CHECKPOINT = False
# Recompute GELU alone in the backward pass: a fifth less memory for no measurable time (docs/performance.md)
_C.TRAIN.RECOMPUTE_MLP = True
# Train with torch.compile: minutes at the start, then faster
_C.TRAIN.COMPILE = False

_C.TRAIN.LR_SCHEDULER = CfgNode()
# Learning rate after warm-up: cosine, linear or step
_C.TRAIN.LR_SCHEDULER.NAME = 'cosine'
# Epochs between the drops of step
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
# Factor at each drop of step
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

_C.TRAIN.OPTIMIZER = CfgNode()
# Optimizer: adamw or sgd
_C.TRAIN.OPTIMIZER.NAME = 'adamw'
# AdamW's epsilon
_C.TRAIN.OPTIMIZER.EPS = 1e-8
# AdamW's betas
_C.TRAIN.OPTIMIZER.BETAS = (0.9, 0.999)
# SGD's momentum
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9

_C.AUG = CfgNode()
# Area of the random crop, smallest and largest part of the image
_C.AUG.SCALE = (0.08, 1.0)
# Width over height of the random crop, smallest and largest
_C.AUG.RATIO = (3 / 4, 4 / 3)
# Probability of a horizontal flip
_C.AUG.HFLIP = 0.5
# Strength of colour jitter, where AUTO_AUGMENT is none; 0 is off
_C.AUG.COLOR_JITTER = 0.4
# Augmentation policy in timm's notation (rand-..., augmix-..., original, v0), or none
_C.AUG.AUTO_AUGMENT = 'rand-m9-mstd0.5-inc1'
# Probability of random erasing
_C.AUG.REPROB = 0.25
# What random erasing fills with: pixel, rand or const
_C.AUG.REMODE = 'pixel'
# Most rectangles random erasing erases
_C.AUG.RECOUNT = 1
# Mixup's alpha; 0 is off
_C.AUG.MIXUP = 0.8
# CutMix's alpha; 0 is off
_C.AUG.CUTMIX = 1.0
# Smallest and largest part of the side CutMix cuts, in place of its alpha
_C.AUG.CUTMIX_MINMAX = None
# Probability that a batch is mixed
_C.AUG.MIXUP_PROB = 1.0
# Probability of CutMix, where both are on
_C.AUG.MIXUP_SWITCH_PROB = 0.5
# One mix for each batch, pair or elem
_C.AUG.MIXUP_MODE = 'batch'

_C.TEST = CfgNode()
# Evaluate on the centre crop of an image resized to 256/224 of the size; False resizes the whole image
_C.TEST.CROP = True
# Evaluate, and measure throughput, with torch.compile
_C.TEST.COMPILE = False

# Keys whose default is None: the type of their other values.
_OPTIONAL = {'MODEL.MSG.QK_SCALE': float, 'AUG.CUTMIX_MINMAX': list}

_CHOICES = {
    'AMP_OPT_LEVEL': ('', 'O0', 'O1', 'O2'),
    'AMP_DTYPE': ('float16', 'bfloat16'),
    'AMP_BACKEND': ('auto', 'native', 'apex'),
    'COMPILE_MODE': ('default', 'reduce-overhead', 'max-autotune'),
    'DEVICE': ('auto', 'cuda', 'mps', 'cpu'),
    'DATA.DATASET': ('imagenet',),
    'DATA.INTERPOLATION': ('nearest', 'bilinear', 'bicubic'),
    'MODEL.TYPE': ('msg',),
    'MODEL.MSG.MANIP_TYPE': ('shuf', 'none'),
    'MODEL.MSG.EMBED_TYPE': ('patch', 'overlap'),
    'MODEL.MSG.MERGE_TYPE': ('patch', 'overlap'),
    'TRAIN.NONFINITE': ('stop', 'skip'),
    'TRAIN.LR_SCHEDULER.NAME': ('cosine', 'linear', 'step'),
    'TRAIN.OPTIMIZER.NAME': ('adamw', 'sgd'),
    'AUG.REMODE': ('pixel', 'rand', 'const'),
    'AUG.MIXUP_MODE': ('batch', 'pair', 'elem'),
}

# Smallest and largest value of a number, or of every number in a list.
_INF = float('inf')
_RANGES = {
    'SAVE_FREQ': (1, _INF),
    'SAVE_STEPS': (0, _INF),
    'SAVE_KEEP': (0, _INF),
    'PRINT_FREQ': (1, _INF),
    'SEED': (0, _INF),
    'LOCAL_RANK': (0, _INF),
    'DATA.BATCH_SIZE': (1, _INF),
    'DATA.IMG_SIZE': (1, _INF),
    'DATA.NUM_WORKERS': (0, _INF),
    'MODEL.NUM_CLASSES': (0, _INF),
    'MODEL.DROP_RATE': (0, 1),
    'MODEL.ATTN_DROP_RATE': (0, 1),
    'MODEL.DROP_PATH_RATE': (0, 0.999),
    'MODEL.LABEL_SMOOTHING': (0, 0.999),
    'MODEL.MSG.PATCH_SIZE': (1, _INF),
    'MODEL.MSG.IN_CHANS': (1, _INF),
    'MODEL.MSG.EMBED_DIM': (1, _INF),
    'MODEL.MSG.DEPTHS': (1, _INF),
    'MODEL.MSG.NUM_HEADS': (1, _INF),
    'MODEL.MSG.WINDOW_SIZE': (1, _INF),
    'MODEL.MSG.MLP_RATIO': (0.01, _INF),
    'MODEL.MSG.SHUF_SIZE': (1, _INF),
    'TRAIN.START_EPOCH': (0, _INF),
    'TRAIN.EPOCHS': (1, _INF),
    'TRAIN.WARMUP_EPOCHS': (0, _INF),
    'TRAIN.WEIGHT_DECAY': (0, _INF),
    'TRAIN.BASE_LR': (0, _INF),
    'TRAIN.WARMUP_LR': (0, _INF),
    'TRAIN.MIN_LR': (0, _INF),
    'TRAIN.CLIP_GRAD': (0, _INF),
    'TRAIN.ACCUMULATION_STEPS': (0, _INF),
    'TRAIN.NONFINITE_LIMIT': (0, _INF),
    'TRAIN.EMA_DECAY': (0, 0.9999999),
    'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': (1, _INF),
    'TRAIN.LR_SCHEDULER.DECAY_RATE': (0, 1),
    'TRAIN.OPTIMIZER.EPS': (0, _INF),
    'TRAIN.OPTIMIZER.BETAS': (0, 0.99999),
    'TRAIN.OPTIMIZER.MOMENTUM': (0, 0.99999),
    'AUG.SCALE': (0.001, 1),
    'AUG.RATIO': (0.001, 1000),
    'AUG.HFLIP': (0, 1),
    'AUG.COLOR_JITTER': (0, _INF),
    'AUG.REPROB': (0, 1),
    'AUG.RECOUNT': (1, _INF),
    'AUG.MIXUP': (0, _INF),
    'AUG.CUTMIX': (0, _INF),
    'AUG.CUTMIX_MINMAX': (0, 1),
    'AUG.MIXUP_PROB': (0, 1),
    'AUG.MIXUP_SWITCH_PROB': (0, 1),
}

# Keys that change nothing of what a run computes.
_NO_EFFECT = {
    'BASE', 'OUTPUT', 'TAG', 'SAVE_FREQ', 'SAVE_STEPS', 'SAVE_KEEP', 'PRINT_FREQ', 'TENSORBOARD', 'EVAL_MODE',
    'THROUGHPUT_MODE', 'LOCAL_RANK', 'DATA.DATA_PATH', 'DATA.PIN_MEMORY', 'DATA.NUM_WORKERS', 'MODEL.NAME',
    'MODEL.RESUME', 'MODEL.PRETRAINED', 'TRAIN.START_EPOCH', 'TRAIN.AUTO_RESUME', 'TRAIN.NONFINITE',
    'TRAIN.NONFINITE_LIMIT', 'TRAIN.RECOMPUTE_MLP',
}  # fmt: skip

# The flag of the command line behind each key; one that is not given (None) overrides nothing.
_FLAGS = {
    'batch_size': 'DATA.BATCH_SIZE',
    'data_path': 'DATA.DATA_PATH',
    'resume': 'MODEL.RESUME',
    'pretrained': 'MODEL.PRETRAINED',
    'accumulation_steps': 'TRAIN.ACCUMULATION_STEPS',
    'use_checkpoint': 'TRAIN.USE_CHECKPOINT',
    'amp_opt_level': 'AMP_OPT_LEVEL',
    'device': 'DEVICE',
    'output': 'OUTPUT',
    'tag': 'TAG',
    'eval': 'EVAL_MODE',
    'throughput': 'THROUGHPUT_MODE',
    'local_rank': 'LOCAL_RANK',
}


def load_config(cfg_file: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Defaults, then the file's BASE files, the file and the options, checked and frozen; see `ConfigTree.load`.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load(cfg_file, opts)


def get_config(args: Namespace) -> CfgNode:
    """`load_config` with the command line's flags on top; see `main.parse_option` for them.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load_with_flags(args)


def check_job(config: CfgNode) -> None:
    """Refuse what cannot work in a job of any task.

    Raises:
        ConfigError: keys that do not go together; the message says what to write.
    """
    if len(config.TRAIN.OPTIMIZER.BETAS) != 2:
        raise ConfigError(f'TRAIN.OPTIMIZER.BETAS is {config.TRAIN.OPTIMIZER.BETAS}: write two numbers')
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        raise ConfigError('--eval needs weights: add --resume <checkpoint>')
    if config.MODEL.RESUME and config.MODEL.PRETRAINED:
        raise ConfigError('--resume continues a run and --pretrained starts one: give one of them')


def check_shape(config: CfgNode, img_size: int | None) -> None:
    """Refuse a network that cannot be built, before any work is done.

    Raises:
        ConfigError: see `models.build.check_network`.
    """
    try:
        check_network(config, img_size)
    except ValueError as error:
        raise ConfigError(f'MODEL.MSG: {error}') from error


def _check(config: CfgNode) -> None:
    """Refuse what cannot work, before any work is done."""
    for key in ('AUG.SCALE', 'AUG.RATIO', 'AUG.CUTMIX_MINMAX'):
        value = get(config, key, 'config')
        if value is not None and not (len(value) == 2 and 0 <= value[0] <= value[1]):
            raise ConfigError(f'{key} is {list(value)}: write two numbers, the smaller first')
    train = config.TRAIN
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        raise ConfigError(
            f'TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} must be less than TRAIN.EPOCHS {train.EPOCHS}: '
            f'write both for a short run'
        )
    if config.EVAL_MODE and config.THROUGHPUT_MODE:
        raise ConfigError('--eval and --throughput are two jobs: give one of them')
    check_job(config)
    check_shape(config, config.DATA.IMG_SIZE)


TREE = ConfigTree(_C, _OPTIONAL, _CHOICES, _RANGES, _NO_EFFECT, _FLAGS, _check)
