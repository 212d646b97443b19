"""The block: window attention, the shuffle of MSG tokens, MLP.

Letters: B images, nH x nW the window grid, w window side, N = w^2 + 1 tokens in a window (MSG token first),
C channels, h heads, d = C/h channels a head, s side of a shuffle region in windows.

Source: Fang et al., arXiv:2105.15168, section 3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.checkpoint import checkpoint

from models.pyramid import StageLayout
from models.windows import relative_position_index, shuffle_msg_tokens


class KeptBias(NamedTuple):
    """A position bias, what it was made from, and what tells whether that is still the same.

    The sources are held, so that no others can have their identity.
    """

    key: tuple
    sources: tuple[Tensor, ...]
    bias: Tensor


class _OptimizerSteps:
    """Counts the steps of all optimizers: a fused one does not count up the versions of what it changes."""

    count = 0

    @classmethod
    def add(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.add)


def _is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, in which tensors have no address and checkpoints fail."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class WindowAttention(nn.Module):
    """Multi-head self-attention among the N tokens of each window, with a learned position bias.

    Args:
        dim: channels C.
        window_size: side w of a window, in patches.
        num_heads: heads h; divides `dim`.
        qkv_bias: add a learned bias to query, key and value.
        qk_scale: factor on q.k; None for d^-0.5.
        attn_drop: dropout rate after the softmax.
        proj_drop: dropout rate after the output projection.
    """

    def __init__(
        self,
        dim: int,
        window_size: int,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        self.window_size = window_size
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 2, num_heads))
        # [:, 0] is the bias of a patch's attention to the MSG token, [:, 1] of the MSG token's to everything.
        self.rel_pos_msg = nn.Parameter(torch.empty(num_heads, 2, 1, 1))
        # Persistent, since the published checkpoints hold it.
        self.register_buffer('relative_position_index', relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        nn.init.trunc_normal_(self.rel_pos_msg, std=0.02)

        self._kept_bias: KeptBias | None = None

    def position_bias(self) -> Tensor:
        """Bias of every query (row) towards every key (column), (h, N, N)."""
        patches = self.relative_position_bias_table[self.relative_position_index]  # (w*w, w*w, h)
        n = patches.shape[0]
        to_msg = self.rel_pos_msg[:, 0].expand(-1, n, 1)
        from_msg = self.rel_pos_msg[:, 1].expand(-1, 1, n + 1)
        return torch.cat((from_msg, torch.cat((to_msg, patches.permute(2, 0, 1)), dim=2)), dim=1)

    def evaluation_bias(self, dtype: torch.dtype) -> Tensor:
        """The position bias (1, h, N, N) in the type of the queries, made once and kept until its parameters change.

        Rows begin at multiples of 16 elements: CUDA's memory-efficient kernel would copy any other bias at every call.
        What writes to a parameter's `.data`, which PyTorch does not tell, must call `eval()` after it.

        It is made anew where keeping makes no sense: in `torch.compile` (which fuses the few operations, or folds them
        where weights are frozen), `torch.jit.trace`, transforms of `torch.func`, and of tensors of inference mode.
        """
        sources = (self.relative_position_bias_table, self.rel_pos_msg)
        passing = torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed()
        if passing or any(source.is_inference() for source in sources):
            return self.position_bias().to(dtype).unsqueeze(0)
        key = (dtype, _OptimizerSteps.count, *((id(each), each.data_ptr(), each._version) for each in sources))
        kept = self._kept_bias  # read once: another thread may drop it
        if kept is None or kept.key != key:
            bias = self.position_bias().to(dtype)
            N = bias.shape[-1]
            kept = self._kept_bias = KeptBias(key, sources, F.pad(bias, (0, -N % 16))[..., :N].unsqueeze(0))
        return kept.bias

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._kept_bias = None
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> nn.Module:
        """As in `nn.Module`; also forgets the kept bias."""
        self._kept_bias = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {'_kept_bias': None}

    def forward(self, x: Tensor, msg_only: bool = False) -> Tensor:
        """Attend within windows.

        Args:
            x: tokens (..., N, C).
            msg_only: give what the MSG token attends to, and leave out what the patches do.

        Returns:
            (..., N, C), or (..., 1, C) with `msg_only`.
        """
        *windows, N, C = x.shape
        queries = 1 if msg_only else N
        qkv = self.qkv(x).view(-1, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (windows, h, N, d)
        q = q[:, :, :queries]
        if torch.is_grad_enabled():
            # Plain products: the fused kernels are slow where the bias wants a gradient.
            bias = self.position_bias()[:, :queries]
            attn = (q * self.scale) @ k.transpose(-2, -1) + bias  # (windows, h, queries, N)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        else:
            # A bias without the first dimension would fall out of the CPU's fused kernel.
            bias = self.evaluation_bias(q.dtype)[:, :, :queries]
            dropout = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=self.scale)
        x = x.transpose(1, 2).reshape(*windows, queries, C)
        return self.proj_drop(self.proj(x))


class Mlp(nn.Module):
    """Linear, exact GELU, linear, with dropout after each of the last two.

    Args:
        dim: channels C in and out.
        hidden_dim: channels between.
        drop: dropout rate.
    """

    def __init__(self, dim: int, hidden_dim: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token of x (..., C) by itself."""
        hidden = self.fc1(x)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not _is_transformed():
            # What GELU gives is a fifth of a network's activations, and sooner computed again than kept. Compiled
            # code weighs that by itself.
            return checkpoint(self._contract, hidden, use_reentrant=False, preserve_rng_state=self.drop.p > 0)
        return self._contract(hidden)

    def _contract(self, hidden: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(hidden))))


class RegionDropPath(nn.Module):
    """Stochastic depth drawn once per shuffle region of each image, as the published code draws it.

    The survivors are divided by the keep probability.

    Args:
        rate: probability that a region's branch is dropped, in [0, 1).
        region_size: side s of a region, in windows.
    """

    def __init__(self, rate: float, region_size: int):
        super().__init__()
        self.rate = rate
        self.region_size = region_size

    def forward(self, x: Tensor) -> Tensor:
        """Drop whole regions of a branch's windows x (B, nH, nW, N, C) while training."""
        if not self.training or self.rate == 0.0:
            return x
        B, nH, nW, N, C = x.shape
        s = self.region_size
        keep = 1.0 - self.rate
        mask = x.new_empty(B, nH // s, 1, nW // s, 1, 1, 1).bernoulli_(keep) / keep
        return (x.view(B, nH // s, s, nW // s, s, N, C) * mask).view(x.shape)

    def extra_repr(self) -> str:
        """What `print(model)` says of this module."""
        return f'rate={self.rate:.3f}, region_size={self.region_size}'


class MSGBlock(nn.Module):
    """Attention within windows, exchange among the MSG tokens of a region, MLP.

    Args:
        dim: channels C.
        layout: the stage's grid, window and region.
        num_heads: heads h.
        mlp_ratio: hidden channels of the MLP, over C.
        qkv_bias, qk_scale, attn_drop: see `WindowAttention`.
        drop: dropout rate after the attention's projection and in the MLP.
        drop_path: stochastic-depth rate of either branch.
        norm_layer: called with C.
        shuffle: exchange MSG tokens (`manip_type` shuf) or leave them (none).
    """

    def __init__(
        self,
        dim: int,
        layout: StageLayout,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        shuffle: bool = True,
    ):
        super().__init__()
        self.layout = layout
        self.shuffle = shuffle and layout.region > 1
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(dim, layout.window, num_heads, qkv_bias, qk_scale, attn_drop, drop)
        self.drop_path = RegionDropPath(drop_path, layout.region)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, msg_only: bool = False) -> Tensor:
        """Transform windows x (B, nH, nW, N, C); give their MSG tokens alone, (B, nH, nW, 1, C), with `msg_only`."""
        kept = x[:, :, :, :1] if msg_only else x
        x = kept + self.drop_path(self.attn(self.norm1(x), msg_only))
        if self.shuffle:
            msg = shuffle_msg_tokens(x[:, :, :, 0], self.layout.region)
            x = torch.cat((msg.unsqueeze(3), x[:, :, :, 1:]), dim=3)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def flops(self) -> int:
        """Multiply-adds of one image, by the authors' formula: norms, attention with its projections, MLP."""
        (height, width), msg_grid = self.layout.grid, self.layout.msg_grid
        windows = msg_grid.height * msg_grid.width
        tokens = height * width + windows
        C, N = self.mlp.fc1.in_features, self.layout.window**2 + 1
        attention = windows * (3 * N * C**2 + 2 * N**2 * C + N * C**2)
        return 2 * C * tokens + attention + 2 * tokens * C * self.mlp.fc1.out_features
