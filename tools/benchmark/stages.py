"""Time inference of an MSG-Transformer's embedding, stages and head separately, and of the whole network.

As in inference, the last stage computes only the classifier input: its MSG tokens, unless the config says otherwise.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from config import load_config
from engine.config_tree import add_options
from engine.distributed import choose_device
from models import MSGTransformer
from models.msg_block import MSGStage
from tools.benchmark.cases import DEVICES
from tools.benchmark.comparison import Result
from tools.benchmark.report import write_groups
from tools.benchmark.timing import time_interleaved
from tools.msg_network import build_msg_network
from utils import positive_int


def forward_parts(model: MSGTransformer, images: Tensor) -> dict[str, Callable[[], Any]]:
    """Calls that compute the parts of a network, each from the output of the one before, and the whole as `total`.

    Args:
        model: the network.
        images: (B, in_chans, height, width).
    """
    calls: dict[str, Callable[[], Any]] = {'embedding': partial(model.embed, images)}
    tokens = calls['embedding']()
    for number, stage in enumerate(model.layers, start=1):
        is_last = number == len(model.layers)  # as in `forward_features`
        run = partial(stage, msg_only=model.head_reads_msg) if is_last else partial(_run_and_merge, stage)
        calls[f'stage {number}'] = partial(run, *tokens)
        tokens = calls[f'stage {number}']()
    patches, msg = tokens
    read = msg if model.head_reads_msg else patches
    return calls | {'head': lambda: model.forward_head(model.norm(read)), 'total': partial(model, images)}


def _run_and_merge(stage: MSGStage, patches: Tensor, msg: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return stage.merge(*stage(patches, msg))


@torch.inference_mode()
def time_parts(model: MSGTransformer, device: torch.device, batch: int = 1, rounds: int = 10) -> dict[str, list[float]]:
    """Time inference of each part of a network, interleaved.

    Args:
        model: the network, on the device.
        device: device to run on.
        batch: images.
        rounds: how often each part is timed.

    Returns:
        Seconds in each round, by the names of `forward_parts`.
    """
    calls = forward_parts(model.eval(), torch.randn(batch, model.in_chans, *model.img_size, device=device))
    for call in calls.values():
        call()
    return time_interleaved(calls, rounds, device)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `stages`."""
    add = parser.add_argument
    add('config', metavar='FILE', help='config file of an MSG-Transformer')
    add('--batch', type=positive_int, default=1, metavar='N', help='images per batch (default: 1)')
    add('--rounds', type=positive_int, default=10, metavar='N', help='times that each stage is timed (default: 10)')
    add('--device', choices=DEVICES, default='auto', help='auto takes a GPU if there is one (default: auto)')
    add_options(parser)


def run(args: argparse.Namespace) -> None:
    """Measure the stages of the network that the command line names."""
    device = choose_device(args.device)
    model = build_msg_network(load_config(args.config, args.opts)).to(device)
    setting = f'inference, fp32, eager, batch {args.batch}, {model.img_size} px'
    times = time_parts(model, device, args.batch, args.rounds)
    write_groups([[Result(name, setting, values, args.batch) for name, values in times.items()]], args.output, device)
