"""An MSG-Transformer stage by stage: tokens, channels, heads, blocks, parameters, multiply-adds and time.

Patch merging is counted in the stage before it, the MSG tokens in the embedding, and the final norm in the head.
Multiply-adds follow the authors' formula, with every token of every stage. Times are those of `tools.benchmark.stages`.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from models import MSGTransformer
from models.exchange import NoExchange
from models.pyramid import Size, patch_grids
from tools.benchmark.timing import Quartiles


class Part(NamedTuple):
    """The embedding, a stage, the head, or all of them.

    Attributes:
        name: name of the part.
        patches: the patch grid; None, like the attributes below, where the part has none.
        windows: the window grid, which is also that of the MSG tokens.
        window: window size, in patches.
        region: size of a shuffle region, in windows; 1 where nothing is exchanged.
        channels: channels of a token that enters the blocks, or of the classifier input.
        heads: attention heads.
        blocks: number of blocks.
        parameters: number of parameters.
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
        layout = grid, grid.divided_by(w), w, 1 if isinstance(block.exchange, NoExchange) else block.shuffle_size
        sizes = model.feature_info[i]['num_chs'], block.attn.num_heads, len(stage.blocks)
        parts.append(Part(f'stage {i + 1}', *layout, *sizes, parameters[i + 1], stage.flops(grid), has_msg))
    first, total = parts[0], model.flops()
    flops = model.patch_embed.flops(grids[0])
    embedding = Part('embedding', *first[1:3], None, None, first.channels, None, None, parameters[0], flops, has_msg)
    rest = total - flops - sum(part.flops for part in parts)
    head = Part('head', None, None, None, None, model.num_features, None, None, parameters[-1], rest)
    blocks = sum(part.blocks for part in parts)
    return [embedding, *parts, head, Part('total', *[None] * 6, blocks, sum(parameters), total)]


def table(parts: Sequence[Part], times: Mapping[str, Sequence[float]] | None = None) -> str:
    """Parts as a Markdown table, with a column of median times if seconds are given by the parts' names."""
    columns = ['', 'patches', 'windows', 'window', 'region', 'tokens', 'channels', 'heads', 'blocks']
    columns += ['parameters', 'multiply-adds'] + ['time, ms'] * (times is not None)
    rows = []
    for part in parts:
        window = None if part.window is None else Size.of(part.window)
        region = 'none' if part.region == 1 else None if part.region is None else Size.of(part.region)
        row = [part.name, part.patches, part.windows, window, region, part.tokens, part.channels, part.heads]
        row += [part.blocks, part.parameters, part.flops]
        if times is not None:
            row.append(f'{1000 * Quartiles.from_values(times[part.name]).median:.2f}')
        rows.append(row)
    lines = [columns, ['---'] * 5 + ['---:'] * (len(columns) - 5), *rows]
    return '\n'.join(f'| {" | ".join(map(_cell, line))} |' for line in lines)


def _cell(value: object) -> str:
    return '' if value is None else f'{value:,}' if isinstance(value, int) else str(value)
