"""Exchanges of information between windows, by their MSG tokens.

In every block, between attention and MLP, an exchange maps the MSG tokens (B, nH, nW, C) of all windows to new ones. It
is the only path between the windows of a stage. Most exchanges work within regions of s x s windows; regions at the
border of the window grid may be partial.

| name | what a new MSG token is made of | parameters |
|---|---|---|
| shuf | one chunk of channels of every token of its region: the published network | |
| none | its own token: windows exchange nothing | |
| mean | the first half of its own channels, and the region's mean of the second half | |
| shift | a quarter of the channels of each of four neighbours in its region | |
| attention | its own token, plus one attention head over the tokens of its region | 4Cd + 3C |
| global | its own token, plus one linear attention head over the tokens of all windows | 4Cd + 3C |
| mix | as in shuf, plus a learned sum of all chunks of its region | s^8 |

A new exchange is a subclass of `Exchange`, and gets a name with `register_exchange`: see docs/extending.md.

Letters: B images, nH x nW the window grid, C channels, s size of a region in windows, G = s^2 windows in a region,
d = min(32, C) the head dimension.

Source of `shuf` and `none`: Fang et al., arXiv:2105.15168, section 3.2. The other five are new in this project, without
published results.
"""

import reprlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pyramid import ceil_div
from .symbolic import contiguous_copy, crop, pad_to_multiple

HEAD_DIM = 32  # as in the blocks of the published networks


class Exchange(nn.Module):
    """Base class of exchanges. Subclasses define `forward`, and the other methods where they differ.

    Args:
        dim: channels C.
        region_size: size s of a region, in windows; it may be 1. `set_input_size` of the network may change it. Set
            `is_resizable = False` in a subclass whose parameter shapes depend on it.
    """

    is_resizable = True

    def __init__(self, dim: int, region_size: int):
        super().__init__()
        self.dim = dim
        self.region_size = region_size

    @classmethod
    def channel_multiple(cls, region_size: int) -> int:
        """The number that C must be a multiple of."""
        return 1

    def forward(self, msg: Tensor) -> Tensor:
        """Compute the new MSG tokens.

        Args:
            msg: MSG tokens (B, nH, nW, C); nH and nW are any numbers, and symbolic in `torch.export`.

        Returns:
            (B, nH, nW, C).
        """
        raise NotImplementedError

    def flops(self, grid: tuple[int, int]) -> int:
        """Count the multiply-adds of the matmuls, for the window grid (nH, nW) of one image."""
        return 0

    def token_weights(self, msg: Tensor) -> Tensor | None:
        """Compute how much of each new MSG token comes from each old one, for attention rollout (`tools.visualize`).

        Exchanges with attention define it. If it is None, the default, `tools.visualize` measures the Jacobian.

        Args:
            msg: MSG tokens of one image, (1, nH, nW, C).

        Returns:
            (n, n) with n = nH * nW: new tokens by old ones, in row-major order, rows summing to 1; or None.
        """
        return None

    def extra_repr(self) -> str:
        """Arguments shown by `print(model)`."""
        return f'dim={self.dim}, region_size={self.region_size}'


EXCHANGES: dict[str, type[Exchange]] = {}


def register_exchange(name: str) -> Callable[[type[Exchange]], type[Exchange]]:
    """Class decorator that makes an exchange available by name, in configs and in `timm.create_model`.

    Raises:
        ValueError: the name is not one of letters, digits and _, is taken by another class, or the class is not an
            `Exchange`.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{name!r} is not a name for an exchange: write @register_exchange('my_exchange')")

    def register(exchange: type[Exchange]) -> type[Exchange]:
        if not (isinstance(exchange, type) and issubclass(exchange, Exchange)):
            raise ValueError(f'{exchange!r} is not a subclass of Exchange')
        known = EXCHANGES.setdefault(name, exchange)
        if (known.__module__, known.__qualname__) != (exchange.__module__, exchange.__qualname__):
            raise ValueError(f'the exchange {name!r} is already {known.__module__}.{known.__qualname__}')
        EXCHANGES[name] = exchange  # a module may be imported again
        return exchange

    return register


ManipType = str | type[Exchange]


def stage_exchanges(manip_type: ManipType | Sequence[ManipType], stages: int) -> list[type[Exchange]]:
    """Find the exchange of each stage.

    Args:
        manip_type: a registered name or a class, for all stages, or a list of one for each stage.
        stages: number of stages.

    Raises:
        ValueError: a name is not registered, or the list has another length.
    """
    each = [manip_type] * stages if isinstance(manip_type, str | type) else list(manip_type)
    if len(each) != stages:
        shown = reprlib.repr(manip_type)
        raise ValueError(f'manip_type is {shown}: write one exchange, or a list of {stages}, one per stage')
    return [_find(exchange) for exchange in each]


def _find(exchange: ManipType) -> type[Exchange]:
    if isinstance(exchange, type) and issubclass(exchange, Exchange):
        return exchange
    if exchange not in EXCHANGES:
        raise ValueError(
            f'manip_type is {reprlib.repr(exchange)}: write one of {", ".join(map(repr, EXCHANGES))}, or import the '
            f'module that registers it (--import)'
        )
    return EXCHANGES[exchange]


@register_exchange('shuf')
class Shuffle(Exchange):
    """Published exchange: each token gives one chunk of its channels to every token of its region.

    Each token of a region is cut into G chunks of C/G channels; new token g is chunk g of token 0, chunk g of token 1,
    and so on: a G x G transpose of chunks, which is its own inverse. In a region that is cut by the border, a token
    keeps its own chunk where its partner does not exist. This is our choice: the published one is not known.
    """

    @classmethod
    def channel_multiple(cls, region_size: int) -> int:
        """The number of chunks G."""
        return region_size**2

    def forward(self, msg: Tensor) -> Tensor:
        """Compute the new MSG tokens, (B, nH, nW, C)."""
        s = self.region_size
        if s == 1:
            return msg
        padded = pad_to_multiple(msg, s)
        shuffled = _transpose_chunks(padded, s)
        if padded is msg:
            return shuffled
        from_token = _transpose_chunks(_is_token(msg, s, msg.shape[3]), s)
        return crop(torch.where(from_token, shuffled, padded), msg.shape[1:3])


@register_exchange('none')
class NoExchange(Exchange):
    """No exchange: every token stays as it is, and information does not cross windows within a stage."""

    def forward(self, msg: Tensor) -> Tensor:
        """Return the MSG tokens (B, nH, nW, C) as they are."""
        return msg


@register_exchange('mean')
class Mean(Exchange):
    """Mean of a region: tokens keep the first half of their channels; the mean over the region replaces the second.

    Where the border cuts a region, the mean is over the tokens that exist.
    """

    @classmethod
    def channel_multiple(cls, region_size: int) -> int:
        """Two halves."""
        return 2

    def forward(self, msg: Tensor) -> Tensor:
        """Compute the new MSG tokens, (B, nH, nW, C)."""
        s, grid = self.region_size, msg.shape[1:3]
        if s == 1:
            return msg
        own, others = msg.chunk(2, dim=3)
        tokens = split_regions(others, s)  # (B, nH/s, nW/s, G, C/2)
        count = split_regions(_is_token(msg, s), s).sum(dim=3, keepdim=True)
        mean = (tokens.sum(dim=3, keepdim=True) / count).expand_as(tokens)
        return torch.cat((own, join_regions(mean, grid)), dim=3)


@register_exchange('shift')
class Shift(Exchange):
    """Shift by one window: each quarter of the channels moves in another direction, and wraps around in its region.

    The first quarter comes from the window below, the second from above, the third from the right and the last from the
    left. What leaves a region on one side comes in on the other, so the exchange is a permutation; a region that is cut
    by the border is a smaller one.
    """

    @classmethod
    def channel_multiple(cls, region_size: int) -> int:
        """Four directions."""
        return 4

    def forward(self, msg: Tensor) -> Tensor:
        """Compute the new MSG tokens, (B, nH, nW, C)."""
        if self.region_size == 1:
            return msg
        below, above, right, left = msg.chunk(4, dim=3)
        return torch.cat(
            (self._shift(below, 1, 1), self._shift(above, 1, -1), self._shift(right, 2, 1), self._shift(left, 2, -1)),
            dim=3,
        )

    def _shift(self, msg: Tensor, dim: int, step: int) -> Tensor:
        """Take each token from the window `step` further along a dimension of the grid, around its region."""
        windows = msg.shape[dim]
        position = torch.arange(windows, device=msg.device)
        within = position % self.region_size
        first = position - within
        extent = (windows - first).clamp(max=self.region_size)
        return msg.index_select(dim, first + (within + step) % extent)


class AttentionExchange(Exchange):
    """Base class of exchanges that add one attention head of d channels to the tokens. Subclasses define `attend`."""

    def __init__(self, dim: int, region_size: int):
        super().__init__(dim, region_size)
        self.head_dim = min(HEAD_DIM, dim)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * self.head_dim, bias=False)
        self.proj = nn.Linear(self.head_dim, dim)

    def forward(self, msg: Tensor) -> Tensor:
        """Compute the new MSG tokens, (B, nH, nW, C)."""
        q, k, v = self.qkv(self.norm(msg)).chunk(3, dim=3)  # each (B, nH, nW, d)
        return msg + self.proj(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend from each token to others: queries, keys (B, nH, nW, d), values and result (B, nH, nW, channels)."""
        raise NotImplementedError

    def token_weights(self, msg: Tensor) -> Tensor:
        """Compute the mean of the attention weights and of the identity, for the residual, (n, n)."""
        q, k, _ = self.qkv(self.norm(msg)).chunk(3, dim=3)
        nH, nW = msg.shape[1:3]
        identity = torch.eye(nH * nW, dtype=q.dtype, device=q.device)
        attention = self.attend(q, k, identity.view(1, nH, nW, -1)).flatten(0, 2)  # the values tell the tokens apart
        return (attention + identity) / 2


@register_exchange('attention')
class RegionAttention(AttentionExchange):
    """Attention among the tokens of a region: one head of d channels, added to the tokens.

    new = msg + proj(softmax(q k^T / sqrt(d)) v), with q, k, v = qkv(norm(msg)). Where the border cuts a region, tokens
    attend to those that exist.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the tokens of the region; shapes as in `AttentionExchange`."""
        s, grid = self.region_size, q.shape[1:3]
        is_token = split_regions(_is_token(q, s), s).transpose(3, 4)  # (1, nH/s, nW/s, 1, G)
        q, k, v = (split_regions(x, s) for x in (q, k, v))  # (B, nH/s, nW/s, G, d)
        scores = q @ k.transpose(3, 4) * self.head_dim**-0.5  # (B, nH/s, nW/s, G, G)
        attended = scores.masked_fill(~is_token, float('-inf')).softmax(dim=4) @ v
        return join_regions(attended, grid)

    def flops(self, grid: tuple[int, int]) -> int:
        """Count the multiply-adds of the matmuls, for the window grid (nH, nW) of one image."""
        (nH, nW), s = grid, self.region_size
        regions = ceil_div(nH, s) * ceil_div(nW, s)
        return nH * nW * 4 * self.dim * self.head_dim + regions * s**4 * 2 * self.head_dim


@register_exchange('global')
class GlobalAttention(AttentionExchange):
    """Linear attention among the tokens of all windows: one head of d channels, added to the tokens.

    new = msg + proj(q (k^T v)), where q, k, v = qkv(norm(msg)), the softmax of q is over its channels, and that of k
    over all windows. The cost grows linearly with the windows. Regions play no role.

    Source: Shen et al., Efficient Attention, arXiv:1812.01243.
    """

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the tokens of all windows; shapes as in `AttentionExchange`."""
        shape = v.shape
        q, k, v = (contiguous_copy(x).flatten(1, 2) for x in (q, k, v))  # (B, nH * nW, d)
        # `@` would add a guard on a symbolic number of windows.
        context = torch.bmm(k.softmax(dim=1).transpose(1, 2), v)  # (B, d, channels)
        return torch.bmm(q.softmax(dim=2), context).view(shape)

    def flops(self, grid: tuple[int, int]) -> int:
        """Count the multiply-adds of the matmuls, for the window grid (nH, nW) of one image."""
        return grid[0] * grid[1] * (4 * self.dim * self.head_dim + 2 * self.head_dim**2)


@register_exchange('mix')
class Mix(Shuffle):
    """Shuffle plus a learned sum of chunks: chunk k of new token t gets a weighted sum of all chunks of its region.

    The G^2 x G^2 weights begin as zeros, so the exchange begins as the shuffle, and weight decay pulls it back there.
    """

    is_resizable = False

    def __init__(self, dim: int, region_size: int):
        super().__init__(dim, region_size)
        self.weight = nn.Parameter(torch.zeros(region_size**4, region_size**4))

    def forward(self, msg: Tensor) -> Tensor:
        """Compute the new MSG tokens, (B, nH, nW, C)."""
        s = self.region_size
        tokens = split_regions(msg, s)  # (B, nH/s, nW/s, G, C)
        chunks = tokens.view(*tokens.shape[:3], s**4, self.dim // s**2)
        # `weight @ chunks` would add a guard on symbolic strides.
        mixed = F.linear(contiguous_copy(chunks.transpose(3, 4)), self.weight)  # (B, nH/s, nW/s, C/G, G^2)
        mixed = contiguous_copy(mixed.transpose(3, 4)).view(tokens.shape)
        return super().forward(msg) + join_regions(mixed, msg.shape[1:3])

    def flops(self, grid: tuple[int, int]) -> int:
        """Count the multiply-adds of the matmul, for the window grid (nH, nW) of one image."""
        (nH, nW), s = grid, self.region_size
        return ceil_div(nH, s) * ceil_div(nW, s) * s**6 * self.dim


def split_regions(msg: Tensor, region_size: int) -> Tensor:
    """Split MSG tokens (B, nH, nW, C) into regions (B, ceil(nH/s), ceil(nW/s), G, C), padded with zeros."""
    s = region_size
    padded = pad_to_multiple(msg, s)
    B, nH, nW, C = padded.shape
    x = padded.view(B, nH // s, s, nW // s, s, C).transpose(2, 3)
    return contiguous_copy(x).view(B, nH // s, nW // s, s * s, C)


def join_regions(regions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Join regions (B, ceil(nH/s), ceil(nW/s), G, C) into MSG tokens (B, nH, nW, C): the inverse of `split_regions`."""
    B, rows, columns, G, C = regions.shape
    s = int(G**0.5)
    x = contiguous_copy(regions.view(B, rows, columns, s, s, C).transpose(2, 3))
    return crop(x.view(B, rows * s, columns * s, C), grid)


def _is_token(msg: Tensor, region_size: int, channels: int = 1) -> Tensor:
    """Which tokens of a grid, padded to whole regions, exist: boolean (1, ceil(nH/s) * s, ceil(nW/s) * s, channels)."""
    nH, nW = msg.shape[1:3]
    return pad_to_multiple(torch.ones(1, nH, nW, channels, dtype=torch.bool, device=msg.device), region_size)


def _transpose_chunks(msg: Tensor, region_size: int) -> Tensor:
    B, nH, nW, C = msg.shape
    s = region_size
    x = msg.view(B, nH // s, s, nW // s, s, s, s, C // s**2)  # in a region: token's row, column; chunk's row, column
    x = x.permute(0, 1, 5, 3, 6, 2, 4, 7)  # token and chunk exchanged
    return contiguous_copy(x).view(B, nH, nW, C)
