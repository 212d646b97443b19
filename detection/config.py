"""The config tree of detection: every key with the published recipe's value as default.

The keys that it shares with the classifier (`_SHARED`) have their comments, ranges and choices in the root's config.py.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

import config as classifier
from config import check_job, check_shape
from config_tree import ConfigError, ConfigTree

_SHARED = classifier.TREE.part([
    'BASE', 'AMP_OPT_LEVEL', 'AMP_DTYPE', 'AMP_BACKEND', 'TF32', 'DEVICE', 'DETERMINISTIC', 'OUTPUT', 'TAG',
    'SAVE_FREQ', 'SAVE_STEPS', 'SAVE_KEEP', 'PRINT_FREQ', 'TENSORBOARD', 'SEED', 'EVAL_MODE', 'LOCAL_RANK',
    'DATA.BATCH_SIZE', 'DATA.DATA_PATH', 'DATA.PIN_MEMORY', 'DATA.NUM_WORKERS',
    'MODEL.NAME', 'MODEL.RESUME', 'MODEL.PRETRAINED', 'MODEL.NUM_CLASSES', 'MODEL.DROP_RATE', 'MODEL.ATTN_DROP_RATE',
    'MODEL.DROP_PATH_RATE', 'MODEL.MSG.PATCH_SIZE', 'MODEL.MSG.EMBED_DIM', 'MODEL.MSG.DEPTHS', 'MODEL.MSG.NUM_HEADS',
    'MODEL.MSG.WINDOW_SIZE', 'MODEL.MSG.MLP_RATIO', 'MODEL.MSG.QKV_BIAS', 'MODEL.MSG.QK_SCALE', 'MODEL.MSG.PATCH_NORM',
    'MODEL.MSG.SHUF_SIZE', 'MODEL.MSG.MANIP_TYPE', 'MODEL.MSG.EMBED_TYPE', 'MODEL.MSG.MERGE_TYPE',
    'TRAIN.EPOCHS', 'TRAIN.WEIGHT_DECAY', 'TRAIN.BASE_LR', 'TRAIN.CLIP_GRAD', 'TRAIN.AUTO_RESUME',
    'TRAIN.ACCUMULATION_STEPS', 'TRAIN.NONFINITE', 'TRAIN.NONFINITE_LIMIT', 'TRAIN.EMA_DECAY', 'TRAIN.USE_CHECKPOINT',
    'TRAIN.RECOMPUTE_MLP',
    'TRAIN.OPTIMIZER.NAME', 'TRAIN.OPTIMIZER.EPS', 'TRAIN.OPTIMIZER.BETAS', 'TRAIN.OPTIMIZER.MOMENTUM',
])  # fmt: skip

_C = _SHARED.defaults

# Other defaults of shared keys
_C.MODEL.NAME = 'cascade_mask_rcnn_msg_tiny_3x'
_C.MODEL.NUM_CLASSES = 80  # the background not counted
_C.MODEL.DROP_PATH_RATE = 0.2
_C.DATA.BATCH_SIZE = 2
_C.DATA.NUM_WORKERS = 2
_C.TRAIN.EPOCHS = 36
_C.TRAIN.BASE_LR = 1e-4  # for 16 images an update; scaled with their number
_C.TRAIN.CLIP_GRAD = 0.0
_C.AMP_BACKEND = 'native'

# Measure images/s of the whole detector and stop
_C.BENCHMARK_MODE = False
# Images to draw with their detections in an evaluation
_C.SHOW = 0
# Least score of a detection that is drawn
_C.SHOW_SCORE = 0.5

# Training images: the folder's name, and that of annotations/instances_<name>.json
_C.DATA.TRAIN_SPLIT = 'train2017'
# Evaluation images, likewise
_C.DATA.VAL_SPLIT = 'val2017'

_C.INPUT = CfgNode()
# Probability of a horizontal flip
_C.INPUT.FLIP = 0.5
# Short side of training images, in pixels: one of these
_C.INPUT.TRAIN_SHORT = list(range(480, 801, 32))
# Longest side of an image that the network sees, in pixels; goes before the short side
_C.INPUT.MAX_LONG = 1333
# Probability that a training image is resized and cropped before
_C.INPUT.CROP_PROB = 0.5
# Short side of images before a crop, in pixels: one of these
_C.INPUT.CROP_RESIZE = [400, 500, 600]
# Longest side of images before a crop, in pixels
_C.INPUT.CROP_MAX_LONG = 4200
# Sides of a crop, smallest and largest, in pixels
_C.INPUT.CROP_SIZE = [384, 600]
# Short side of evaluation images, in pixels
_C.INPUT.TEST_SHORT = 800

# Channels of the feature pyramid
_C.MODEL.FPN_CHANNELS = 256

_C.MODEL.RPN = CfgNode()
# Side of an anchor, over its level's stride
_C.MODEL.RPN.ANCHOR_SCALE = 8
# Height over width of the anchors
_C.MODEL.RPN.ANCHOR_RATIOS = [0.5, 1.0, 2.0]
# Least overlap (IoU) of an anchor that is an object's
_C.MODEL.RPN.POSITIVE_IOU = 0.7
# Overlap below which an anchor is background
_C.MODEL.RPN.NEGATIVE_IOU = 0.3
# Anchors an image that the losses sample
_C.MODEL.RPN.SAMPLES = 256
# Most of them that are objects'
_C.MODEL.RPN.POSITIVE_FRACTION = 0.5
# Proposals a level before suppression of overlaps, while training
_C.MODEL.RPN.PRE_NMS_TRAIN = 2000
# Proposals an image, while training
_C.MODEL.RPN.POST_NMS_TRAIN = 2000
# Proposals a level before suppression of overlaps, in evaluation
_C.MODEL.RPN.PRE_NMS_TEST = 1000
# Proposals an image, in evaluation
_C.MODEL.RPN.POST_NMS_TEST = 1000
# Overlap (IoU) above which the lower-scored of two proposals is suppressed
_C.MODEL.RPN.NMS_IOU = 0.7

_C.MODEL.BOX = CfgNode()
# Least overlap (IoU) of a region that is an object's, for each stage of the cascade
_C.MODEL.BOX.IOUS = [0.5, 0.6, 0.7]
# Standard deviation of the centre's offsets, over the region's size, per stage
_C.MODEL.BOX.CENTRE_STDS = [0.1, 0.05, 0.033]
# Standard deviation of the logarithm of the size's factors, per stage
_C.MODEL.BOX.SIZE_STDS = [0.2, 0.1, 0.067]
# Weight of a stage's losses
_C.MODEL.BOX.STAGE_WEIGHTS = [1.0, 0.5, 0.25]
# Side of a region's features
_C.MODEL.BOX.POOL_SIZE = 7
# Channels of the 3 x 3 convolutions, each with a norm, of a head
_C.MODEL.BOX.CONVS = [256, 256, 256, 256]
# Channels of the linear layers that follow
_C.MODEL.BOX.LINEARS = [1024]
# Loss of a box: giou, of the box itself, or l1, of its offsets
_C.MODEL.BOX.LOSS = 'giou'
# Weight of that loss
_C.MODEL.BOX.LOSS_WEIGHT = 10.0
# Regions an image that the losses of a stage sample
_C.MODEL.BOX.SAMPLES = 512
# Most of them that are objects'
_C.MODEL.BOX.POSITIVE_FRACTION = 0.25
# Score above which a detection is kept
_C.MODEL.BOX.SCORE = 0.05
# Overlap (IoU) above which the lower-scored of two detections of a class is suppressed
_C.MODEL.BOX.NMS_IOU = 0.5
# Most detections an image
_C.MODEL.BOX.DETECTIONS = 100

_C.MODEL.MASK = CfgNode()
# Side of a region's features; its mask has twice as many pixels a side
_C.MODEL.MASK.POOL_SIZE = 14
# Channels of the 3 x 3 convolutions of a head
_C.MODEL.MASK.CONVS = [256, 256, 256, 256]
# Channels after the upsampling
_C.MODEL.MASK.UPSAMPLED = 256

# Updates of linear warm-up
_C.TRAIN.WARMUP_STEPS = 500
# Learning rate at the first update, over the peak
_C.TRAIN.WARMUP_FACTOR = 0.001

_C.TRAIN.LR_SCHEDULER = CfgNode()
# Epochs before which the learning rate drops
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = [27, 33]
# Factor at each drop
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

_CHOICES = {
    'AMP_OPT_LEVEL': ('', 'O0', 'O1'),  # O2 would make torchvision's parts half-precision, which they are not made for
    'MODEL.BOX.LOSS': ('giou', 'l1'),
}

_INF = float('inf')
_RANGES = {
    'SHOW': (0, _INF),
    'SHOW_SCORE': (0, 1),
    'INPUT.FLIP': (0, 1),
    'INPUT.TRAIN_SHORT': (1, _INF),
    'INPUT.MAX_LONG': (1, _INF),
    'INPUT.CROP_PROB': (0, 1),
    'INPUT.CROP_RESIZE': (1, _INF),
    'INPUT.CROP_MAX_LONG': (1, _INF),
    'INPUT.CROP_SIZE': (1, _INF),
    'INPUT.TEST_SHORT': (1, _INF),
    'MODEL.NUM_CLASSES': (1, _INF),
    'MODEL.FPN_CHANNELS': (1, _INF),
    'MODEL.RPN.ANCHOR_SCALE': (1, _INF),
    'MODEL.RPN.ANCHOR_RATIOS': (0.01, 100),
    'MODEL.RPN.POSITIVE_IOU': (0, 1),
    'MODEL.RPN.NEGATIVE_IOU': (0, 1),
    'MODEL.RPN.SAMPLES': (1, _INF),
    'MODEL.RPN.POSITIVE_FRACTION': (0, 1),
    'MODEL.RPN.PRE_NMS_TRAIN': (1, _INF),
    'MODEL.RPN.POST_NMS_TRAIN': (1, _INF),
    'MODEL.RPN.PRE_NMS_TEST': (1, _INF),
    'MODEL.RPN.POST_NMS_TEST': (1, _INF),
    'MODEL.RPN.NMS_IOU': (0, 1),
    'MODEL.BOX.IOUS': (0, 1),
    'MODEL.BOX.CENTRE_STDS': (0.0001, _INF),
    'MODEL.BOX.SIZE_STDS': (0.0001, _INF),
    'MODEL.BOX.STAGE_WEIGHTS': (0, _INF),
    'MODEL.BOX.POOL_SIZE': (1, _INF),
    'MODEL.BOX.CONVS': (1, _INF),
    'MODEL.BOX.LINEARS': (1, _INF),
    'MODEL.BOX.LOSS_WEIGHT': (0, _INF),
    'MODEL.BOX.SAMPLES': (1, _INF),
    'MODEL.BOX.POSITIVE_FRACTION': (0, 1),
    'MODEL.BOX.SCORE': (0, 1),
    'MODEL.BOX.NMS_IOU': (0, 1),
    'MODEL.BOX.DETECTIONS': (1, _INF),
    'MODEL.MASK.POOL_SIZE': (1, _INF),
    'MODEL.MASK.CONVS': (1, _INF),
    'MODEL.MASK.UPSAMPLED': (1, _INF),
    'TRAIN.WARMUP_STEPS': (0, _INF),
    'TRAIN.WARMUP_FACTOR': (0, 1),
    'TRAIN.LR_SCHEDULER.DECAY_EPOCHS': (1, _INF),
    'TRAIN.LR_SCHEDULER.DECAY_RATE': (0, 1),
}

_NO_EFFECT = {'BENCHMARK_MODE', 'SHOW', 'SHOW_SCORE'}

_FLAGS = {'benchmark': 'BENCHMARK_MODE', 'show': 'SHOW'}


def load_config(cfg_file: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Defaults, then the file's BASE files, the file and the options, checked and frozen; see `ConfigTree.load`.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load(cfg_file, opts)


def get_config(args: Namespace) -> CfgNode:
    """`load_config` with the command line's flags on top; see `detection.main.parse_option` for them.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load_with_flags(args)


def _check(config: CfgNode) -> None:
    """Refuse what cannot work, before any work is done."""
    box, inputs, rpn = config.MODEL.BOX, config.INPUT, config.MODEL.RPN
    if not box.IOUS or not len(box.IOUS) == len(box.CENTRE_STDS) == len(box.SIZE_STDS) == len(box.STAGE_WEIGHTS):
        raise ConfigError(
            'MODEL.BOX.IOUS, CENTRE_STDS, SIZE_STDS and STAGE_WEIGHTS have different lengths: '
            'write one entry a stage in each'
        )
    if not box.LINEARS:
        raise ConfigError('MODEL.BOX.LINEARS is []: write the channels of one layer or more')
    if not config.MODEL.MASK.CONVS:
        raise ConfigError('MODEL.MASK.CONVS is []: write the channels of one layer or more')
    if len(config.MODEL.MSG.DEPTHS) != 4:
        raise ConfigError(f'MODEL.MSG.DEPTHS is {config.MODEL.MSG.DEPTHS}: write four, one a level of the pyramid')
    patch = config.MODEL.MSG.PATCH_SIZE
    if patch & (patch - 1):
        raise ConfigError(f'MODEL.MSG.PATCH_SIZE is {patch}: write a power of 2, as the strides of the pyramid are')
    if rpn.NEGATIVE_IOU > rpn.POSITIVE_IOU:
        raise ConfigError(
            f'MODEL.RPN.NEGATIVE_IOU is {rpn.NEGATIVE_IOU}: write at most POSITIVE_IOU, {rpn.POSITIVE_IOU}'
        )
    for key in ('TRAIN_SHORT', 'CROP_RESIZE'):
        if not inputs[key]:
            raise ConfigError(f'INPUT.{key} is []: write one size or more, in pixels')
    if len(inputs.CROP_SIZE) != 2 or inputs.CROP_SIZE[0] > inputs.CROP_SIZE[1]:
        raise ConfigError(f'INPUT.CROP_SIZE is {inputs.CROP_SIZE}: write two numbers, the smaller first')
    if sorted(set(config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS)) != config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS:
        raise ConfigError(
            f'TRAIN.LR_SCHEDULER.DECAY_EPOCHS is {config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS}: write them in order'
        )
    if config.EVAL_MODE and config.BENCHMARK_MODE:
        raise ConfigError('--eval and --benchmark are two jobs: give one of them')
    if config.SHOW and not config.EVAL_MODE:
        raise ConfigError('--show draws detections of an evaluation: add --eval')
    check_job(config)
    check_shape(config, None)


TREE = ConfigTree(
    _C,
    _SHARED.optional,
    _SHARED.choices | _CHOICES,
    _SHARED.ranges | _RANGES,
    _SHARED.no_effect | _NO_EFFECT,
    _SHARED.flags | _FLAGS,
    _check,
)
