"""Parameters and multiply-adds of networks of both tasks, counted without their weights."""

import inspect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from yacs.config import CfgNode

from detection.models import build_detector
from engine.task import Task
from models import build_model
from models.exchange import EXCHANGES
from models.pyramid import Size
from tools.flops import count_multiply_adds


class Complexity(NamedTuple):
    """Parameters, and multiply-adds of one image by the authors' formula, if there is one, and of real operators."""

    name: str
    image: str
    parameters: int
    formula: int | None
    measured: int


def count_complexity(task: Task, config: CfgNode) -> Complexity:
    """Count the network of a config, as published: a detector at 1280 x 800, with 1000 proposals and 100 detections."""
    return COUNTERS[task.name](config)


def count_classifier(config: CfgNode, size: Size | None = None) -> Complexity:
    """Count a classifier; of an MSG-Transformer every token of every stage, as published.

    Training computes fewer tokens in the last block.

    Args:
        config: the config tree.
        size: of the image, in pixels; None for `DATA.IMG_SIZE`. Another one is for MSG-Transformers only.
    """
    with torch.device('meta'):
        model = build_model(config).eval()
        if size is not None:
            model.set_input_size(size)
        size = size or Size.of(config.DATA.IMG_SIZE)
        image = torch.empty(1, config.MODEL.MSG.IN_CHANS, *size)
        if config.MODEL.TYPE == 'msg':
            measured = count_multiply_adds(lambda: model.forward_head(model.forward_intermediates(image)[0]))
        else:
            measured = count_multiply_adds(lambda: model(image))
    parameters, formula = sum(p.numel() for p in model.parameters()), getattr(model, 'flops', lambda: None)()
    return Complexity(config.MODEL.NAME, str(size), parameters, formula, measured)


def count_detector(
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


def count_exchanges(config: CfgNode) -> dict[str, Complexity]:
    """Count an MSG-Transformer with each registered exchange in all stages, by the exchange's name.

    Args:
        config: the config tree; its `MODEL.MSG.MANIP_TYPE` is not read.

    Raises:
        ValueError: the channels do not fit an exchange: see `MSGTransformer`.
    """
    counts = {}
    for name in EXCHANGES:
        other = config.clone()
        other.defrost()
        other.MODEL.MSG.MANIP_TYPE = name
        counts[name] = count_classifier(other)
    return counts


def exchange_table(counts: Mapping[str, Complexity]) -> str:
    """The counts of `count_exchanges` as a Markdown table, with the first line of each exchange's docstring."""
    lines = [
        '| exchange | what it does | parameters | multiply-adds, formula | multiply-adds, measured |',
        '|---|---|---|---|---|',
    ]
    for name, count in counts.items():
        summary = inspect.cleandoc(EXCHANGES[name].__doc__ or '').partition('\n')[0]
        lines.append(f'| `{name}` | {summary} | {count.parameters:,} | {count.formula:,} | {count.measured:,} |')
    return '\n'.join(lines)


COUNTERS = {'classification': count_classifier, 'detection': count_detector}


def table(rows: Sequence[Complexity]) -> str:
    """Counts as a Markdown table."""
    lines = [
        '| model | image | parameters | multiply-adds, formula | multiply-adds, measured |',
        '|---|---|---|---|---|',
    ]
    for row in rows:
        formula = '' if row.formula is None else f'{row.formula:,}'
        lines.append(f'| {row.name} | {row.image} | {row.parameters:,} | {formula} | {row.measured:,} |')
    return '\n'.join(lines)
