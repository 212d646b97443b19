"""Summarise a classifier stage by stage: tokens, channels, heads, blocks, parameters, multiply-adds and time.

    python -m tools.summary configs/msg_tiny_p4_win7_224.yaml

A stage ends with its merging, the embedding has the MSG tokens, the head has the last norm. Multiply-adds follow the
authors' formula, with every token of every stage. Times are those of inference, which computes no more than the MSG
tokens in the last block; each part is timed apart from the others, and the network as a whole.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import load_config
from engine.config_tree import ConfigError
from engine.distributed import choose_device
from engine.timing import time_interleaved
from models import MSGTransformer
from models.msg_block import MSGStage
from models.pyramid import Size, patch_grids
from tools.msg_network import build_msg_network
from utils import exit_on_user_error, positive_int

EPILOG = """
example:
  python -m tools.summary configs/msg_tiny_p4_win7_224.yaml --img-size 384 640
"""


class Part(NamedTuple):
    """The embedding, a stage, the head, or all of them.

    Attributes:
        name: of the part.
        patches: the patch grid; None where the part has no tokens of its own, as for what follows.
        windows: the window grid, which is also that of the MSG tokens.
        window: window size, in patches.
        region: size of a shuffle region, in windows; 1 where nothing is shuffled.
        channels: of a token that goes into the blocks, or of what the head reads.
        heads: attention heads.
        blocks: number of them.
        parameters: number of them.
        flops: multiply-adds for one image.
        has_msg: whether its windows have MSG tokens.
    """

    name: str
    patches: Size | None
    windows: Size | None
    window: int | None
    region: int | None
    channels: int | None
    heads: int | None
    blocks: int | None
    parameters: int
    flops: int
    has_msg: bool = True

    @property
    def tokens(self) -> int | None:
        """Patches and MSG tokens."""
        if self.patches is None or self.windows is None:
            return None
        patches, windows = (size.height * size.width for size in (self.patches, self.windows))
        return patches + windows * self.has_msg


def summarise(model: MSGTransformer) -> list[Part]:
    """The embedding, the stages, the head, and the total, for the image size of the network."""
    grids = patch_grids(model.img_size, model.patch_embed.patch_size, len(model.layers))
    parameters = [0] * (len(grids) + 2)  # embedding, stages, head
    for name, parameter in model.named_parameters():
        top, *rest = name.split('.')
        index = 1 + int(rest[0]) if top == 'layers' else -1 if top in ('norm', 'head') else 0
        parameters[index] += parameter.numel()
    parts, has_msg = [], model.msg_tokens is not None
    for i, (stage, grid) in enumerate(zip(model.layers, grids, strict=True)):
        block, w = stage.blocks[0], stage.window_size
        layout = grid, grid.divided_by(w), w, block.shuffle_size
        sizes = model.feature_info[i]['num_chs'], block.attn.num_heads, len(stage.blocks)
        parts.append(Part(f'stage {i + 1}', *layout, *sizes, parameters[i + 1], stage.flops(grid), has_msg))
    first, total = parts[0], model.flops()
    flops = model.patch_embed.flops(grids[0])
    embedding = Part('embedding', *first[1:3], None, None, first.channels, None, None, parameters[0], flops, has_msg)
    rest = total - flops - sum(part.flops for part in parts)
    head = Part('head', None, None, None, None, model.num_features, None, None, parameters[-1], rest)
    blocks = sum(part.blocks for part in parts)
    return [embedding, *parts, head, Part('total', *[None] * 6, blocks, sum(parameters), total)]


def forward_parts(model: MSGTransformer, images: Tensor) -> list[Callable[[], Any]]:
    """Calls that compute the parts of `summarise`, each from the one before; the last computes the whole.

    Args:
        model: the network.
        images: (B, in_chans, height, width).
    """
    calls: list[Callable[[], Any]] = [partial(model.embed, images)]
    *stages, last = model.layers
    for stage in stages:
        calls.append(partial(_run_and_merge, stage, *calls[-1]()))
    calls.append(partial(last, *calls[-1](), msg_only=model.head_reads_msg))  # as in `forward_features`
    patches, msg = calls[-1]()
    tokens = msg if model.head_reads_msg else patches
    return [*calls, lambda: model.forward_head(model.norm(tokens)), partial(model, images)]


def _run_and_merge(stage: MSGStage, patches: Tensor, msg: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return stage.merge(*stage(patches, msg))


@torch.inference_mode()
def time_parts(model: MSGTransformer, device: torch.device, rounds: int = 10) -> list[float]:
    """Median seconds of each part of `summarise` for one image.

    Args:
        model: the network, on the device.
        device: where it runs.
        rounds: how often each part is timed.
    """
    images = torch.randn(1, model.in_chans, *model.img_size, device=device)
    calls = forward_parts(model.eval(), images)
    for call in calls:
        call()
    times = time_interleaved(dict(enumerate(calls)), rounds, device)
    return [statistics.median(times[i]) for i in range(len(calls))]


def table(parts: list[Part], seconds: list[float] | None = None) -> str:
    """A Markdown table, with a column of times if they are given."""
    columns = ['', 'patches', 'windows', 'window', 'region', 'tokens', 'channels', 'heads', 'blocks']
    columns += ['parameters', 'multiply-adds'] + ['time, ms'] * (seconds is not None)
    rows = []
    for i, part in enumerate(parts):
        window = None if part.window is None else Size.of(part.window)
        region = 'none' if part.region == 1 else None if part.region is None else Size.of(part.region)
        row = [part.name, part.patches, part.windows, window, region, part.tokens, part.channels, part.heads]
        row += [part.blocks, part.parameters, part.flops]
        rows.append(row + ([f'{1000 * seconds[i]:.2f}'] if seconds is not None else []))
    lines = [columns, ['---'] * 5 + ['---:'] * (len(columns) - 5), *rows]
    return '\n'.join(f'| {" | ".join(map(_cell, line))} |' for line in lines)


def _cell(value: object) -> str:
    return '' if value is None else f'{value:,}' if isinstance(value, int) else str(value)


def build(args: argparse.Namespace) -> tuple[MSGTransformer, torch.device]:
    """Build the network that the command line names.

    Raises:
        ConfigError: it cannot be built.
    """
    try:
        config = load_config(args.config, args.opts)
    except ConfigError as error:
        if 'write one of msg' not in str(error):  # a detector's MODEL.TYPE
            raise
        raise ConfigError(f'{args.config} is not of a classifier; tools.complexity counts detectors too') from error
    device = choose_device(config.DEVICE)
    model = build_msg_network(config).to(device)
    if args.img_size:
        try:
            model.set_input_size(args.img_size * 2 if len(args.img_size) == 1 else args.img_size)
        except ValueError as error:
            raise ConfigError(f'--img-size: {error}') from error
    return model, device


def main() -> None:
    """Read the command line and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('config', metavar='FILE', help='YAML config of a classifier')
    add(
        '--img-size',
        nargs='+',
        type=positive_int,
        metavar='N',
        help='side, or height and width, in pixels (DATA.IMG_SIZE)',
    )
    add('--opts', nargs='+', default=[], metavar='KEY VALUE', help='config keys and values')
    add('--no-time', action='store_true', help='measure no times')
    args = parser.parse_args()
    if len(args.img_size or ()) > 2:
        parser.error('argument --img-size: write one number, or height and width')
    with exit_on_user_error():
        model, device = build(args)
    parts = summarise(model)
    if args.no_time:
        print(table(parts))
        return
    print(table(parts, time_parts(model, device)))
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    threads = f', {torch.get_num_threads()} thread(s)' if device.type == 'cpu' else ''
    print(f'\nTime: median of 10 rounds, one image of {model.img_size} pixels, fp32, not compiled, {name}{threads}')


if __name__ == '__main__':
    main()
