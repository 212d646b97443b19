"""How a network reads an image: attention of MSG tokens, influence between windows, Grad-CAM.

Letters: H x W a stage's patch grid, nH x nW its window grid, w window size, N = w^2 + 1 tokens in a window (the MSG
token first), C channels, h heads, s size of a shuffle region in windows. Stages and blocks count from 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models import MSGTransformer
from models.msg_block import MSGBlock
from models.windows import WindowPadding, join_windows, split_windows, window_padding


class StageTrace(NamedTuple):
    """The tokens of one image in one stage, part of the graph of all stages.

    Attributes:
        blocks: the stage's blocks.
        windows: what enters the stage, then the output of each block, each (1, nH, nW, N, C).
        padding: which tokens are padding, if any.
        grid: the patch grid (H, W), without padding.
    """

    blocks: Sequence[MSGBlock]
    windows: list[Tensor]
    padding: WindowPadding | None
    grid: tuple[int, int]

    @property
    def window_grid(self) -> tuple[int, int]:
        """The window grid (nH, nW)."""
        return tuple(self.windows[0].shape[1:3])

    @property
    def window_size(self) -> int:
        """The window size w."""
        return self.blocks[0].window_size


@torch.enable_grad()
def trace_blocks(model: MSGTransformer, image: Tensor) -> list[StageTrace]:
    """Run a network block by block and keep every token, with the graph of their gradients.

    Args:
        model: in evaluation mode.
        image: (1, in_chans, height, width); any size of at least one patch.

    Returns:
        The stages. All tokens are here, also in the last block, where a forward pass may compute only MSG tokens.
    """
    patches, msg = model.embed(image.detach().requires_grad_())
    stages = []
    for i, stage in enumerate(model.layers):
        if i > 0:
            patches, msg = model.layers[i - 1].merge(patches, msg)
        grid, w = tuple(patches.shape[1:3]), stage.window_size
        padding = window_padding(grid, w, patches.device)
        windows = [join_windows(patches, msg, w)]
        for block in stage.blocks:
            windows.append(block(windows[-1], padding))
        stages.append(StageTrace(stage.blocks, windows, padding, grid))
        patches, msg = split_windows(windows[-1], w, grid)
    return stages


@torch.enable_grad()
def traced_logits(model: MSGTransformer, stages: Sequence[StageTrace]) -> Tensor:
    """The logits (1, num_classes) of a trace; the pooled features without classes."""
    last = stages[-1]
    patches, msg = split_windows(last.windows[-1], last.window_size, last.grid)
    return model.forward_head(model.norm(msg if model.head_reads_msg else patches))


@torch.no_grad()
def msg_attention(stages: Sequence[StageTrace]) -> list[list[Tensor]]:
    """Attention of each window's MSG token over the patches of its window.

    Args:
        stages: from `trace_blocks`.

    Returns:
        For each stage and block (nH, nW, h, w, w). What is missing to a sum of 1 goes to the MSG token itself. Patches
        of padding can be attended to: their keys are the bias.
    """
    maps = []
    for stage in stages:
        weights = [
            attention_weights(block, windows, stage.padding, slice(0, 1)).squeeze(-2)
            for block, windows in zip(stage.blocks, stage.windows[:-1], strict=True)
        ]
        w = stage.window_size
        maps.append([weight[..., 1:].unflatten(-1, (w, w)) for weight in weights])
    return maps


def attention_weights(
    block: MSGBlock, windows: Tensor, padding: WindowPadding | None, queries: slice = slice(None)
) -> Tensor:
    """Attention of the tokens of each window over all tokens of their window.

    Args:
        block: whose attention.
        windows: what enters the block, (1, nH, nW, N, C).
        padding: which tokens are padding, if any.
        queries: the tokens that attend; all by default.

    Returns:
        (nH, nW, h, queries, N).
    """
    attn = block.attn
    qkv = attn.qkv(attention_input(block, windows, padding)[0]).unflatten(-1, (3, attn.num_heads, -1))
    q, k, _ = qkv.permute(3, 0, 1, 4, 2, 5)  # each (nH, nW, h, N, d)
    scores = (q[..., queries, :] * attn.scale) @ k.transpose(-2, -1) + attn.position_bias()[:, :, queries]
    return scores.softmax(dim=-1)


def attention_input(block: MSGBlock, windows: Tensor, padding: WindowPadding | None) -> Tensor:
    """What a block's attention gets of the windows (1, nH, nW, N, C) that enter the block: normed, padding zero."""
    x = block.norm1(windows)
    return x if padding is None else padding.zero(x)


def window_in_stage(window: tuple[int, int], stage: int) -> tuple[int, int]:
    """The window of a later stage that covers a window of the first: grids halve from stage to stage."""
    return window[0] >> stage, window[1] >> stage


def window_influence(
    stages: Sequence[StageTrace],
    stage: int,
    block: int,
    window: tuple[int, int],
    tokens: str = 'patches',
    source: int = 0,
    probes: int = 4,
) -> Tensor:
    """Measure how much a window's tokens, after a block, depend on each window that enters a stage.

    The measure is the Frobenius norm of the Jacobian: of the chosen tokens with respect to all tokens of a source
    window. It is estimated by backpropagating random signs, always the same ones: the mean square of what arrives is
    the squared norm. Where no path leads, it is exactly zero. A block's attention mixes the tokens of a window; the
    shuffle then brings its MSG token chunks of the region's others, so the MSG token's reach grows by a region in every
    block, and the patches' reach follows one block later.

    Args:
        stages: from `trace_blocks`.
        stage: stage of the chosen window.
        block: block of this stage, after which the tokens are taken.
        window: row and column of the chosen window in this stage's window grid.
        tokens: which tokens of the chosen window: 'patches' or 'msg'.
        source: the stage whose entering windows are compared, at most `stage`.
        probes: backward passes.

    Returns:
        Shares (nH, nW) of the source stage's windows, which sum to 1.
    """
    row, column = window
    output, entering = stages[stage].windows[block + 1], stages[source].windows[0]
    chosen = torch.zeros_like(output)
    chosen[0, row, column, {'patches': slice(1, None), 'msg': slice(1)}[tokens]] = 1.0
    if stages[stage].padding is not None:
        chosen = stages[stage].padding.zero(chosen)
    generator = torch.Generator().manual_seed(0)
    squares = torch.zeros(entering.shape[1:3], device=entering.device)
    for _ in range(probes):
        signs = torch.randint(2, output.shape, generator=generator).to(output) * 2 - 1
        (gradient,) = torch.autograd.grad(output, entering, signs * chosen, retain_graph=True)
        squares += gradient[0].square().sum(dim=(-2, -1))
    norms = squares.sqrt()
    return norms / norms.sum()


@torch.enable_grad()
def grad_cam(model: MSGTransformer, stages: Sequence[StageTrace], class_index: int, stage: int = -1) -> Tensor:
    """Grad-CAM (Selvaraju et al., arXiv:1610.02391): how much each patch of a stage supports a class.

    The feature map consists of the patches that enter the stage's last block. The patches that leave the last stage
    cannot be used: if the classifier input is the MSG tokens, their gradient is zero.

    Args:
        model: the network, with classes.
        stages: from `trace_blocks`.
        class_index: of the logit to explain.
        stage: of the feature map.

    Returns:
        (H, W), >= 0: channels weighted by the mean of their gradient over the patches, summed; negative sums, which are
        evidence against the class, are set to 0.

    Raises:
        ValueError: the network has no classes.
    """
    if model.num_classes == 0:
        raise ValueError('the network has no classes')
    logit = traced_logits(model, stages)[0, class_index]
    chosen = stages[stage]
    entering = chosen.windows[-2]
    (gradient,) = torch.autograd.grad(logit, entering, retain_graph=True)
    features, gradients = (
        split_windows(windows.detach(), chosen.window_size, chosen.grid)[0][0] for windows in (entering, gradient)
    )  # each (H, W, C)
    return (features * gradients.mean(dim=(0, 1))).sum(dim=-1).relu()
