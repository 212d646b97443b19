"""Export a whole detector to ONNX (`tools.export --detector`), and check that the file finds the same objects."""

import argparse
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.transforms.functional import pil_to_tensor

from detection.export import FixedDetector, onnx_translations
from detection.exported import INPUTS, OUTPUTS, ExportedDetector, run_onnx_detector
from detection.main import TASK
from detection.models.build import Detector
from engine.checkpoint import load_checkpoint
from engine.predictor import Predictor, load_predictor
from models.pyramid import Size
from tools.export.check import load_images, time_against_others
from tools.export.formats import MAX_SIDE, OPSET, PACKAGES, write_onnx
from tools.export.network import ExportError
from tools.export.rewrite import rewrite_for_runtimes
from utils import environment, first_line, positive_int

CHECKED_IMAGES = 16  # at most

# Largest differences of two detections that are the same one
SCORE_TOLERANCE = 1e-3
BOX_TOLERANCE = 0.1  # pixels of the input
MASK_TOLERANCE = 0.01

Rows = tuple[Tensor, Tensor, Tensor, Tensor | None]


class Agreement(NamedTuple):
    """How two sets of detections of the same images agree.

    Attributes:
        detections: number of detections of eager execution.
        extra: number of detections of the file that eager execution does not have.
        missing: number of detections of eager execution that the file does not have.
        boxes, scores, masks: largest absolute difference of the detections that both have; boxes in pixels.
    """

    detections: int
    extra: int
    missing: int
    boxes: float
    scores: float
    masks: float

    def __str__(self) -> str:
        same = self.detections - self.missing
        more = f', and {self.extra} others' if self.extra else ''
        return (
            f'{same} of {self.detections} detections of eager execution{more}; largest difference: boxes '
            f'{self.boxes:.1e} pixels, scores {self.scores:.1e}, masks {self.masks:.1e}'
        )


def add_detector_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags for whole detectors."""
    add = parser.add_argument_group('whole detectors').add_argument
    add(
        '--detector',
        action='store_true',
        help='export the whole detector to ONNX, not only its backbone; needs --size HEIGHT WIDTH',
    )
    add('--batch-size', type=positive_int, metavar='N', help='number of images that the file takes at a time (1)')


def check_detector_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where flags do not go together with `--detector`."""
    if not args.detector:
        if args.batch_size is not None:
            parser.error('--batch-size is for whole detectors, since other files take any: add --detector')
        return
    if args.format != 'onnx':
        parser.error(f'--detector is for --format onnx: leave it out for {args.format}')
    if args.int8 or args.always_pad:
        parser.error(f'{"--int8" if args.int8 else "--always-pad"} is not for whole detectors: leave it out')
    if len(args.size) != 1:
        parser.error(
            '--detector needs one size, to which images are padded: --size HEIGHT WIDTH, as in --size 800 1344'
        )
    args.batch_size = args.batch_size or 1


def load_whole_detector(args: argparse.Namespace) -> Predictor:
    """Load the detector that the command line names, on the CPU, and check that it takes images of `--size`.

    Raises:
        UserError: the checkpoint is of another task or cannot be used, or the size is not one for it.
    """
    checkpoint = load_checkpoint(args.resume)
    if checkpoint['task'] != TASK.name:
        raise ExportError(f'{args.resume} is not a detector: leave out --detector to export a classifier')
    predictor = load_predictor(args, TASK, checkpoint=checkpoint)
    check_size(predictor, Size(*args.size[0]))
    return predictor._replace(model=predictor.model.cpu().requires_grad_(False))


def check_size(predictor: Predictor, size: Size) -> None:
    """Check the size of a file's images; a note on stderr says which images are made smaller than in evaluation.

    Raises:
        ExportError: a side is not a multiple of the coarsest stride, or too large.
    """
    multiple, short = predictor.model.transform.size_divisible, predictor.config.INPUT.TEST_SHORT
    if any(side % multiple for side in size):
        fitting = ' '.join(str(-(-side // multiple) * multiple) for side in size)
        raise ExportError(f'--size {size}: sides must be multiples of {multiple}: write --size {fitting}')
    if max(size) > MAX_SIDE:
        raise ExportError(f'--size {size}: sides are at most {MAX_SIDE} pixels')
    note = f'evaluation resizes the short side of images to {short} pixels (INPUT.TEST_SHORT): '
    if min(size) < short:
        print(f'{note}images that do not fit into {size} are made smaller', file=sys.stderr)
    elif size.height != size.width and min(size) < predictor.config.INPUT.MAX_LONG:
        turned = 'portrait' if size.height < size.width else 'landscape'
        print(f'{note}{turned} images that do not fit into {size} are made smaller', file=sys.stderr)


def write_detector(detector: Detector, size: Size, batch_size: int, file: Path) -> None:
    """Write a detector to an ONNX file for batches of one shape.

    Raises:
        ExportError: it cannot be exported.
    """
    graph = rewrite_for_runtimes(FixedDetector(detector, size).eval(), for_onnxruntime=True)
    inputs = torch.zeros(batch_size, 3, *size), torch.tensor([size] * batch_size, dtype=torch.float32)
    print('tracing', file=sys.stderr)
    try:
        with torch.no_grad():
            program = torch.export.export(graph, inputs)
    except Exception as error:  # documents no exceptions of its own
        raise ExportError(f'torch.export refuses this detector: {first_line(error)}') from error
    print('writing', file=sys.stderr)
    write_onnx(program, file, outputs_of(detector), None, INPUTS, onnx_translations(), only_fold=True)


def outputs_of(detector: Detector) -> list[str]:
    """Names of the outputs of a detector's file."""
    return [name for name in OUTPUTS if name != 'masks' or detector.roi_heads.mask_heads is not None]


@torch.inference_mode()
def detect_eagerly(detector: Detector, images: Tensor, sizes: Tensor) -> list[Rows]:
    """What the trained detector itself finds in a padded batch: boxes, scores, labels and masks of each image.

    Args:
        detector: in evaluation mode.
        images: normalised and padded, (B, 3, H, W).
        sizes: height and width of each image without padding, (B, 2).
    """
    shapes = [(height, width) for height, width in sizes.int().tolist()]
    features = detector.backbone(images)
    proposals, _ = detector.rpn(ImageList(images, shapes), features)
    results, _ = detector.roi_heads(features, proposals, shapes)
    return [(x['boxes'], x['scores'], x['labels'], x['masks'][:, 0] if 'masks' in x else None) for x in results]


def compare_detections(outputs: Iterable[Rows], expected: Iterable[Rows]) -> Agreement:
    """Match the detections of a file with those of eager execution, image by image.

    Two detections are the same one if they have the same label, and their boxes and scores are equal to within
    `BOX_TOLERANCE` and `SCORE_TOLERANCE`.

    Args:
        outputs: boxes, scores, labels and masks of each image, from the file; rows with a label of -1 are empty.
        expected: the same, from eager execution.
    """
    count, extra, missing, differences = 0, 0, 0, torch.zeros(3)
    for (boxes, scores, labels, masks), (own_boxes, own_scores, own_labels, own_masks) in zip(
        outputs, expected, strict=True
    ):
        found = labels > 0
        boxes, scores, labels = boxes[found], scores[found], labels[found]
        box_distance = (boxes[:, None] - own_boxes).abs().amax(dim=2)  # (n, m)
        score_distance = (scores[:, None] - own_scores).abs()
        is_same = (labels[:, None] == own_labels) & (box_distance <= BOX_TOLERANCE)
        is_same &= score_distance <= SCORE_TOLERANCE
        pairs = [(i, int(box_distance[i].where(row, torch.inf).argmin())) for i, row in enumerate(is_same) if row.any()]
        rows, columns = [i for i, _ in pairs], [j for _, j in pairs]
        count, extra = count + len(own_labels), extra + len(labels) - len(rows)
        missing += len(own_labels) - len(set(columns))
        if not pairs:
            continue
        parts = [box_distance[rows, columns].max(), score_distance[rows, columns].max(), torch.tensor(0.0)]
        if masks is not None:
            parts[2] = (masks[found][rows] - own_masks[columns]).abs().max()
        differences = torch.maximum(differences, torch.stack(parts))
    return Agreement(count, extra, missing, *differences.tolist())


def check_agreement(agreement: Agreement) -> None:
    """Check that a file finds what the detector finds.

    A few detections may differ, as rounding can decide whether a score or an IoU is above a threshold.

    Raises:
        ExportError: there is nothing to compare, or more than 1 % of the detections or a mask differs.
    """
    if not agreement.detections:
        raise ExportError(
            'the detector finds nothing in the images, so the file cannot be checked and is not kept: give images with '
            'objects (--images), or write --opts MODEL.BOX.SCORE 0 to export detections of all scores'
        )
    differing = max(agreement.extra, agreement.missing)
    if differing > 0.01 * agreement.detections or not agreement.masks <= MASK_TOLERANCE:
        raise ExportError(f'the file differs, and is not kept: it has {agreement}')


def export_detector(args: argparse.Namespace, predictor: Predictor, file: Path) -> dict[str, Any]:
    """Write a detector to an ONNX file, and compare what it finds in images with eager execution.

    Args:
        args: the command line.
        predictor: the detector.
        file: the file.

    Returns:
        The report, as plain data.

    Raises:
        ExportError: the detector cannot be exported, or the file fails or finds something else.
    """
    detector, size, batch_size = predictor.model, Size(*args.size[0]), args.batch_size
    images = [pil_to_tensor(image) / 255 for image in load_images(args.images, 'RGB', CHECKED_IMAGES)]
    write_detector(detector, size, batch_size, file)
    exported = ExportedDetector(predictor.config, size, batch_size, run_onnx_detector(file))
    outputs: list[Rows] = []
    expected: list[Rows] = []
    for first in range(0, len(images), batch_size):
        inputs = exported.prepare(images[first : first + batch_size])
        outputs += per_image(exported.run(*inputs))
        expected += detect_eagerly(detector, *inputs)
    agreement = compare_detections(outputs, expected)
    check_agreement(agreement)
    report = describe(predictor, size, batch_size) | {'agreement': agreement._asdict(), 'images': len(images)}
    if args.latency:
        calls = {
            'exported': lambda: exported.run(*inputs),
            'eager': lambda: detect_eagerly(detector, *inputs),
        }
        latency = time_against_others('exported', calls, args.rounds)
        report['latency'] = {'shape': list(inputs[0].shape), 'rounds': args.rounds, **latency.as_dict()}
    return report


def per_image(outputs: Sequence[Tensor]) -> list[Rows]:
    """Outputs of a batch as those of each image."""
    boxes, scores, labels, *masks = outputs
    return list(zip(boxes, scores, labels, masks[0] if masks else [None] * len(boxes), strict=True))


def describe(predictor: Predictor, size: Size, batch_size: int) -> dict[str, Any]:
    """What the file is, as plain data."""
    config = predictor.config
    box, outputs = config.MODEL.BOX, outputs_of(predictor.model)
    return {
        'format': 'onnx',
        'precision': 'fp32',
        'network': 'detector',
        'input': {'images': [batch_size, 3, *size], 'sizes': [batch_size, 2]},
        'outputs': outputs,
        'detections': box.DETECTIONS,
        'min_score': box.SCORE,
        'opset': OPSET,
        'preprocessing': {
            'exif_transpose': config.DATA.EXIF,
            'mode': 'RGB',
            'scale': 1 / 255,
            'mean': list(IMAGENET_DEFAULT_MEAN),
            'std': list(IMAGENET_DEFAULT_STD),
            'resize': {
                'shorter_side': config.INPUT.TEST_SHORT,
                'max_longer_side': config.INPUT.MAX_LONG,
                'interpolation': 'bilinear, without antialiasing',
            },
            'pad': 'zeros, on the right and at the bottom',
        },
        'classes': predictor.class_names,
        'environment': environment(torch.device('cpu')) | {name: version(name) for name in PACKAGES['onnx']},
        'config': yaml.safe_load(config.dump()),
    }
