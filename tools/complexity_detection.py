"""Print parameters and multiply-adds of detectors' config files, without their weights.

    python -m tools.complexity_detection detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml [more files]

The published counts are on an image of 1280 x 800 with 1000 proposals and 100 detections; all products of matrices and
convolutions are counted over the real modules, norms, biases and activations are not.
"""

import argparse
from typing import NamedTuple

import torch
from yacs.config import CfgNode

from detection.config import load_config
from detection.models import build_detector
from timing import multiply_adds
from utils import mistakes_in_one_line


class Complexity(NamedTuple):
    """Parameters, and multiply-adds of one image."""

    parameters: int
    multiply_adds: int


def complexity(
    config: CfgNode, height: int = 800, width: int = 1280, proposals: int = 1000, detections: int = 100
) -> Complexity:
    """Count a detector on one image.

    Args:
        config: the config tree of detection.
        height: of the image as the network sees it, in pixels.
        width: likewise.
        proposals: regions that each stage's box head sees.
        detections: regions that each stage's mask head sees.
    """
    with torch.device('meta'):
        model = build_detector(config).eval()
        heads, channels = model.roi_heads, config.MODEL.FPN_CHANNELS

        def run() -> None:
            model.rpn.head(list(model.backbone(torch.empty(1, 3, height, width)).values()))
            for count, pool, of_stages in (
                (proposals, heads.box_pool, heads.box_heads),
                (detections, heads.mask_pool, heads.mask_heads),
            ):
                for head in of_stages:
                    head(torch.empty(count, channels, pool.size, pool.size))

        return Complexity(sum(p.numel() for p in model.parameters()), multiply_adds(run))


def main() -> None:
    """Read the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', metavar='FILE', help='YAML configs')
    args = parser.parse_args()
    with mistakes_in_one_line():
        counted = {config.MODEL.NAME: complexity(config) for config in map(load_config, args.configs)}
    print('| detector | parameters | multiply-adds at 1280 x 800 |')
    print('|---|---|---|')
    for name, each in counted.items():
        print(f'| {name} | {each.parameters:,} | {each.multiply_adds / 1e9:.2f}G |')


if __name__ == '__main__':
    main()
