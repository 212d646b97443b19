"""Print parameters and multiply-adds of config files: by the authors' formula, and measured over the real operators.

python -m tools.complexity configs/msg_tiny_p4_win7_224.yaml [more files]
"""

import argparse
from typing import NamedTuple

import torch
from torch import nn

from config import load_config
from models import build_model
from timing import multiply_adds
from utils import mistakes_in_one_line


class Complexity(NamedTuple):
    """Parameters, and multiply-adds of one image by the formula and as measured."""

    parameters: int
    formula: int
    measured: int


def complexity(model: nn.Module, channels: int, size: int) -> Complexity:
    """Count a network on one image of `channels` x `size` x `size`.

    The measure counts matmuls and convolutions, without norms, biases, softmax and GELU; the formula counts norms too.
    Both are of all tokens, as published; a classifier leaves out of its last block what nothing reads.
    """
    image = torch.zeros(1, channels, size, size)
    measured = multiply_adds(lambda: model.forward_head(model.forward_intermediates(image)[0]))
    return Complexity(sum(p.numel() for p in model.parameters()), model.flops(), measured)


def main() -> None:
    """Read the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('configs', nargs='+', metavar='FILE', help='YAML configs')
    args = parser.parse_args()
    with mistakes_in_one_line():
        configs = [load_config(path) for path in args.configs]
        models = [build_model(config) for config in configs]
    print('| model | image | parameters | multiply-adds, formula | measured |')
    print('|---|---|---|---|---|')
    for config, model in zip(configs, models, strict=True):
        counted = complexity(model, config.MODEL.MSG.IN_CHANS, config.DATA.IMG_SIZE)
        print(
            f'| {config.MODEL.NAME} | {config.DATA.IMG_SIZE} | {counted.parameters:,} | '
            f'{counted.formula:,} | {counted.measured:,} |'
        )


if __name__ == '__main__':
    main()
