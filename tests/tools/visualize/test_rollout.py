"""Attention rollout: against dense matrices, rows that sum to 1, zeros where the Jacobian is zero, any exchange."""

from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

from models.exchange import EXCHANGES, Exchange
from tests.helpers import traces
from tests.helpers.golden import V2, fill_, normal
from tests.helpers.traces import trace
from tools.visualize.explain import attention_weights, trace_blocks
from tools.visualize.rollout import class_rollout, exchange_weights, rollout

build = partial(traces.build, depths=(2, 1), num_heads=(2, 4))
SIZES = [(32, 32), (23, 37)]  # the second pads windows, cuts regions and merges odd grids


class Roll(Exchange):
    """A user's exchange, beyond regions: tokens move by one row, and are halved and negated."""

    def forward(self, msg):
        """Roll rows of (B, nH, nW, C)."""
        return -0.5 * msg.roll(1, dims=1)


class Gate(Exchange):
    """A user's exchange that is not linear: a token is scaled by its right neighbour's first channel."""

    def forward(self, msg):
        """Scale (B, nH, nW, C)."""
        return msg * msg[..., :1].roll(-1, dims=2).tanh()


class Opposites(Exchange):
    """A user's exchange whose channels are sums and differences, so gradients of a sum of channels cancel."""

    def forward(self, msg):
        """Add the lower neighbour's first channel to (B, nH, nW, 4)."""
        return msg + msg[..., :1].roll(-1, dims=1) * msg.new_tensor([1.0, -1.0, 1.0, -1.0])


class Silence(Exchange):
    """A user's exchange whose new tokens depend on no token."""

    def forward(self, msg):
        """Zeros (B, nH, nW, C)."""
        return torch.zeros_like(msg)


class Learned(Exchange):
    """A user's exchange whose new tokens are a parameter."""

    def __init__(self, dim, region_size):
        super().__init__(dim, region_size)
        self.token = torch.nn.Parameter(torch.ones(dim))

    def forward(self, msg):
        """The parameter, (B, nH, nW, C)."""
        return self.token.expand_as(msg)


@pytest.mark.parametrize('options', [{}, V2, {'head_tokens': 'patches'}, {'manip_type': [Gate, 'mix']}])
@pytest.mark.parametrize('size', SIZES)
def test_rows_sum_to_one(options, size):
    model = build(**options)
    stages = trace(model, *size)
    for i, stage in enumerate(stages):
        shares = class_rollout(model, stages, i)
        assert shares.shape == stage.grid
        assert (shares > 0).all()
        assert shares.sum() < 1  # MSG tokens have the rest
        for position in ((0, 0, 0), (-1, -1, 0), (-1, -1, 1)):  # an MSG token, one of a cut region, a patch
            row = torch.zeros_like(stage.windows[0][0, ..., 0])
            row[position] = 1.0
            patches, msg = rollout(model, stages, row, stage=i)
            assert patches.sum() + msg.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize('manip_type', ['shuf', 'none', 'shift', 'mean', 'attention', Roll])
@pytest.mark.parametrize('size', SIZES)
def test_the_map_is_zero_exactly_where_the_jacobian_is(manip_type, size):
    """The logits of one window's MSG token, and the pixels of each patch."""
    model = build(manip_type=manip_type, global_pool='')
    image = torch.randn(1, 3, *size, requires_grad=True)
    stages = trace_blocks(model, image)
    logits = model(image)[0]  # (nH, nW, classes): without pooling, each window has its own
    reached = 0
    for window in ((0, 0), (2, 1), tuple(side - 1 for side in logits.shape[:2])):
        (gradient,) = torch.autograd.grad(logits[window].sum(), image, retain_graph=True)
        jacobian = nn.functional.max_pool2d(gradient.abs(), 2, ceil_mode=True).amax(dim=(0, 1))  # of patches
        row = torch.zeros_like(stages[1].windows[0][0, ..., 0])
        row[(*window, 0)] = 1.0
        patches, _ = rollout(model, stages, row)
        assert torch.equal(patches > 0, jacobian > 0)
        reached += (patches > 0).float().mean()
    assert 0 < reached < 2.5  # zeros were compared, too


def dense_rollout(model, stages):
    """The rollout by matrices of all tokens: (tokens of the classifier's input, tokens of the first stage's input)."""
    total, earlier = None, {}
    for i, stage in enumerate(stages):
        (nH, nW), (H, W), w = stage.window_grid, stage.grid, stage.window_size
        windows, patches = list(product(range(nH), range(nW))), list(product(range(H), range(W)))
        tokens = [('msg', *x) for x in windows] + [('patch', *x) for x in patches]
        index = {token: position for position, token in enumerate(tokens)}
        if i > 0:
            merging = torch.zeros(len(tokens), len(earlier))
            offsets = (-1, 0, 1) if model.layers[0].downsample.reduction.weight.ndim == 4 else (0, 1)
            for (kind, y, x), position in index.items():
                merged = [(kind, 2 * y + dy, 2 * x + dx) for dy in offsets for dx in offsets]
                merged = [token for token in merged if token in earlier]
                for token in merged:
                    merging[position, earlier[token]] = 1 / len(merged)
            total = merging @ total
        for block, entering in zip(stage.blocks, stage.windows, strict=False):
            attention = torch.eye(len(tokens))
            weights = attention_weights(block, entering, stage.padding).mean(dim=2)
            for y, x in windows:
                slots = [('msg', y, x)] + [('patch', y * w + r, x * w + c) for r in range(w) for c in range(w)]
                real = [slot for slot, token in enumerate(slots) if token in index]
                inner = weights[y, x][real][:, real]
                places = torch.tensor([index[slots[slot]] for slot in real])
                attention[places[:, None], places] += inner / inner.sum(dim=1, keepdim=True)
            exchange = torch.eye(len(tokens))
            count = len(windows)
            msg = entering[:, :, :, 0]
            exchange[:count, :count] = exchange_weights(block.exchange, msg)
            step = exchange @ attention / 2
            total = step if total is None else step @ total
        earlier = index
    return total, tokens


@pytest.mark.parametrize('options', [{}, V2])
def test_the_rollout_is_the_product_of_dense_matrices(options):
    model = build(manip_type=['shuf', 'shift'], **options)
    stages = trace(model, 23, 37)
    total, tokens = dense_rollout(model, stages)
    windows = [position for position, token in enumerate(tokens) if token[0] == 'msg']
    nH, nW = stages[0].window_grid
    expected = total[windows].mean(dim=0)[nH * nW :].view(stages[0].grid)
    torch.testing.assert_close(class_rollout(model, stages), expected)


def test_weights_of_linear_exchanges_are_shares_of_channels():
    grid, msg = (3, 3), normal('msg', (1, 3, 3, 16))  # regions of 2 x 2, 2 x 1, 1 x 2 and one window

    def weights(name):
        return exchange_weights(fill_(EXCHANGES[name](16, 2)).eval(), msg).view(*grid, *grid)

    assert torch.equal(weights('none').view(9, 9), torch.eye(9))
    shuf, mean, shift, mix = map(weights, ('shuf', 'mean', 'shift', 'mix'))
    torch.testing.assert_close(shuf[0, 1, :2, :2], torch.full((2, 2), 0.25))
    assert shuf[0, 2].tolist() == [[0, 0, 0.75], [0, 0, 0.25], [0, 0, 0]]  # chunks of absent partners are its own
    assert mean[0, 1].tolist() == [[0.125, 0.625, 0], [0.125, 0.125, 0], [0, 0, 0]]
    assert shift[0, 1].tolist() == [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0]]
    assert shift[0, 2].tolist() == [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
    exchange = fill_(EXCHANGES['mix'](16, 2))
    shuffle = torch.eye(16).view(4, 4, 16).transpose(0, 1).reshape(16, 16)
    absolute = (exchange.weight + shuffle).abs()
    shares = absolute.view(4, 4, 4, 4).sum(dim=(1, 3))  # new token, old token
    torch.testing.assert_close(mix[:2, :2, :2, :2].reshape(4, 4), shares / shares.sum(dim=1, keepdim=True))


@pytest.mark.parametrize('name', ['attention', 'global'])
def test_weights_of_attention_are_half_attention_and_half_residual(name):
    exchange, msg = fill_(EXCHANGES[name](16, 2)).eval(), normal('msg', (1, 3, 5, 16))
    values = exchange.qkv(exchange.norm(msg)).chunk(3, dim=3)[2].view(15, -1)
    attention = 2 * exchange_weights(exchange, msg) - torch.eye(15)
    torch.testing.assert_close(msg + exchange.proj(attention @ values).view(1, 3, 5, 16), exchange(msg))


def test_weights_of_other_exchanges():
    msg = normal('msg', (1, 3, 3, 4))
    rolled = exchange_weights(Roll(4, 2), msg)
    assert torch.equal(rolled.view(3, 3, 3, 3)[1, 2, 0, 2], torch.tensor(1.0))
    assert torch.equal(rolled.sort(dim=1)[0], torch.eye(9).sort(dim=1)[0])
    jacobian = torch.autograd.functional.jacobian(Gate(4, 2), msg).view(9, 4, 9, 4).abs().sum(dim=(1, 3))
    torch.testing.assert_close(exchange_weights(Gate(4, 2), msg), jacobian / jacobian.sum(dim=1, keepdim=True))
    identity = torch.eye(9)
    expected = (identity + identity.roll(3, dims=1)) / 2  # three windows in a row
    assert torch.equal(exchange_weights(Opposites(4, 2), msg), expected)
    assert not exchange_weights(Silence(4, 2), msg).any()
    assert not exchange_weights(Learned(4, 2), msg).any()
    model = build(manip_type=Silence)
    assert not class_rollout(model, trace(model)).any()
