r"""Time whole detectors, interleaved in one process: evaluation of an image, or a training step on it.

    python -m detection.tools.benchmark detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml \\
        torchvision:maskrcnn_resnet50_fpn --precisions fp32 bf16 --opts MODEL.BOX.DETECTIONS 50

Weights and image are random. An evaluation has all its proposals and detections, each with a mask.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from detection.config import load_config
from detection.models import build_detector
from engine.config_tree import ConfigError
from engine.distributed import choose_device
from engine.memory import peak_allocation, resident_bytes
from engine.precision import Precision
from engine.timing import Quartiles, time_interleaved
from utils import environment, exit_on_user_error, positive_int

MODES = ('inference', 'train')
PRECISIONS = {'fp32': torch.float32, 'bf16': torch.bfloat16}
TORCHVISION = 'torchvision:'
OBJECTS = 20  # of the image of a training step
BOX_SIZES = 20, 270  # in pixels


class DetectorCase:
    """A detector in one mode and precision: a call evaluates an image, or trains on it.

    Args:
        name: config file, or `torchvision:<name>`.
        mode: 'inference'; or 'train': forward, losses, backward and AdamW.
        precision: 'fp32', or autocast to 'bf16'.
        height: of the image, in pixels.
        width: of the image, in pixels.
        device: device to run on.
        opts: config keys and values.

    Raises:
        ConfigError: it cannot be built.
    """

    def __init__(
        self, name: str, mode: str, precision: str, height: int, width: int, device: torch.device, opts: Sequence[str]
    ):
        self.model = build(name, height, width, opts).to(device).train(mode == 'train')
        self.precision = Precision('O1' if precision == 'bf16' else 'O0', PRECISIONS[precision], device)
        self.images, self.target, self.optimizer = [torch.rand(3, height, width, device=device)], None, None
        if mode == 'train':
            self.target = {key: value.to(device) for key, value in random_objects(height, width).items()}
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)

    def __call__(self) -> None:
        """Run once."""
        if self.optimizer is None:
            with torch.inference_mode(), self.precision.autocast():
                self.model(self.images)
            return
        with self.precision.autocast():
            loss = sum(self.model(self.images, [self.target]).values())
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def peak_memory(self) -> int:
        """Peak bytes of a run after the first: weights, buffers and AdamW's moments, and what the run allocates."""
        return resident_bytes(self.model, self.optimizer) + peak_allocation(self, self.images[0].device)


def build(name: str, height: int, width: int, opts: Sequence[str]) -> nn.Module:
    """Build a detector that leaves the image's size and keeps every detection, whatever its score.

    Raises:
        ConfigError: the name is unknown, or the config cannot be used.
    """
    short, long = sorted((height, width))
    if name.startswith(TORCHVISION):
        plain = name.removeprefix(TORCHVISION)
        if plain not in torchvision.models.list_models(torchvision.models.detection):
            raise ConfigError(f'torchvision has no detector {plain!r}: see torchvision.models.list_models()')
        options = {'weights': None, 'weights_backbone': None, 'min_size': short, 'max_size': long}
        try:
            return torchvision.models.get_model(plain, **options, box_score_thresh=0.0)
        except TypeError as error:
            raise ConfigError(
                f'{name} cannot be measured, as it is not of the family of Faster R-CNN: {error}'
            ) from error
    sizes = ['INPUT.TEST_SHORT', str(short), 'INPUT.MAX_LONG', str(long)]
    model = build_detector(load_config(name, [*sizes, *opts]))
    model.roi_heads.min_score = 0.0
    return model


def random_objects(height: int, width: int) -> dict[str, Tensor]:
    """Ground truth of an image: boxes, labels, and masks that fill the boxes."""
    generator, size = torch.Generator().manual_seed(0), torch.tensor([width, height])
    low, high = BOX_SIZES
    sides = (torch.rand(OBJECTS, 2, generator=generator) * (high - low) + low).minimum(0.9 * size)
    corner = torch.rand(OBJECTS, 2, generator=generator) * (size - sides)
    boxes = torch.cat((corner, corner + sides), dim=1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    return {
        'boxes': boxes,
        'labels': torch.ones(OBJECTS, dtype=torch.long),
        'masks': masks,
        'keypoints': torch.zeros(OBJECTS, 17, 3),
    }


def table(times: dict[tuple[str, str], list[float]], memory: dict[tuple[str, str], int], mode: str) -> str:
    """A Markdown table of one mode; the first row is what others are compared with, round by round."""
    lines = [f'| {mode} | s (quartiles) | x as fast as the first row | memory, MB |', '|---|---|---|---|']
    first = next(iter(times.values()))
    for (name, precision), seconds in times.items():
        median, low, high = Quartiles.from_values(seconds)
        ratio = Quartiles.from_values([a / b for a, b in zip(first, seconds, strict=True)])
        stem = name if name.startswith(TORCHVISION) else Path(name).stem
        lines.append(
            f'| {stem}, {precision} | {median:.2f} ({low:.2f} to {high:.2f}) | {ratio.median:.2f} ({ratio.low:.2f} to '
            f'{ratio.high:.2f}) | {memory[name, precision] / 2**20:.0f} |'
        )
    return '\n'.join(lines)


def main() -> None:
    """Read the command line, measure, print and perhaps write."""
    parser = argparse.ArgumentParser('python -m detection.tools.benchmark', description=__doc__.splitlines()[0])
    add = parser.add_argument
    add('detectors', nargs='+', metavar='DETECTOR', help='config files, or torchvision:NAME')
    add('--modes', nargs='+', choices=MODES, default=list(MODES), help='train: forward, losses, backward, update')
    add('--precisions', nargs='+', choices=PRECISIONS, default=['fp32'], help='bf16 is autocast')
    add('--height', type=positive_int, default=800, metavar='N', help='of the image, in pixels (800)')
    add('--width', type=positive_int, default=1280, metavar='N', help='of the image, in pixels (1280)')
    add('--rounds', type=positive_int, default=3, metavar='N', help='how often each is timed (3)')
    add('--device', choices=['auto', 'cuda', 'mps', 'cpu'], default='auto', help='auto: a GPU if there is one')
    add('--opts', nargs='+', action='extend', default=[], metavar='KEY VALUE', help='config keys and values of all')
    args = parser.parse_args()
    torch.manual_seed(0)
    with exit_on_user_error():
        device = choose_device(args.device)
        detectors = list(dict.fromkeys(args.detectors))
        for mode in args.modes:
            cases = {
                key: DetectorCase(key[0], mode, key[1], args.height, args.width, device, args.opts)
                for key in product(detectors, args.precisions)
            }
            for case in cases.values():
                case()
            times = time_interleaved(cases, args.rounds, device)
            memory = {key: case.peak_memory() for key, case in cases.items()}
            print(table(times, memory, f'{mode}, {args.width} x {args.height}'), end='\n\n', flush=True)
        print(' | '.join(f'{name} {value}' for name, value in environment(device).items()))


if __name__ == '__main__':
    main()
