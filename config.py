"""The config tree: every key with its default, meaning and allowed values.

`load_config` is the entry point; `get_config` adds the command line's flags. Both return a checked, frozen tree: values
derived at run time (scaled learning rates, rank, output folder) are local to the code that needs them. Defaults are the
published ones. `python -m tools.list_config` prints the tree as docs/configuration.md.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from data.losses import LOSSES, WEIGHTED_LOSSES
from data.mixup import uses_mixup
from data.python_dataset import DATASET_NAMES
from data.transforms import TRANSFORMS
from engine.config_keys import Key, KeyGroup
from engine.config_tree import ConfigError, ConfigTree, get
from models.build import check_network
from models.layers import EMBED_TYPES, MERGE_TYPES
from models.msg_transformer import HEAD_TOKENS
from models.timm_networks import PREFIX as TIMM
from models.timm_networks import check_sizes, check_timm_name, shaping_args
from optimizer import ADAMW_BETAS, ADAMW_EPS, check_optimizer, optimizers_with
from trackers import TRACKERS

__all__ = ['TREE', 'ConfigError', 'check_run', 'check_schedule', 'get_config', 'load_config', 'shared_keys']


def _used_with_optimizers(option: str) -> str:
    return f'TRAIN.OPTIMIZER.NAME {"|".join(optimizers_with(option))}'


def shared_keys(task: str) -> KeyGroup:
    """Build the config keys that all tasks share; `task` is the name of the task."""
    c = KeyGroup()
    c.BASE = Key(
        [''], 'Config files whose values this file starts from; paths are relative to this file', affects='nothing'
    )
    c.IMPORT = Key(
        [''],
        'Your own modules to import before the config is read (docs/extending.md): .py files, relative to the config '
        'file that names them, or module names on the Python path. Modules recorded in a checkpoint are not imported',
        flag='--import',
        affects='nothing',
    )
    c.TASK = Key(
        task, 'Task: classification (main.py) or detection (detection.main)', choices=(task,), affects='network'
    )
    c.AMP_OPT_LEVEL = Key(
        '',
        "Mixed precision: O0 off, O1 autocast, O2 float16 weights (Apex only); '' is O1 on a GPU and O0 elsewhere",
        choices=('', 'O0', 'O1', 'O2'),
        flag='--amp-opt-level',
    )
    c.AMP_DTYPE = Key(
        'float16',
        'Half-precision type of O1: float16 (published; with a loss scaler) or bfloat16',
        choices=('float16', 'bfloat16'),
    )
    c.AMP_BACKEND = Key(
        'auto',
        'Backend of O1 and O2: native (PyTorch), apex (NVIDIA Apex up to 25.05), or auto: Apex if installed',
        choices=('auto', 'native', 'apex'),
    )
    c.TF32 = Key(False, 'Let fp32 matmuls and convolutions use TensorFloat-32 on GPUs: faster, with a 10-bit mantissa')
    c.DEVICE = Key(
        'auto',
        "Device: auto (a GPU if there is one), cuda, mps (Apple's GPU) or cpu",
        choices=('auto', 'cuda', 'mps', 'cpu'),
        flag='--device',
    )
    c.DETERMINISTIC = Key(False, 'Use deterministic algorithms only, also where they are slower')
    c.OUTPUT = Key(
        '',
        "Folder of all runs ('' means ./output). A run writes to <OUTPUT>/<MODEL.NAME>/<TAG>",
        flag='--output',
        is_path=True,
        metavar='DIR',
        affects='nothing',
    )
    c.TAG = Key(
        'default', 'Name of the run: the last part of its folder', flag='--tag', metavar='NAME', affects='nothing'
    )
    c.SAVE_FREQ = Key(1, 'Epochs between checkpoints; the last epoch is always saved', min=1, affects='nothing')
    c.EVAL_FREQ = Key(1, 'Epochs between evaluations; the last epoch is always evaluated', min=1, affects='nothing')
    c.SAVE_STEPS = Key(
        0, 'Updates between checkpoints within an epoch; 0 saves only at the end of an epoch', min=0, affects='nothing'
    )
    c.SAVE_KEEP = Key(
        10,
        'Keep the last K end-of-epoch checkpoints and the last K checkpoints within the current epoch, in addition to '
        'the best; 0 keeps all',
        min=0,
        affects='nothing',
    )
    c.LOCK_WAIT = Key(
        60,
        "Seconds to wait while another process writes to the run's folder, such as a killed run that has not ended yet",
        min=0,
        max=1200,
        affects='nothing',
    )
    c.PRINT_FREQ = Key(
        100, 'Updates between log lines; in evaluation, batches between log lines', min=1, affects='nothing'
    )
    c.HASH_FREQ = Key(
        100,
        'Updates between hashes of the weights in metrics.jsonl, for tools.replay (docs/replay.md); 0 is off',
        min=0,
        affects='nothing',
    )
    c.TRACKER = Key(
        'tensorboard',
        'Experiment tracker that gets the metrics of metrics.jsonl too: tensorboard, wandb, mlflow, your own '
        '(docs/extending.md), a list of trackers, or none',
        choices=TRACKERS,
        or_list=True,
        affects='nothing',
    )
    c.SEED = Key(0, 'Random seed; rank r uses SEED + r', min=0)
    c.EVAL_MODE = Key(
        False, 'Evaluate the checkpoint of --resume or --pretrained and stop', flag='--eval', affects='nothing'
    )
    c.THROUGHPUT_MODE = Key(
        False,
        'Benchmark inference and, with DATA_PATH, training and data loading, in images/s, and stop',
        flag='--throughput',
        affects='nothing',
    )
    c.LOCAL_RANK = Key(
        0,
        'Index of the GPU, if no launcher sets LOCAL_RANK',
        min=0,
        flag='--local_rank --local-rank',
        affects='nothing',
    )

    c.DATA = KeyGroup()
    c.DATA.BATCH_SIZE = Key(128, 'Images per process and batch', min=1, flag='--batch-size')
    c.DATA.IMAGES_PER_EPOCH = Key(
        0,
        'Training images per epoch; 0 takes all. With fewer, each epoch draws a different random subset of the images',
        min=0,
    )
    c.DATA.DATA_PATH = Key(
        '',
        'Folder of the dataset: with train/<class>/ and val/<class>/, or as DATA.DATASET says',
        flag='--data-path',
        is_path=True,
        metavar='DIR',
        affects='nothing',
    )
    c.DATA.EXIF = Key(
        False, 'Apply the EXIF orientation when images are read; False reads them as stored, as published'
    )
    c.DATA.PIN_MEMORY = Key(
        True, 'Load batches into pinned (page-locked) memory, for faster copies to a GPU', affects='nothing'
    )
    c.DATA.NUM_WORKERS = Key(
        8, 'DataLoader workers per rank; 0 loads in the training process', min=0, affects='nothing'
    )

    c.MODEL = KeyGroup()
    c.MODEL.NAME = Key(
        'msg_tiny_p4_win7_224', "Name of the model, in the run's folder and log lines", affects='nothing'
    )
    c.MODEL.RESUME = Key(
        '',
        'Start a new run from the training state of this checkpoint; with --eval, evaluate it. To continue a stopped '
        'run, repeat its command without this flag',
        flag='--resume',
        is_path=True,
        metavar='FILE',
        affects='nothing',
    )
    c.MODEL.PRETRAINED = Key(
        '',
        'Checkpoint whose weights a new run starts from',
        flag='--pretrained',
        is_path=True,
        metavar='FILE',
        affects='nothing',
    )
    c.MODEL.PRETRAINED_WEIGHTS = Key(
        'auto',
        'Weights to load from PRETRAINED: raw, ema, or auto: the EMA weights unless the raw ones scored higher',
        choices=('auto', 'raw', 'ema'),
        flag='--pretrained-weights',
        affects='nothing',
        used_with='MODEL.PRETRAINED',
    )
    c.MODEL.PRETRAINED_HEAD = Key(
        'auto',
        'Head of the PRETRAINED checkpoint: keep it, start from a new one, or auto: a new one if the number or the '
        'names of the classes differ',
        choices=('auto', 'keep', 'new'),
        affects='nothing',
        used_with='MODEL.PRETRAINED',
    )
    c.MODEL.PRETRAINED_MISSING = Key(
        'error',
        'If the checkpoint and the network have different weights: error; or allow: load the weights that both have, '
        'and log the others',
        choices=('error', 'allow'),
        flag='--pretrained-missing',
        affects='nothing',
    )
    c.MODEL.NUM_CLASSES = Key(1000, 'Number of classes; 0 for no head', min=0, affects='network')
    c.MODEL.DROP_RATE = Key(
        0.0, "Dropout after the patch embedding, the attention's projection and in the MLPs", min=0, max=1
    )
    c.MODEL.ATTN_DROP_RATE = Key(0.0, "Dropout after the attention's softmax", min=0, max=1)
    c.MODEL.DROP_PATH_RATE = Key(
        0.1, 'Stochastic depth: rate of the last block, rising linearly from 0 at the first block', min=0, max=0.999
    )

    c.MODEL.CHANNELS_LAST = Key(
        False,
        'Store the weights of 2-D convolutions with channels last in memory: faster ConvNets with mixed precision',
    )
    c.MODEL.TIMM_ARGS = Key(
        '',
        'Arguments of timm.create_model for a network of timm, such as embed_dim=48 depths=(3,3) num_heads=(2,4)',
        affects='network',
        stored=shaping_args,
    )

    c.MODEL.MSG = KeyGroup()
    c.MODEL.MSG.PATCH_SIZE = Key(4, 'Patch size, in pixels', min=1, affects='network')
    c.MODEL.MSG.EMBED_DIM = Key(
        96, 'Channels of the first stage; they double with each stage', min=1, affects='network'
    )
    c.MODEL.MSG.DEPTHS = Key([2, 2, 6, 2], 'Blocks per stage', min=1, max=1000, affects='network')
    c.MODEL.MSG.NUM_HEADS = Key([3, 6, 12, 24], 'Attention heads per stage', min=1, affects='network')
    c.MODEL.MSG.WINDOW_SIZE = Key(7, 'Window size, in patches', min=1, affects='network')
    c.MODEL.MSG.MLP_RATIO = Key(
        4.0, "Hidden channels of the MLPs, relative to the stage's channels", min=0.01, affects='network'
    )
    c.MODEL.MSG.QKV_BIAS = Key(True, 'Learned bias on query, key and value', affects='network')
    c.MODEL.MSG.QK_SCALE = Key(
        None, 'Scale of query times key; None is (channels per head)^-0.5', optional=float, affects='network'
    )
    c.MODEL.MSG.PATCH_NORM = Key(True, 'Norm after the patch embedding', affects='network')
    c.MODEL.MSG.SHUF_SIZE = Key(
        [4, 4, 2, 1], 'Size of a shuffle region per stage, in windows', min=1, affects='network'
    )
    c.MODEL.MSG.MANIP_TYPE = Key(
        'shuf',
        'Exchange of MSG tokens: shuf (published), none, mean, shift, attention, global, mix (docs/exchange.md), or '
        'your own (docs/extending.md); or a list with one for each stage',
        or_list=True,
        affects='network',
    )
    c.MODEL.MSG.MSG_TOKENS = Key(
        True, 'Give every window a MSG token; without, the classifier input is the patch tokens', affects='network'
    )
    c.MODEL.MSG.EMBED_TYPE = Key(
        'patch',
        'Patch embedding: patch (v1), overlap (v2), or conv: 3 x 3 convolutions (docs/network.md)',
        choices=tuple(EMBED_TYPES),
        affects='network',
    )
    c.MODEL.MSG.MERGE_TYPE = Key(
        'patch', 'Patch merging: patch (v1) or overlap (v2)', choices=tuple(MERGE_TYPES), affects='network'
    )

    c.TRAIN = KeyGroup()
    c.TRAIN.EPOCHS = Key(300, 'Number of epochs', min=1)
    c.TRAIN.WEIGHT_DECAY = Key(0.05, 'Weight decay, except for norms, biases and position parameters', min=0)
    c.TRAIN.START_EPOCH = Key(0, 'First epoch of a run that starts without a checkpoint', min=0, affects='nothing')
    c.TRAIN.BASE_LR = Key(
        5e-4,
        'Peak learning rate at BASE_BATCH images per update; scaled linearly with the images per update, as are '
        'WARMUP_LR and MIN_LR',
        min=0,
    )
    c.TRAIN.BASE_BATCH = Key(512, 'Images per update for which the learning rates are given', min=1)
    c.TRAIN.CLIP_GRAD = Key(5.0, 'Maximum gradient norm; 0 disables clipping', min=0)
    c.TRAIN.AUTO_RESUME = Key(
        True, "Resume the run that is in the run's folder; False makes an existing run an error", affects='nothing'
    )
    c.TRAIN.PATIENCE = Key(
        0,
        'Early stopping: end the run when this many evaluations in a row have not improved the metric that selects the '
        'best checkpoint; 0 is off',
        min=0,
    )
    c.TRAIN.ACCUMULATION_STEPS = Key(
        0, 'Gradient accumulation: batches per update; 0 and 1 are off', min=0, flag='--accumulation-steps'
    )
    c.TRAIN.VIRTUAL_RANKS = Key(
        0,
        'Virtual ranks: the run trains as if it had this many processes, a power of two, with the same bits on any '
        'number of processes that divides it; BATCH_SIZE is per virtual rank (docs/training.md). 0 is off',
        min=0,
    )
    c.TRAIN.NONFINITE = Key(
        'stop',
        'If a loss or gradient norm is not finite on any rank: stop the run before the update, or skip the update',
        choices=('stop', 'skip'),
        affects='nothing',
    )
    c.TRAIN.NONFINITE_LIMIT = Key(
        20, 'Maximum number of consecutive skipped updates, including float16 overflows', min=0, affects='nothing'
    )
    c.TRAIN.EMA_DECAY = Key(
        0.0,
        'Decay of the exponential moving average (EMA) of the weights, such as 0.9999; 0 for no EMA',
        min=0,
        max=0.9999999,
    )
    c.TRAIN.USE_CHECKPOINT = Key(
        False, 'Activation checkpointing: recompute blocks in the backward pass', flag='--use-checkpoint'
    )
    c.TRAIN.RECOMPUTE_MLP = Key(
        False,
        'Recompute only the GELU of the MLPs in the backward pass: trades time for memory (docs/performance.md)',
        affects='nothing',
    )

    c.TRAIN.FROZEN_STAGES = Key(
        -1,
        'Freeze the patch embedding and this many first stages; 0 freezes the patch embedding only, -1 nothing',
        min=-1,
    )

    c.TRAIN.OPTIMIZER = KeyGroup()
    c.TRAIN.OPTIMIZER.NAME = Key(
        'adamw', 'Optimizer: adamw, sgd, or another one of timm, such as lamb, lion, adan or muon (docs/training.md)'
    )
    c.TRAIN.OPTIMIZER.EPS = Key(
        ADAMW_EPS,
        'Epsilon of the optimizer; at this default, optimizers other than adamw use their own',
        min=0,
        used_with=_used_with_optimizers('eps'),
    )
    c.TRAIN.OPTIMIZER.BETAS = Key(
        ADAMW_BETAS,
        'Betas of the optimizer; at this default, optimizers other than adamw use their own',
        min=0,
        max=0.99999,
        used_with=_used_with_optimizers('betas'),
    )
    c.TRAIN.OPTIMIZER.MOMENTUM = Key(
        0.9,
        'Momentum of sgd and of other optimizers that have one',
        min=0,
        max=0.99999,
        used_with=_used_with_optimizers('momentum'),
    )
    c.TRAIN.OPTIMIZER.ARGS = Key(
        '', 'Further arguments of the optimizer, such as amsgrad=True; they override EPS and BETAS'
    )
    return c


# Keys of classification
_C = shared_keys('classification')
_C.COMPILE_MODE = Key(
    'default',
    'Mode of torch.compile: default, reduce-overhead (CUDA graphs: small batches) or max-autotune (slow to compile)',
    choices=('default', 'reduce-overhead', 'max-autotune'),
)
_C.DATA.DATASET = Key(
    'imagenet',
    'Format of DATA_PATH: imagenet, class folders; shards, written by tools.pack_dataset; zip, <split>.zip with '
    '<split>_map.txt; table, images and labels in a CSV or Parquet file; webdataset, tars with .cls or .json; '
    'huggingface, a saved DatasetDict; or a custom dataset (docs/data.md)',
    choices=DATASET_NAMES,
    affects='nothing',
)
_C.DATA.MULTI_LABEL = Key(
    False,
    'An image may show several classes: targets are vectors of 0 and 1, and evaluation gives the mean average '
    'precision (docs/training.md)',
    affects='data',
)
_C.DATA.SAMPLING = Key(
    'uniform',
    'How an epoch samples images: uniform, each image once; balanced, with replacement, all classes equally often; '
    'sqrt, with replacement, in proportion to the square root of the class sizes',
    choices=('uniform', 'balanced', 'sqrt'),
)
_C.DATA.PIPELINE = Key(
    'fast',
    'Decoding and augmentation: published, or fast, which computes the same on arrays (docs/data.md)',
    choices=('fast', 'published'),
    before='published',
)
_C.DATA.ON_ERROR = Key(
    'stop',
    'If an image cannot be read: stop the run, or skip: train on the next image instead, and leave the image out of '
    'the evaluation',
    choices=('stop', 'skip'),
)
_C.DATA.ERROR_LIMIT = Key(
    100,
    'Maximum number of unreadable images per process with ON_ERROR skip; one more stops the run',
    min=0,
    affects='nothing',
    used_with='DATA.ON_ERROR skip',
)
_C.DATA.IMG_SIZE = Key(224, 'Image size, in pixels', min=1, max=10_000, affects='network')
_C.DATA.IMG_SIZES = Key(
    [],
    'Progressive resizing: sizes of the training images, one after the other, such as [128, 160, 224]; [] trains on '
    'IMG_SIZE. Evaluation always uses IMG_SIZE',
    min=1,
    max=10_000,
    item=int,
)
_C.DATA.IMG_SIZE_EPOCHS = Key(
    [], 'First epoch of each of IMG_SIZES, such as [0, 100, 200]', min=0, item=int, used_with='DATA.IMG_SIZES'
)
_C.DATA.IMG_SIZE_BATCHES = Key(
    [],
    'Training images per process and batch at each of IMG_SIZES, such as [256, 192, 128]; [] is BATCH_SIZE at all '
    'sizes. The learning rate is scaled with the images per update',
    min=1,
    item=int,
    used_with='DATA.IMG_SIZES',
)
_C.DATA.INTERPOLATION = Key(
    'bicubic',
    'Interpolation of resized images: nearest, bilinear or bicubic',
    choices=('nearest', 'bilinear', 'bicubic'),
)
_C.MODEL.TYPE = Key(
    'msg',
    'Architecture: msg, or timm:<name> for a network of timm, which ignores MODEL.MSG except IN_CHANS',
    choices=('msg', f'{TIMM}<name>'),
    affects='network',
)
_C.MODEL.LABEL_SMOOTHING = Key(0.1, 'Label smoothing', min=0, max=0.999)
_C.MODEL.MSG.IN_CHANS = Key(3, 'Image channels: 3 (RGB) or 1 (grey)', min=1, affects='network')
_C.MODEL.MSG.HEAD_TOKENS = Key(
    'msg',
    'Classifier input: the mean of the MSG tokens (msg) or of the patch tokens (patches) of the last stage',
    choices=HEAD_TOKENS,
    affects='network',
)
_C.MODEL.MSG.APE = Key(False, 'Absolute position embedding', affects='network')

_C.TRAIN.WARMUP_EPOCHS = Key(20, 'Epochs of linear warm-up', min=0)
_C.TRAIN.WARMUP_LR = Key(5e-7, 'Learning rate of the first update', min=0, used_with='TRAIN.WARMUP_EPOCHS')
_C.TRAIN.MIN_LR = Key(5e-6, 'Learning rate at the end of the cosine', min=0, used_with='TRAIN.LR_SCHEDULER.NAME cosine')
_C.TRAIN.LAYER_DECAY = Key(
    1.0,
    "Layer-wise learning-rate decay, for fine-tuning, such as 0.75: ratio of a block's learning rate to the next "
    "block's; 1 is off",
    min=0.01,
    max=1,
)
_C.TRAIN.LOSS = Key(
    'cross_entropy',
    "Training loss: cross_entropy; bce, timm's binary cross entropy of each class; or your own (docs/extending.md)",
    choices=LOSSES,
)
_C.TRAIN.BCE_THRESHOLD = Key(
    None,
    'Targets of bce above this value become 1, others 0, such as 0.2 with Mixup; None keeps soft targets',
    optional=float,
    min=0,
    max=1,
    used_with='TRAIN.LOSS bce',
)
_C.TRAIN.BCE_SUM = Key(False, 'Sum bce over the classes instead of taking their mean', used_with='TRAIN.LOSS bce')
_C.TRAIN.CLASS_WEIGHTS = Key(
    'none',
    'Class weights in the loss, from the number n of training images of each class: none; balanced, proportional to '
    '1/n; sqrt, proportional to 1/sqrt(n)',
    choices=('none', 'balanced', 'sqrt'),
)
_C.TRAIN.COMPILE = Key(
    False,
    'Train with torch.compile: minutes of compilation at the start; on CPUs not always faster (docs/performance.md)',
)

_C.TRAIN.LR_SCHEDULER = KeyGroup()
_C.TRAIN.LR_SCHEDULER.NAME = Key(
    'cosine', 'Learning-rate schedule after warm-up: cosine, linear or step', choices=('cosine', 'linear', 'step')
)
_C.TRAIN.LR_SCHEDULER.UNIT = Key(
    'update',
    "When the learning rate changes: after every update, or after every epoch, as in timm's trainer",
    choices=('update', 'epoch'),
)
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = Key(
    30, 'Epochs between drops of the step schedule', min=1, used_with='TRAIN.LR_SCHEDULER.NAME step'
)
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = Key(
    0.1, 'Factor of each drop of the step schedule', min=0, max=1, used_with='TRAIN.LR_SCHEDULER.NAME step'
)

_C.AUG = KeyGroup()
_C.AUG.SCALE = Key((0.08, 1.0), 'Area of the random crop, relative to the image: min, max', min=0.001, max=1)
_C.AUG.RATIO = Key((3 / 4, 4 / 3), 'Aspect ratio of the random crop, width / height: min, max', min=0.001, max=1000)
_C.AUG.HFLIP = Key(0.5, 'Probability of a horizontal flip', min=0, max=1)
_C.AUG.COLOR_JITTER = Key(
    0.4, 'Strength of colour jitter, if AUTO_AUGMENT is none; 0 is off', min=0, used_with='AUG.AUTO_AUGMENT none'
)
_C.AUG.AUTO_AUGMENT = Key(
    'rand-m9-mstd0.5-inc1', "Augmentation policy in timm's notation (rand-..., augmix-..., original, v0), or none"
)
_C.AUG.TRANSFORM = Key(
    'none',
    'Your own transform of training images, after AUTO_AUGMENT (docs/extending.md); or none',
    choices=TRANSFORMS,
)
_C.AUG.REPEATS = Key(
    1,
    'Repeated augmentation: each drawn image appears this many times in a row, augmented differently. The epoch length '
    'is unchanged, so an epoch sees fewer distinct images',
    min=1,
)
_C.AUG.REPROB = Key(0.25, 'Probability of random erasing', min=0, max=1)
_C.AUG.REMODE = Key(
    'pixel', 'Fill of random erasing: pixel, rand or const', choices=('pixel', 'rand', 'const'), used_with='AUG.REPROB'
)
_C.AUG.RECOUNT = Key(1, 'Maximum number of erased rectangles', min=1, used_with='AUG.REPROB')
_C.AUG.MIXUP = Key(0.8, "Mixup's alpha; 0 is off", min=0)
_C.AUG.CUTMIX = Key(1.0, "CutMix's alpha; 0 is off", min=0)
_C.AUG.CUTMIX_MINMAX = Key(
    None,
    'Size of the CutMix rectangle, relative to the image: min, max; replaces its alpha',
    optional=list,
    min=0,
    max=1,
)
_C.AUG.MIXUP_PROB = Key(1.0, 'Probability that a batch is mixed', min=0, max=1)
_C.AUG.MIXUP_SWITCH_PROB = Key(
    0.5, 'Probability of CutMix rather than Mixup, if both are on', min=0, max=1, used_with='AUG.MIXUP'
)
_C.AUG.MIXUP_MODE = Key(
    'batch', 'Draw one mix per batch, per pair, or per image (elem)', choices=('batch', 'pair', 'elem')
)

_C.DISTILL = KeyGroup()
_C.DISTILL.TEACHER = Key(
    '',
    'Teacher to distil from: timm:<name>, the path of a checkpoint, or a name that a module of --import registers '
    "(docs/distillation.md); '' is off",
    is_path=True,
    affects='nothing',
    stored=lambda teacher: '',  # programs that load a checkpoint need no teacher
)
_C.DISTILL.TEACHER_WEIGHTS = Key(
    '',
    "File with the weights of a teacher timm:<name>; '' takes timm's pretrained weights, which are downloaded",
    is_path=True,
    affects='nothing',
    used_with='DISTILL.TEACHER',
)
_C.DISTILL.KIND = Key(
    'soft',
    "Distillation loss: soft, the KL divergence from the teacher's probabilities, or hard, the cross entropy with the "
    "teacher's top class",
    choices=('soft', 'hard'),
    used_with='DISTILL.TEACHER',
)
_C.DISTILL.TEMPERATURE = Key(
    1.0,
    'Temperature T of soft distillation: student and teacher logits are divided by T',
    min=0.01,
    used_with='DISTILL.KIND soft',
)
_C.DISTILL.WEIGHT = Key(
    0.5,
    'Share w of the distillation loss: (1 - w) * TRAIN.LOSS + w * distillation loss is minimised',
    min=0,
    max=1,
    used_with='DISTILL.TEACHER',
)
_C.DISTILL.CLASSES = Key(
    '',
    "Teacher's class of each student class, in order, as a list of names or indices; '' finds them by name",
    or_list=True,
    used_with='DISTILL.TEACHER',
)

_C.TEST = KeyGroup()
_C.TEST.CROP = Key(
    True,
    'Evaluate on the centre crop, after resizing the short side to 256/224 of IMG_SIZE; False resizes the whole image '
    'to IMG_SIZE x IMG_SIZE',
)
_C.TEST.CLASSES = Key(
    'all',
    'Classes to evaluate with --eval: all, or subset, only those in the dataset, matched by name; other logits are '
    'dropped (docs/evaluation.md)',
    choices=('all', 'subset'),
    affects='nothing',
)
_C.TEST.COMPILE = Key(False, 'Evaluate, and measure throughput, with torch.compile')
_C.TEST.UNKNOWN_SCORE = Key(
    '',
    'Score by which tools.predict and tools.app flag images that probably show none of the classes: 1 - maximum '
    'softmax, entropy of the softmax, or energy; tools.unknown_threshold chooses it (docs/prediction.md)',
    choices=('', 'max_softmax', 'entropy', 'energy'),
    affects='nothing',
)
_C.TEST.UNKNOWN_THRESHOLD = Key(
    0.0, 'Images with a higher score are flagged', used_with='TEST.UNKNOWN_SCORE', affects='nothing'
)


def load_config(cfg_file: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
    """Load defaults, the file's BASE files, the file and the options, checked and frozen; see `ConfigTree.load`.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load(cfg_file, opts)


def get_config(args: Namespace) -> CfgNode:
    """Load the config of a command line: like `load_config`, with flags that override it; see `main.parse_option`.

    Raises:
        ConfigError: a file, key or value that cannot work.
    """
    return TREE.load_with_flags(args)


def check_run(config: CfgNode, check_network: Callable[[CfgNode], None]) -> None:
    """Check the keys that all tasks share, and refuse combinations that cannot work.

    Args:
        config: the config tree.
        check_network: raises a `ValueError` where the task's network cannot be built.

    Raises:
        ConfigError: settings that do not work together; the message says what to write.
    """
    if config.TRAIN.OPTIMIZER.NAME == 'adamw' and len(config.TRAIN.OPTIMIZER.BETAS) != 2:
        raise ConfigError(f'TRAIN.OPTIMIZER.BETAS is {config.TRAIN.OPTIMIZER.BETAS}: write two numbers')
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        raise ConfigError('--eval needs weights: add --resume <checkpoint>')
    if config.EVAL_MODE and config.MODEL.PRETRAINED_WEIGHTS != 'auto':
        raise ConfigError('--eval evaluates raw and EMA weights: leave out --pretrained-weights')
    if config.EVAL_MODE and config.MODEL.PRETRAINED_MISSING != 'error':
        raise ConfigError('--eval evaluates trained weights, not missing ones: leave out --pretrained-missing')
    if config.EVAL_MODE and config.THROUGHPUT_MODE:
        raise ConfigError('--eval and --throughput exclude each other: give one of them')
    if config.MODEL.RESUME and config.MODEL.PRETRAINED:
        raise ConfigError('--resume continues from a checkpoint, --pretrained only takes its weights: give one of them')
    _check_virtual_ranks(config)
    try:
        check_optimizer(config)
        check_network(config)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_virtual_ranks(config: CfgNode) -> None:
    """Refuse settings that virtual ranks do not support."""
    count = config.TRAIN.VIRTUAL_RANKS
    if count & (count - 1):
        powers = [2**i for i in range(count.bit_length() + 1)][-2:]
        raise ConfigError(
            f'TRAIN.VIRTUAL_RANKS is {count}: write a power of two, such as {powers[0]} or {powers[1]}, or 0 for none'
        )
    if count and (config.AMP_BACKEND == 'apex' or config.AMP_OPT_LEVEL == 'O2'):
        raise ConfigError(
            'TRAIN.VIRTUAL_RANKS does not work with Apex: write AMP_BACKEND native and AMP_OPT_LEVEL O0 or O1, or '
            'TRAIN.VIRTUAL_RANKS 0'
        )
    if count and config.MODEL.MSG.EMBED_TYPE == 'conv' and config.TRAIN.FROZEN_STAGES < 0:
        raise ConfigError(
            'TRAIN.VIRTUAL_RANKS does not work with the batch norms of MODEL.MSG.EMBED_TYPE conv: write another '
            'EMBED_TYPE, or TRAIN.VIRTUAL_RANKS 0'
        )
    if count and config.THROUGHPUT_MODE:
        raise ConfigError('--throughput times processes without virtual ranks: write TRAIN.VIRTUAL_RANKS 0')


def _check(config: CfgNode) -> None:
    """Check the config of classification, and refuse combinations that cannot work."""
    for name in ('AUG.SCALE', 'AUG.RATIO', 'AUG.CUTMIX_MINMAX'):
        value = get(config, name, 'config')
        if value is not None and not (len(value) == 2 and 0 <= value[0] <= value[1]):
            raise ConfigError(f'{name} is {list(value)}: write two numbers, the smaller first')
    train = config.TRAIN
    if train.WARMUP_EPOCHS >= train.EPOCHS:
        raise ConfigError(
            f'TRAIN.WARMUP_EPOCHS {train.WARMUP_EPOCHS} must be less than TRAIN.EPOCHS {train.EPOCHS}: '
            f'for a short run, give both, such as --opts TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0'
        )
    several = 'ACCUMULATION_STEPS' if train.ACCUMULATION_STEPS > 1 else 'VIRTUAL_RANKS' if train.VIRTUAL_RANKS else ''
    if several and train.COMPILE and config.COMPILE_MODE != 'default':
        raise ConfigError(
            f'COMPILE_MODE {config.COMPILE_MODE} uses CUDA graphs, whose gradients may be wrong with '
            f'TRAIN.{several} (https://github.com/pytorch/pytorch/issues/169545): write COMPILE_MODE default'
        )
    if config.TEST.CLASSES == 'subset' and not config.EVAL_MODE:
        raise ConfigError('TEST.CLASSES subset is for --eval: training needs all classes in val/: leave it out')
    if len(config.MODEL.MSG.DEPTHS) < train.FROZEN_STAGES:
        raise ConfigError(
            f'TRAIN.FROZEN_STAGES is {train.FROZEN_STAGES}: write at most {len(config.MODEL.MSG.DEPTHS)}, '
            f'the number of stages, to train only the head'
        )
    patch = config.MODEL.MSG.PATCH_SIZE
    for name, sizes in (('IMG_SIZE', [config.DATA.IMG_SIZE]), ('IMG_SIZES', config.DATA.IMG_SIZES)):
        if patch > min(sizes, default=patch):
            raise ConfigError(f'DATA.{name} is {config.DATA[name]}: write at least MODEL.MSG.PATCH_SIZE, {patch}')
    _check_loss(config)
    check_run(config, partial(check_network, img_size=config.DATA.IMG_SIZE))
    _check_sizes(config)
    if config.DISTILL.TEACHER:
        _check_teacher(config)


def _check_teacher(config: CfgNode) -> None:
    """Refuse a teacher that does not fit the other keys; the teacher itself is checked when it is built."""
    teacher, classes, distill = config.DISTILL.TEACHER, config.MODEL.NUM_CLASSES, config.DISTILL
    if teacher.startswith(TIMM):
        try:
            check_timm_name('DISTILL.TEACHER', teacher)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    elif distill.TEACHER_WEIGHTS:
        raise ConfigError(
            f'DISTILL.TEACHER_WEIGHTS is a file for a teacher timm:<name>, and DISTILL.TEACHER is {teacher}: leave it '
            f'out (the weight of the distillation loss is DISTILL.WEIGHT)'
        )
    if config.DATA.MULTI_LABEL:
        raise ConfigError('DISTILL.TEACHER teaches one class per image: write DATA.MULTI_LABEL False, or no teacher')
    if not classes:
        raise ConfigError(
            'DISTILL.TEACHER teaches a classifier, and MODEL.NUM_CLASSES is 0: write the number of classes'
        )
    if distill.CLASSES and (isinstance(distill.CLASSES, str) or len(distill.CLASSES) != classes):
        raise ConfigError(
            f"DISTILL.CLASSES is {distill.CLASSES!r}: write a list with the teacher's class of each of the {classes} "
            f'student classes'
        )


def _check_loss(config: CfgNode) -> None:
    """Refuse combinations of losses, targets and sampling that do not work."""
    data, train, smoothing = config.DATA, config.TRAIN, config.MODEL.LABEL_SMOOTHING
    if train.CLASS_WEIGHTS != 'none' and train.LOSS not in WEIGHTED_LOSSES:
        raise ConfigError(
            f'TRAIN.CLASS_WEIGHTS {train.CLASS_WEIGHTS} is for {" and ".join(WEIGHTED_LOSSES)}, and TRAIN.LOSS is '
            f'{train.LOSS}: write TRAIN.CLASS_WEIGHTS none, or weight the classes in the loss'
        )
    if data.MULTI_LABEL:
        if config.TEST.UNKNOWN_SCORE:
            raise ConfigError(
                'TEST.UNKNOWN_SCORE flags images of none of the classes, and with DATA.MULTI_LABEL the probabilities '
                "say so already: write TEST.UNKNOWN_SCORE ''"
            )
        if train.LOSS == 'cross_entropy':
            raise ConfigError('DATA.MULTI_LABEL needs a loss of each class: write TRAIN.LOSS bce')
        if uses_mixup(config):
            raise ConfigError(
                'DATA.MULTI_LABEL: Mixup and CutMix mix images of one class each: write AUG.MIXUP 0 AUG.CUTMIX 0 '
                'AUG.CUTMIX_MINMAX None'
            )
        for name, setting, off in (
            ('DATA.SAMPLING', data.SAMPLING, 'uniform'),
            ('TRAIN.CLASS_WEIGHTS', train.CLASS_WEIGHTS, 'none'),
        ):
            if setting != off:
                raise ConfigError(
                    f'{name} {setting} is for images of one class each, and DATA.MULTI_LABEL is True: write '
                    f'{name} {off}'
                )
    if train.LOSS == 'bce' and train.BCE_THRESHOLD is not None:
        off = smoothing / (2 if data.MULTI_LABEL else max(config.MODEL.NUM_CLASSES, 1))
        low, high = round(off, 6), round(1 - smoothing + off, 6)
        if not low <= train.BCE_THRESHOLD < high:
            raise ConfigError(
                f'TRAIN.BCE_THRESHOLD is {train.BCE_THRESHOLD}, and with MODEL.LABEL_SMOOTHING {smoothing}, targets '
                f'are {low} or {high}, both on one side of it: write a value between them, or None'
            )


def _check_sizes(config: CfgNode) -> None:
    """Check the keys of progressive resizing, and that the network can be built for each size."""
    data = config.DATA
    sizes, epochs, batches = data.IMG_SIZES, data.IMG_SIZE_EPOCHS, data.IMG_SIZE_BATCHES
    if not sizes:
        return
    is_ordered = len(epochs) == len(sizes) and epochs[0] == 0 and sorted(set(epochs)) == epochs
    if not is_ordered or epochs[-1] >= config.TRAIN.EPOCHS:
        raise ConfigError(
            f'DATA.IMG_SIZE_EPOCHS is {epochs}: write the first epoch of each of the {len(sizes)} DATA.IMG_SIZES, in '
            f'order, from 0 on and below TRAIN.EPOCHS, {config.TRAIN.EPOCHS}'
        )
    if batches and len(batches) != len(sizes):
        raise ConfigError(
            f'DATA.IMG_SIZE_BATCHES is {batches}: write one for each of {len(sizes)} DATA.IMG_SIZES, or []'
        )
    if config.TRAIN.LR_SCHEDULER.NAME == 'step' and config.TRAIN.LR_SCHEDULER.UNIT == 'update':
        raise ConfigError(
            'DATA.IMG_SIZES changes the number of updates per epoch, and the step schedule counts them: write '
            'TRAIN.LR_SCHEDULER.UNIT epoch'
        )
    if config.THROUGHPUT_MODE:
        raise ConfigError('--throughput times one image size: leave out DATA.IMG_SIZES, and write DATA.IMG_SIZE')
    try:
        check_sizes(config)
        for size in sizes:
            check_network(config, img_size=size)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_schedule(config: CfgNode) -> None:
    """Refuse a step schedule whose learning rate never drops within the run.

    Raises:
        ConfigError: the learning rate never drops.
    """
    epochs, schedule = config.TRAIN.EPOCHS, config.TRAIN.LR_SCHEDULER
    if schedule.NAME == 'step' and epochs <= schedule.DECAY_EPOCHS:
        raise ConfigError(
            f'TRAIN.LR_SCHEDULER.DECAY_EPOCHS is {schedule.DECAY_EPOCHS}, so that the learning rate never drops: write '
            f'less than TRAIN.EPOCHS, {epochs}'
        )


TREE = ConfigTree('classification', _C, _check)
