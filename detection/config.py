"""The config tree of detection: every key with its default, meaning and allowed values.

Keys shared with classification are stated in the root's config.py; here they may have other defaults. Defaults are the
published recipe of Cascade Mask R-CNN.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from config import check_run, shared_keys
from detection.models.backbone import check_backbone
from detection.tiles import Tiling
from engine.config_keys import Key, KeyGroup
from engine.config_tree import ConfigError, ConfigTree
from models.timm_networks import PREFIX as TIMM

_C = shared_keys('detection')

# Shared keys with other defaults
_C.MODEL.NAME = replace(_C.MODEL.NAME, default='cascade_mask_rcnn_msg_tiny_3x')
_C.MODEL.NUM_CLASSES = replace(
    _C.MODEL.NUM_CLASSES,
    default=80,
    optional=int,
    help='Number of classes, without the background; None takes the number of classes in the annotation file',
    min=1,
)
_C.MODEL.DROP_PATH_RATE = replace(_C.MODEL.DROP_PATH_RATE, default=0.2)
_C.DATA.BATCH_SIZE = replace(
    _C.DATA.BATCH_SIZE, default=2, help='Training images per process and batch; evaluation uses batches of one image'
)
_C.DATA.DATA_PATH = replace(
    _C.DATA.DATA_PATH, help='Folder with annotations/instances_<split>.json and a folder of images per split'
)
_C.DATA.EXIF = replace(
    _C.DATA.EXIF,
    default=True,
    help='Apply the EXIF orientation when images are read; False reads them as stored. Annotations must match: of the '
    'upright images if True, of the stored images if False',
)
_C.DATA.NUM_WORKERS = replace(_C.DATA.NUM_WORKERS, default=2)
_C.TRAIN.EPOCHS = replace(_C.TRAIN.EPOCHS, default=36)
_C.TRAIN.BASE_LR = replace(
    _C.TRAIN.BASE_LR,
    default=1e-4,
    help='Peak learning rate at BASE_BATCH images per update; scaled linearly with the images per update',
)
_C.TRAIN.BASE_BATCH = replace(_C.TRAIN.BASE_BATCH, default=16)
_C.TRAIN.CLIP_GRAD = replace(_C.TRAIN.CLIP_GRAD, default=0.0)
_C.AMP_OPT_LEVEL = replace(  # torchvision's parts do not support O2's float16 network
    _C.AMP_OPT_LEVEL,
    help="Mixed precision: O0 off, O1 autocast; '' is O1 on a GPU and O0 elsewhere",
    choices=('', 'O0', 'O1'),
)
_C.AMP_BACKEND = replace(_C.AMP_BACKEND, default='native')

_C.SHOW = Key(0, 'With --eval, draw the first N images with their detections', min=0, flag='--show', affects='nothing')
_C.SHOW_SCORE = Key(0.5, 'Minimum score of a detection that is drawn', min=0, max=1, affects='nothing')

_C.DATA.TRAIN_SPLIT = Key(
    'train2017', 'Training split: its folder, and annotations/instances_<split>.json', affects='data'
)
_C.DATA.VAL_SPLIT = Key('val2017', 'Evaluation split', affects='data')
for _split, _name in (('TRAIN', 'training'), ('VAL', 'evaluation')):
    _C.DATA[f'{_split}_ANNOTATIONS'] = Key(
        '',
        f"Annotation file of {_name}, within DATA_PATH; '' is the file of {_split}_SPLIT",
        is_path=True,
        affects='data',
    )
    _C.DATA[f'{_split}_IMAGES'] = Key(
        '',
        f"Folder of the images of {_name}, within DATA_PATH; '' is the folder of {_split}_SPLIT",
        is_path=True,
        affects='nothing',
    )
    _C.DATA[f'{_split}_LIMIT'] = Key(
        0, f'Use only this many {_name} images, chosen at random but always the same; 0 uses all', min=0, affects='data'
    )
_C.DATA.CLASSES = Key(
    [''], "Names of the categories to detect, in the order of the annotation file; [''] takes all", affects='data'
)
_C.DATA.EMPTY_IMAGES = Key(False, 'Train on images without objects too', affects='data')
_C.DATA.REPEAT_FACTOR = Key(
    0.0,
    'Repeat-factor sampling of LVIS: images of categories in less than this fraction of the training images are '
    'repeated within an epoch (0.001 for LVIS). 0 is off: each image once',
    min=0,
    max=1,
)

_C.INPUT = KeyGroup()
_C.INPUT.FLIP = Key(0.5, 'Probability of a horizontal flip', min=0, max=1)
_C.INPUT.TRAIN_SHORT = Key(
    list(range(480, 801, 32)), 'Short side of training images, in pixels: one of these, at random', min=1
)
_C.INPUT.MAX_LONG = Key(1333, 'Maximum long side of an image, in pixels; overrides the short side', min=1, max=20_000)
_C.INPUT.CROP_PROB = Key(
    0.5, 'Probability that a training image is resized and cropped before its final resize', min=0, max=1
)
_C.INPUT.CROP_RESIZE = Key(
    [400, 500, 600], 'Short side before a crop, in pixels: one of these, at random', min=1, used_with='INPUT.CROP_PROB'
)
_C.INPUT.CROP_MAX_LONG = Key(4200, 'Maximum long side before a crop, in pixels', min=1, used_with='INPUT.CROP_PROB')
_C.INPUT.CROP_SIZE = Key([384, 600], 'Size of a crop, in pixels: min, max', min=1, used_with='INPUT.CROP_PROB')
_C.INPUT.SCALE_JITTER = Key(
    [],
    'Large-scale jitter: smallest and largest scale, such as [0.1, 2.0], of a training image, which is then cropped to '
    'JITTER_SIZE; at scale 1, its long side is JITTER_SIZE. In training, it replaces TRAIN_SHORT, MAX_LONG and '
    'the crop of CROP_PROB. [] is off',
    min=0.01,
    max=100,
)
_C.INPUT.JITTER_SIZE = Key(
    1024,
    'Maximum height and width of a training image with large-scale jitter, in pixels',
    min=32,
    max=10_000,
    used_with='INPUT.SCALE_JITTER',
)
_C.INPUT.COPY_PASTE = Key(
    0.0,
    'Copy-paste augmentation: probability that objects of another training image are pasted on an image; needs masks',
    min=0,
    max=1,
)
_C.INPUT.TEST_SHORT = Key(800, 'Short side of evaluation images, in pixels', min=1, max=10_000)

_C.TEST = KeyGroup()
_C.TEST.SHORTS = Key(
    [],
    'Test scales: short sides, in pixels, at which images are evaluated and their detections merged; [] is '
    'INPUT.TEST_SHORT only',
    min=1,
)
_C.TEST.FLIP = Key(False, 'Test-time horizontal flip: detect in the mirrored image too, and merge the detections')
_C.TEST.TILES = Key(
    0,
    'Tiled detection, for small objects: height and width of overlapping tiles, in pixels of the image; each tile is '
    'resized like an image. 0 is off',
    min=0,
    max=20_000,
)
_C.TEST.TILE_OVERLAP = Key(
    0.2, 'Minimum overlap of neighbouring tiles, relative to their size', min=0, max=0.9, used_with='TEST.TILES'
)
_C.TEST.TILE_WHOLE = Key(
    True, 'Detect in the whole image too, for objects that are larger than the overlap of tiles', used_with='TEST.TILES'
)
_C.TEST.LOSS = Key(
    False,
    'Compute the losses of the evaluation images too, as val_loss, which breaks ties of the best checkpoint; '
    'evaluation takes up to twice as long',
    affects='nothing',
)

_C.MODEL.TYPE = Key(
    'cascade_rcnn',
    'Architecture: cascade_rcnn; with one stage (see BOX.IOUS), it is Mask R-CNN or, without masks, Faster R-CNN',
    choices=('cascade_rcnn',),
    affects='network',
)
_C.MODEL.BACKBONE = Key(
    'msg',
    'Backbone: msg, or timm:<name> for a network of timm, which ignores MODEL.MSG',
    choices=('msg', f'{TIMM}<name>'),
    affects='network',
)
_C.MODEL.FPN_CHANNELS = Key(256, 'Channels of the feature pyramid', min=1, affects='network')

_C.MODEL.RPN = KeyGroup()
_C.MODEL.RPN.ANCHOR_SCALE = Key(8, "Size of an anchor, relative to its level's stride", min=1, affects='network')
_C.MODEL.RPN.ANCHOR_RATIOS = Key(
    [0.5, 1.0, 2.0], 'Aspect ratios of the anchors, height / width', min=0.01, max=100, affects='network'
)
_C.MODEL.RPN.POSITIVE_IOU = Key(0.7, 'Minimum IoU of a positive anchor', min=0, max=1)
_C.MODEL.RPN.NEGATIVE_IOU = Key(0.3, 'IoU below which an anchor is negative', min=0, max=1)
_C.MODEL.RPN.SAMPLES = Key(256, 'Anchors per image sampled for the losses', min=1)
_C.MODEL.RPN.POSITIVE_FRACTION = Key(0.5, 'Maximum fraction of positives among the sampled anchors', min=0, max=1)
_C.MODEL.RPN.PRE_NMS_TRAIN = Key(2000, 'Proposals per level before NMS, in training', min=1)
_C.MODEL.RPN.POST_NMS_TRAIN = Key(2000, 'Proposals per image after NMS, in training', min=1)
_C.MODEL.RPN.PRE_NMS_TEST = Key(1000, 'Proposals per level before NMS, in evaluation', min=1)
_C.MODEL.RPN.POST_NMS_TEST = Key(1000, 'Proposals per image after NMS, in evaluation', min=1)
_C.MODEL.RPN.NMS_IOU = Key(0.7, 'IoU threshold of NMS for proposals', min=0, max=1)

_C.MODEL.BOX = KeyGroup()
_C.MODEL.BOX.IOUS = Key(
    [0.5, 0.6, 0.7], 'Minimum IoU of a positive RoI, per stage of the cascade', min=0, max=1, affects='network'
)
_C.MODEL.BOX.CENTRE_STDS = Key(
    [0.1, 0.05, 0.033],
    "Normalisation of box deltas: standard deviation of the centre, relative to the RoI's size, per stage",
    min=0.0001,
    affects='network',
)
_C.MODEL.BOX.SIZE_STDS = Key(
    [0.2, 0.1, 0.067],
    'Normalisation of box deltas: standard deviation of the logarithm of width and height, per stage',
    min=0.0001,
    affects='network',
)
_C.MODEL.BOX.STAGE_WEIGHTS = Key([1.0, 0.5, 0.25], 'Weight of the losses, per stage', min=0)
_C.MODEL.BOX.POOL_SIZE = Key(7, "Height and width of a RoI's features", min=1, affects='network')
_C.MODEL.BOX.CONVS = Key(
    [256, 256, 256, 256],
    'Channels of the 3 x 3 convolutions of a box head, each with a norm',
    min=1,
    affects='network',
)
_C.MODEL.BOX.LINEARS = Key([1024], 'Channels of the linear layers that follow', min=1, affects='network')
_C.MODEL.BOX.LOSS = Key('giou', 'Box loss: giou, of decoded boxes, or l1, of box deltas', choices=('giou', 'l1'))
_C.MODEL.BOX.LOSS_WEIGHT = Key(10.0, 'Weight of the box loss', min=0)
_C.MODEL.BOX.SAMPLES = Key(512, 'RoIs per image sampled for the losses of a stage', min=1)
_C.MODEL.BOX.POSITIVE_FRACTION = Key(0.25, 'Maximum fraction of positives among the sampled RoIs', min=0, max=1)
_C.MODEL.BOX.SCORE = Key(0.05, 'Minimum score of a detection', min=0, max=1)
_C.MODEL.BOX.NMS_IOU = Key(0.5, 'IoU threshold of NMS for detections of a class', min=0, max=1)
_C.MODEL.BOX.DETECTIONS = Key(100, 'Maximum number of detections per image', min=1)

_C.MODEL.MASK = KeyGroup()
_C.MODEL.MASK.ENABLED = Key(True, 'Predict masks too; False trains and evaluates boxes only', affects='network')
_C.MODEL.MASK.POOL_SIZE = Key(
    14, "Height and width of a RoI's features; its mask is twice as large", min=1, affects='network'
)
_C.MODEL.MASK.CONVS = Key(
    [256, 256, 256, 256], 'Channels of the 3 x 3 convolutions of a mask head', min=1, affects='network'
)
_C.MODEL.MASK.UPSAMPLED = Key(256, 'Channels after the deconvolution', min=1, affects='network')

_C.TRAIN.FROZEN_BATCH_NORM = Key(
    True, 'Freeze the batch norms of a pretrained backbone; without pretrained weights, they are trained'
)
_C.TRAIN.WARMUP_STEPS = Key(500, 'Updates of linear warm-up', min=0)
_C.TRAIN.WARMUP_FACTOR = Key(
    0.001, 'Learning rate of the first update, relative to the peak', min=0, max=1, used_with='TRAIN.WARMUP_STEPS'
)

_C.TRAIN.LR_SCHEDULER = KeyGroup()
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = Key([27, 33], 'Epochs at whose start the learning rate drops; [] for none', min=1)
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = Key(
    0.1, 'Factor of each drop', min=0, max=1, used_with='TRAIN.LR_SCHEDULER.DECAY_EPOCHS'
)


def load_config(cfg_file: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Load defaults, the file's BASE files, the file and the options, checked and frozen; see `ConfigTree.load`.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load(cfg_file, opts)


def get_config(args: Namespace) -> CfgNode:
    """Load the config of a command line: like `load_config`, with flags that override it.

    See `detection.main.parse_option`.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load_with_flags(args)


def _check(config: CfgNode) -> None:
    """Check the config of detection, and refuse combinations that cannot work."""
    box, inputs, rpn = config.MODEL.BOX, config.INPUT, config.MODEL.RPN
    if not box.IOUS or not len(box.IOUS) == len(box.CENTRE_STDS) == len(box.SIZE_STDS) == len(box.STAGE_WEIGHTS):
        raise ConfigError(
            'MODEL.BOX.IOUS, CENTRE_STDS, SIZE_STDS and STAGE_WEIGHTS differ in length: '
            'write one entry per stage in each'
        )
    if not box.LINEARS:
        raise ConfigError('MODEL.BOX.LINEARS is []: write the channels of one layer or more')
    if not config.MODEL.MASK.CONVS:
        raise ConfigError('MODEL.MASK.CONVS is []: write the channels of one layer or more')
    if rpn.NEGATIVE_IOU > rpn.POSITIVE_IOU:
        raise ConfigError(
            f'MODEL.RPN.NEGATIVE_IOU is {rpn.NEGATIVE_IOU}: write at most POSITIVE_IOU, {rpn.POSITIVE_IOU}'
        )
    for key in ('TRAIN_SHORT', 'CROP_RESIZE'):
        if not inputs[key]:
            raise ConfigError(f'INPUT.{key} is []: write one size or more, in pixels')
    if len(inputs.CROP_SIZE) != 2 or inputs.CROP_SIZE[0] > inputs.CROP_SIZE[1]:
        raise ConfigError(f'INPUT.CROP_SIZE is {inputs.CROP_SIZE}: write two numbers, the smaller first')
    jitter = inputs.SCALE_JITTER
    if jitter and (len(jitter) != 2 or jitter[0] > jitter[1]):
        raise ConfigError(
            f'INPUT.SCALE_JITTER is {jitter}: write two numbers, the smaller first, such as [0.1, 2.0], or [] for none'
        )
    if inputs.COPY_PASTE and not config.MODEL.MASK.ENABLED:
        raise ConfigError(
            f'INPUT.COPY_PASTE is {inputs.COPY_PASTE}, and MODEL.MASK.ENABLED is False: objects are cut out by their '
            f'masks, so write INPUT.COPY_PASTE 0, or MODEL.MASK.ENABLED True where the annotations have masks'
        )
    if sorted(set(config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS)) != config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS:
        raise ConfigError(
            f'TRAIN.LR_SCHEDULER.DECAY_EPOCHS is {config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS}: write them in order'
        )
    Tiling.of_config(config)  # which checks itself
    if config.SHOW and not config.EVAL_MODE:
        raise ConfigError('--show draws detections of an evaluation: add --eval')
    check_run(config, check_backbone)


def check_schedule(config: CfgNode, steps_per_epoch: int | None = None) -> None:
    """Refuse a warm-up or drops that do not end within the run.

    Args:
        config: the config tree.
        steps_per_epoch: updates per epoch; None where they are not known yet.

    Raises:
        ConfigError: the warm-up or a drop would not end within the run.
    """
    train = config.TRAIN
    drops = train.LR_SCHEDULER.DECAY_EPOCHS
    if drops and drops[-1] >= train.EPOCHS:
        raise ConfigError(
            f'TRAIN.LR_SCHEDULER.DECAY_EPOCHS is {drops}, and the run ends after {train.EPOCHS} epochs: write epochs '
            f'before TRAIN.EPOCHS, or [] for no drop of the learning rate'
        )
    if steps_per_epoch and train.EPOCHS * steps_per_epoch <= train.WARMUP_STEPS:
        raise ConfigError(
            f'TRAIN.WARMUP_STEPS is {train.WARMUP_STEPS}, and the run has {train.EPOCHS * steps_per_epoch} updates '
            f'({steps_per_epoch} per epoch), so that its warm-up never ends: write fewer, or more TRAIN.EPOCHS'
        )


TREE = ConfigTree('detection', _C, _check)
