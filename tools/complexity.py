"""Print parameters and multiply-adds of config files of both tasks, without their weights.

    python -m tools.complexity configs/msg_tiny_p4_win7_224.yaml
    python -m tools.complexity detection/configs/cascade_mask_rcnn_msg_tiny_3x.yaml

Two counts: the authors' formula (classification only), and the matmuls and convolutions of the real operators, without
norms, biases, softmax and GELU. Detectors are counted as published: 1280 x 800 pixels, 1000 proposals, 100 detections.
"""

import argparse
from functools import partial
from typing import NamedTuple

import torch
from yacs.config import CfgNode

import config as classification
import detection.config
from detection.models import build_detector
from engine.config_tree import ConfigError
from models import build_model
from tools.flops import count_multiply_adds
from utils import exit_on_user_error


class Complexity(NamedTuple):
    """Parameters, and multiply-adds of one image by the authors' formula, if there is one, and as measured."""

    name: str
    image: str
    parameters: int
    formula: int | None
    measured: int


def classifier_complexity(config: CfgNode) -> Complexity:
    """Count a classifier; of an MSG-Transformer every token of every stage, as published.

    Training computes fewer tokens in the last block.
    """
    size = config.DATA.IMG_SIZE
    with torch.device('meta'):
        model = build_model(config)
        image = torch.empty(1, config.MODEL.MSG.IN_CHANS, size, size)
        if config.MODEL.TYPE == 'msg':
            measured = count_multiply_adds(lambda: model.forward_head(model.forward_intermediates(image)[0]))
        else:
            measured = count_multiply_adds(partial(model.eval(), image))
    parameters, formula = sum(p.numel() for p in model.parameters()), getattr(model, 'flops', lambda: None)()
    return Complexity(config.MODEL.NAME, f'{size} x {size}', parameters, formula, measured)


def detector_complexity(
    config: CfgNode, height: int = 800, width: int = 1280, proposals: int = 1000, detections: int = 100
) -> Complexity:
    """Count a detector.

    Args:
        config: the config tree of detection.
        height: height of the resized image, in pixels.
        width: width of the resized image, in pixels.
        proposals: RoIs of each stage's box head.
        detections: RoIs of each stage's mask head.
    """
    with torch.device('meta'):
        model = build_detector(config).eval()
        heads, channels = model.roi_heads, config.MODEL.FPN_CHANNELS

        def forward() -> None:
            model.rpn.head(list(model.backbone(torch.empty(1, 3, height, width)).values()))
            parts = [(proposals, heads.box_pool, heads.box_heads)]
            if heads.mask_heads is not None:
                parts.append((detections, heads.mask_pool, heads.mask_heads))
            for count, pool, stages in parts:
                for head in stages:
                    head(torch.empty(count, channels, pool.size, pool.size))

        measured = count_multiply_adds(forward)
    parameters = sum(p.numel() for p in model.parameters())
    return Complexity(config.MODEL.NAME, f'{width} x {height}', parameters, None, measured)


def complexity(cfg_file: str) -> Complexity:
    """Count the network of a config file of either task.

    Raises:
        ConfigError: a file that cannot be used.
    """
    try:
        return classifier_complexity(classification.load_config(cfg_file))
    except ConfigError as error:
        try:
            return detector_complexity(detection.config.load_config(cfg_file))
        except ConfigError as detection_error:
            is_detection = 'write one of msg' in str(error)  # its MODEL.TYPE is not a classifier's
            raise (detection_error if is_detection else error) from None


def main() -> None:
    """Read the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', metavar='FILE', help='YAML configs')
    args = parser.parse_args()
    with exit_on_user_error():
        rows = [complexity(path) for path in args.configs]
    print('| model | image | parameters | multiply-adds, formula | multiply-adds, measured |')
    print('|---|---|---|---|---|')
    for row in rows:
        formula = '' if row.formula is None else f'{row.formula:,}'
        print(f'| {row.name} | {row.image} | {row.parameters:,} | {formula} | {row.measured:,} |')


if __name__ == '__main__':
    main()
