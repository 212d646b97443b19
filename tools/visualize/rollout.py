"""Attention rollout: how much each patch contributes to the classifier input.

Rollout (Abnar and Zuidema, arXiv:2005.00928) replaces every step of the network by a matrix of weights between tokens:
entry (t, u) is the share of new token t that comes from old token u, and rows sum to 1. The product of all matrices
leads from the classifier to the patches. It shows where information can come from, and how much attention it gets on
its way. It is the same for every class.

| step | share of the new token |
|---|---|
| attention | half itself, for the residual, and half the mean attention of the heads over the tokens of its window |
| exchange | `exchange_weights` |
| MLP | all itself |
| merging | the mean of the 2 x 2 tokens (version 2: 3 x 3) that it is merged from, as far as they exist |
| classifier | the mean of the tokens that it reads |

Padding is not a token: the attention that it gets is shared among the other tokens of the window.

It is computed as vector-matrix products from the classifier backwards, so no matrix is larger than N x N for each
window, or n x n for the n windows.

Letters: H x W a stage's patch grid, nH x nW its window grid, n = nH * nW windows, N tokens in a window (the MSG token
first), C channels. Stages and blocks count from 0.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import MSGTransformer
from models.exchange import Exchange
from models.layers import OverlapPatchMerging
from models.msg_block import MSGBlock
from models.windows import WindowPadding, join_windows, split_windows
from tools.visualize.explain import StageTrace, attention_input, attention_weights


def class_rollout(model: MSGTransformer, stages: Sequence[StageTrace], source: int = 0) -> Tensor:
    """Attention rollout from the classifier to the patches that enter a stage.

    Args:
        model: the network.
        stages: from `trace_blocks`.
        source: the stage.

    Returns:
        Shares (H, W) of the stage's patches. They sum to at most 1; the remainder belongs to the MSG tokens that enter
        the stage. Those of the first stage are learned parameters.
    """
    last = stages[-1]
    read = torch.zeros_like(last.windows[-1][0, ..., 0])  # (nH, nW, N)
    if model.head_reads_msg:
        read[..., 0] = 1.0
    else:
        read[..., 1:] = 1.0
        if last.padding is not None:
            read = read.masked_fill(last.padding.is_padding[..., 0], 0.0)
    return rollout(model, stages, read / read.sum(), source=source)[0]


@torch.no_grad()
def rollout(
    model: MSGTransformer,
    stages: Sequence[StageTrace],
    row: Tensor,
    stage: int = -1,
    source: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention rollout from weighted tokens after a stage to the tokens that enter the same or an earlier stage.

    Args:
        model: the network.
        stages: from `trace_blocks`.
        row: weights (nH, nW, N) of the tokens that leave the last block of a stage, zero for padding.
        stage: this stage.
        source: the stage to which the weights are carried back, at most `stage`.

    Returns:
        Weights of the patches (H, W) and of the MSG tokens (nH, nW) that enter the source stage. Their sum is that of
        `row`, unless an exchange makes tokens that depend on no token.
    """
    stage %= len(stages)
    for i in range(stage, source - 1, -1):
        trace = stages[i]
        for block, windows in reversed(list(zip(trace.blocks, trace.windows[:-1], strict=True))):
            row = _before_block(row, block, windows, trace.padding)
        patches, msg = split_windows(row[None, ..., None], trace.window_size, trace.grid)
        if i > source:
            earlier, merging = stages[i - 1], model.layers[i - 1].downsample
            patches = _before_merging(patches, merging, earlier.grid)
            msg = _before_merging(msg, merging, earlier.window_grid)
            row = join_windows(patches, msg, earlier.window_size)[0, ..., 0]
    return patches[0, ..., 0], msg[0, ..., 0]


def _before_block(row: Tensor, block: MSGBlock, windows: Tensor, padding: WindowPadding | None) -> Tensor:
    """Weights (nH, nW, N) of the tokens that enter a block, given those of the tokens that leave it.

    Args:
        row: weights of the tokens that leave the block.
        block: the block.
        windows: what enters the block, (1, nH, nW, N, C).
        padding: which tokens are padding, if any.
    """
    attended = block.attn(attention_input(block, windows, padding), msg_only=True)
    msg = windows[:, :, :, 0] + attended[:, :, :, 0]  # what enters the exchange
    exchanged = row[..., 0].flatten() @ exchange_weights(block.exchange, msg)
    row = torch.cat((exchanged.view(*row.shape[:2], 1), row[..., 1:]), dim=-1)
    weights = attention_weights(block, windows, padding).mean(dim=2)  # (nH, nW, N, N)
    if padding is not None:
        weights = weights.masked_fill(padding.is_padding.transpose(-2, -1), 0.0)
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return (row + (row.unsqueeze(-2) @ weights).squeeze(-2)) / 2


@torch.enable_grad()
def _before_merging(row: Tensor, merging: nn.Module, grid: tuple[int, int]) -> Tensor:
    """Weights (1, H, W, 1) of tokens before they are merged, given those of the merged tokens.

    Merging is replaced by a mean; its gradient spreads the weight of each merged token.

    Args:
        row: weights of the merged tokens, (1, ceil(H/2), ceil(W/2), 1).
        merging: the layer.
        grid: of the tokens before, (H, W).
    """
    before = row.new_zeros(1, 1, *grid, requires_grad=True)
    if isinstance(merging, OverlapPatchMerging):
        merged = F.avg_pool2d(before, 3, stride=2, padding=1, count_include_pad=False)
    else:
        merged = F.avg_pool2d(before, 2, ceil_mode=True)
    (spread,) = torch.autograd.grad(merged, before, row.permute(0, 3, 1, 2))
    return spread.permute(0, 2, 3, 1)


def exchange_weights(exchange: Exchange, msg: Tensor) -> Tensor:
    """How much of each new MSG token comes from each old one.

    These are the exchange's own `token_weights`, where it defines them. For other exchanges, they are the absolute
    values of the Jacobian, summed over the channels of both tokens, relative to the sum of the row. So of an exchange
    that moves or averages channels, such as `shuf`, they are the share of channels. No weight is zero unless the
    Jacobian is.

    Args:
        exchange: any.
        msg: MSG tokens that enter it, of one image, (1, nH, nW, C).

    Returns:
        (n, n): new tokens by old ones, in row-major order. Rows sum to 1; the row of a new token that depends on no
        token is zero.
    """
    weights = exchange.token_weights(msg)
    return _jacobian_weights(exchange, msg) if weights is None else weights


@torch.enable_grad()
def _jacobian_weights(exchange: Exchange, msg: Tensor) -> Tensor:
    """The weights of `exchange_weights` by the Jacobian.

    A backward pass gives the gradients of one channel of one new token. To need few passes, a batch holds a copy of the
    image for each channel; and new tokens that depend on different tokens are done together.
    """
    _, nH, nW, C = msg.shape
    n = nH * nW
    copies = msg.detach().repeat(C, 1, 1, 1).requires_grad_()
    new = exchange(copies)
    weights = msg.new_zeros(n, n)
    if not new.requires_grad:
        return weights

    def backpropagate(seed: Tensor) -> Tensor:
        """Sums over channels of the absolute gradients, (C, n)."""
        (gradient,) = torch.autograd.grad(
            new, copies, seed.view_as(copies), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return gradient.abs().sum(dim=3).flatten(1)

    generator = torch.Generator().manual_seed(0)
    reached = []  # which old tokens each new one depends on
    for tokens in torch.arange(n).split(C):
        seed = msg.new_zeros(C, n, C)
        noise = torch.randn(len(tokens), C, generator=generator)  # no two gradients cancel each other
        seed[torch.arange(len(tokens)), tokens] = noise.to(seed)
        reached.append(backpropagate(seed)[: len(tokens)] > 0)
    reached = torch.cat(reached)  # (n, n)

    for tokens in _disjoint(reached.cpu().numpy()):
        seed = msg.new_zeros(C, n, C)
        seed[:, tokens] = torch.eye(C).to(seed).unsqueeze(1)
        weights[tokens] = backpropagate(seed).sum(dim=0) * reached[tokens]
    return weights / weights.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def _disjoint(rows: np.ndarray) -> list[list[int]]:
    """Group the rows of a boolean matrix so that no column is True in two rows of a group."""
    groups, occupied = [], []
    for i, row in enumerate(rows):
        for group, columns in zip(groups, occupied, strict=True):
            if not (columns & row).any():
                group.append(i)
                columns |= row
                break
        else:
            groups.append([i])
            occupied.append(row.copy())
    return groups
