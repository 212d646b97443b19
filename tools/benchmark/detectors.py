"""Time whole detectors with random weights, interleaved in one process.

A detector infers one random image, or makes a training step on it. Inference keeps all proposals and detections,
whatever their score. The last detector is the peer that the others are compared with.
"""

import argparse
from collections.abc import Sequence
from itertools import product

import torch
import torchvision
from torch import Tensor, nn

from detection.config import load_config
from detection.models import build_detector
from engine.config_tree import ConfigError, add_options
from engine.distributed import choose_device
from models.pyramid import Size
from tools.benchmark.cases import MODES, BenchmarkCase, Setting, add_timing_flags
from tools.benchmark.comparison import available_settings, compare, require_distinct_names
from tools.benchmark.report import write_groups
from utils import positive_int

PRECISIONS = ('fp32', 'tf32', 'bf16', 'fp16')
TORCHVISION = 'torchvision:'
OBJECTS = 20  # of the image of an update
BOX_SIZES = 20, 270  # in pixels


class DetectorCase(BenchmarkCase):
    """A detector, on random images with random objects.

    Args:
        network: a detector with torchvision's interface, which leaves images of the setting's size as they are.
        setting, device: see `BenchmarkCase`.
    """

    def __init__(self, network: nn.Module, setting: Setting, device: torch.device):
        super().__init__(network, setting, device)
        size = Size.of(setting.size)
        self.images = [torch.rand(3, *size, device=device) for _ in range(setting.batch)]
        self.targets = []
        if setting.mode == 'train':
            objects = {key: value.to(device) for key, value in random_objects(size).items()}
            self.targets = [objects] * setting.batch

    def infer(self) -> list[dict[str, Tensor]]:
        """Detections of each image, with masks."""
        return self.compiled(self.images)

    def loss(self) -> Tensor:
        """The sum of the detector's losses."""
        return sum(self.compiled(self.images, self.targets).values())

    def batch_tensors(self) -> list[Tensor]:
        """Images, and the objects that they share."""
        return [*self.images, *(value for target in self.targets[:1] for value in target.values())]


def build_network(name: str, size: Size, opts: Sequence[str] = ()) -> nn.Module:
    """Build a detector that leaves the image's size and keeps every detection, whatever its score.

    Args:
        name: a config file of detection, or `torchvision:NAME`.
        size: of the image, in pixels.
        opts: config keys and values.

    Raises:
        ConfigError: the name is unknown, or of another kind of network.
    """
    short, long = min(size), max(size)
    if name.startswith(TORCHVISION):
        plain = name.removeprefix(TORCHVISION)
        if plain not in torchvision.models.list_models(torchvision.models.detection):
            raise ConfigError(f'no detector {name!r}: give a config file, or a name that torchvision lists')
        options = {'weights': None, 'weights_backbone': None, 'min_size': short, 'max_size': long}
        try:
            return torchvision.models.get_model(plain, **options, box_score_thresh=0.0)
        except TypeError as error:
            raise ConfigError(
                f'{name} cannot be measured, as it is not of the family of Faster R-CNN: {error}'
            ) from error
    network = build_detector(load_config(name, ['INPUT.TEST_SHORT', short, 'INPUT.MAX_LONG', long, *opts]))
    network.roi_heads.min_score = 0.0
    return network


def random_objects(size: Size) -> dict[str, Tensor]:
    """Ground truth of an image: boxes, labels, and masks that fill the boxes."""
    generator, limits = torch.Generator().manual_seed(0), torch.tensor([size.width, size.height])
    low, high = BOX_SIZES
    sides = (torch.rand(OBJECTS, 2, generator=generator) * (high - low) + low).minimum(0.9 * limits)
    corner = torch.rand(OBJECTS, 2, generator=generator) * (limits - sides)
    boxes = torch.cat((corner, corner + sides), dim=1)
    masks = torch.zeros(OBJECTS, *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return {
        'boxes': boxes,
        'labels': torch.ones(OBJECTS, dtype=torch.long),
        'masks': masks,
        'keypoints': torch.zeros(OBJECTS, 17, 3),
    }


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `detectors`."""
    add = parser.add_argument
    add('detectors', nargs='+', metavar='DETECTOR', help='config file of detection, or torchvision:NAME')
    add(
        '--modes',
        nargs='+',
        choices=MODES,
        default=list(MODES),
        help='train is a training step: losses, backward, clipping and AdamW (default: both)',
    )
    add(
        '--precisions',
        nargs='+',
        choices=PRECISIONS,
        default=['fp32'],
        help='bf16 and fp16 are autocast (default: fp32)',
    )
    add('--height', type=positive_int, default=800, metavar='N', help='height of the image, in pixels (default: 800)')
    add('--width', type=positive_int, default=1280, metavar='N', help='width of the image, in pixels (default: 1280)')
    add_timing_flags(parser, rounds=3)
    add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Measure the detectors that the command line names."""
    require_distinct_names(args.detectors)
    device, size = choose_device(args.device), Size(args.height, args.width)
    settings = [
        Setting(mode, precision, batch=1, size=size, threads=threads)
        for mode, precision, threads in product(args.modes, args.precisions, args.threads)
    ]
    settings = available_settings(settings, device)

    def build_case(name: str, setting: Setting) -> DetectorCase:
        return DetectorCase(build_network(name, size, args.opts), setting, device)

    write_groups(compare(args.detectors, settings, build_case, args.rounds, device), args.output, device)
