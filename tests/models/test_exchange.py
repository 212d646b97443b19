"""Exchanges of MSG tokens: what moves where, at any grid; parameters and multiply-adds; new ones by name."""

import copy
import pickle

import pytest
import torch
from torch.func import functional_call, grad, vmap

from models import MSGTransformer, register_exchange
from models.exchange import (
    EXCHANGES,
    Exchange,
    Mean,
    Mix,
    RegionAttention,
    Shift,
    Shuffle,
    join_regions,
    split_regions,
    stage_exchanges,
)
from tests.helpers.golden import fill_, normal
from tools.flops import count_multiply_adds

GRIDS = [(4, 6), (3, 5), (1, 1), (5, 2)]  # the last three cut regions of 2 x 2 windows
PERMUTATIONS = ('shuf', 'none', 'shift')
NAMES = list(EXCHANGES)


def build(name, dim=16, region_size=2):
    """An exchange with weights that do something."""
    return fill_(EXCHANGES[name](dim, region_size)).eval()


def region(index, size=2):
    """The region of a window at (row, column)."""
    return tuple(i // size for i in index)


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('name', NAMES)
def test_a_token_depends_on_the_tokens_of_its_region(name, grid):
    """Each row of the Jacobian: which windows a window's new MSG token depends on."""
    exchange, msg = build(name), normal('msg', (1, *grid, 16))
    jacobian = torch.autograd.functional.jacobian(exchange, msg)[0, :, :, :, 0]  # new row, column, channel, row, column
    reached = jacobian.abs().sum(dim=(2, 5)) > 0
    for target in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
        for source in torch.cartesian_prod(*map(torch.arange, grid)).tolist():
            is_neighbour = {
                'none': target == source,
                'global': True,
                'shift': source in neighbours(target, grid),
            }.get(name, region(target) == region(source))
            assert reached[*target, *source] == is_neighbour, (target, source)


def neighbours(window, grid, size=2):
    """The windows below, above, right and left of a window, around its region."""
    found = []
    for axis in (0, 1):
        first = window[axis] // size * size
        extent = min(size, grid[axis] - first)
        for step in (1, -1):
            neighbour = list(window)
            neighbour[axis] = first + (window[axis] - first + step) % extent
            found.append(neighbour)
    return found


@pytest.mark.parametrize('grid', GRIDS)
@pytest.mark.parametrize('name', NAMES)
def test_permutations_lose_nothing(name, grid):
    msg = torch.arange(grid[0] * grid[1] * 16.0).view(1, *grid, 16)
    exchanged = build(name)(msg)
    assert exchanged.shape == msg.shape
    assert torch.equal(exchanged.flatten().sort()[0], msg.flatten()) == (
        name in PERMUTATIONS or (name == 'mean' and grid == (1, 1))
    )


@pytest.mark.parametrize('name', NAMES)
def test_images_of_a_batch_are_independent_and_every_parameter_has_a_gradient(name):
    exchange, msg = build(name).train(), normal('msg', (2, 3, 5, 16)).requires_grad_()
    exchanged = exchange(msg)
    for image in (0, 1):
        torch.testing.assert_close(exchanged[image : image + 1], exchange(msg[image : image + 1]))
    exchanged.square().sum().backward()
    assert msg.grad.abs().sum(dim=3).all()
    assert all(parameter.grad.abs().max() > 0 for parameter in exchange.parameters())


@pytest.mark.parametrize('grid', [(4, 6), (3, 5), (1, 1)])
@pytest.mark.parametrize('region_size', [1, 2, 4])
@pytest.mark.parametrize('name', NAMES)
def test_multiply_adds_and_parameters_by_formula_and_by_operators(name, region_size, grid):
    exchange = build(name, dim=48, region_size=region_size)
    assert exchange.flops(grid) == count_multiply_adds(lambda: exchange(torch.zeros(1, *grid, 48)))
    parameters = {'attention': 4 * 48 * 32 + 3 * 48, 'global': 4 * 48 * 32 + 3 * 48, 'mix': region_size**8}
    assert sum(parameter.numel() for parameter in exchange.parameters()) == parameters.get(name, 0)


@pytest.mark.parametrize('name', NAMES)
def test_a_network_counts_its_exchanges(name):
    options = {'img_size': 56, 'patch_size': 2, 'embed_dim': 48, 'depths': (1, 2), 'num_heads': (2, 4)}
    options |= {'shuffle_size': (4, 2), 'num_classes': 3}
    network, plain = MSGTransformer(**options, manip_type=name), MSGTransformer(**options, manip_type='none')
    first, second = (EXCHANGES[name](dim, size) for dim, size in ((48, 4), (96, 2)))
    added = first.flops((4, 4)) + 2 * second.flops((2, 2))
    assert network.flops() - plain.flops() == added

    def forward(model):
        return lambda: model.eval().forward_intermediates(torch.zeros(1, 3, 56, 56))

    assert count_multiply_adds(forward(network)) - count_multiply_adds(forward(plain)) == added


@torch.no_grad()
def test_all_exchanges_compile_to_one_graph():
    torch.compiler.reset()
    exchanges = torch.nn.Sequential(*map(build, NAMES)).eval()
    compiled, msg = torch.compile(exchanges, fullgraph=True, backend='eager'), normal('msg', (2, 3, 5, 16))
    assert torch.equal(compiled(msg), exchanges(msg))


@pytest.mark.parametrize('name', NAMES)
def test_pickle_meta_device_autocast_and_torch_func(name):
    exchange, msg = build(name), normal('msg', (2, 3, 5, 16))
    expected = exchange(msg)
    assert torch.equal(pickle.loads(pickle.dumps(exchange))(msg), expected)

    with torch.device('meta'):
        empty = EXCHANGES[name](16, 2)
    assert empty(msg.to('meta')).shape == msg.shape
    empty.to_empty(device='cpu').load_state_dict(exchange.state_dict())
    assert torch.equal(empty(msg), expected)

    with torch.autocast('cpu', torch.bfloat16):
        mixed = exchange(msg)
    assert mixed.dtype == torch.float32  # the residual stream
    torch.testing.assert_close(mixed, expected, rtol=0.02, atol=0.05)

    parameters = dict(exchange.named_parameters())

    def loss(parameters, msg):
        return functional_call(exchange, parameters, (msg[None],)).square().sum()

    torch.testing.assert_close(vmap(exchange)(msg[:, None]).squeeze(1), expected)
    per_image = vmap(grad(loss), in_dims=(None, 0))(parameters, msg) if parameters else {}
    if parameters:
        exchange(msg).square().sum().backward()
    for key, gradient in per_image.items():
        torch.testing.assert_close(gradient.sum(dim=0), parameters[key].grad, rtol=1e-4, atol=1e-5)


def test_regions_are_joined_as_they_were_split():
    msg = torch.rand(2, 5, 3, 4) + 1
    regions = split_regions(msg, 2)
    assert regions.shape == (2, 3, 2, 4, 4)
    assert torch.equal(regions[:, 1, 0], msg[:, 2:4, :2].flatten(1, 2))
    assert regions[:, 2, 1, 1:].abs().sum() == 0  # padding
    assert torch.equal(join_regions(regions, (5, 3)), msg)
    assert torch.equal(join_regions(split_regions(msg, 3), (5, 3)), msg)


def test_shuffle_transposes_chunks_within_a_region():
    # Channel k of the token at (row, column) holds 100 * row + 10 * column + k.
    row, column, k = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(8), indexing='ij')
    msg = (100 * row + 10 * column + k).unsqueeze(0)
    shuffled = Shuffle(8, 2)(msg)
    # New token 1 (row 0, column 1) of the first region: chunk 1 of tokens 0, 1, 2 and 3.
    assert shuffled[0, 0, 1].tolist() == [2, 3, 12, 13, 102, 103, 112, 113]
    # New token 2 (row 3, column 0) of the second: chunk 2 of each.
    assert shuffled[0, 3, 0].tolist() == [204, 205, 214, 215, 304, 305, 314, 315]
    assert torch.equal(Shuffle(8, 2)(shuffled), msg)  # its own inverse
    assert Shuffle(8, 1)(msg) is msg


def test_a_token_keeps_its_chunk_where_its_partner_is_padding():
    msg = torch.arange(3 * 5 * 8.0).view(1, 3, 5, 8)
    shuffled = Shuffle(8, 2)(msg)
    assert torch.equal(shuffled[:, :2, :4], Shuffle(8, 2)(msg[:, :2, :4]))
    for row, column in [(2, 0), (2, 3), (0, 4), (1, 4), (2, 4)]:  # in regions cut by the border
        top, left = row - row % 2, column - column % 2
        chunks = []
        for i in range(4):  # the region's positions in row-major order
            y, x = top + i // 2, left + i % 2
            own, position = msg[0, row, column].view(4, 2), 2 * (row - top) + column - left
            chunks.append(msg[0, y, x].view(4, 2)[position] if y < 3 and x < 5 else own[i])
        assert torch.equal(shuffled[0, row, column], torch.cat(chunks))
    assert torch.equal(shuffled.flatten().sort()[0], msg.flatten())  # nothing is lost


def test_mean_of_a_cut_region_is_over_its_tokens():
    msg = torch.arange(1, 7.0).view(1, 2, 3, 1).repeat(1, 1, 1, 2)
    mean = Mean(2, 2)(msg)
    assert torch.equal(mean[..., 0], msg[..., 0])
    assert mean[0, :, :, 1].tolist() == [[3, 3, 4.5], [3, 3, 4.5]]  # of 1, 2, 4, 5, and of 3, 6
    assert Mean(2, 1)(msg) is msg


def test_shift_moves_each_quarter_of_the_channels_around_its_region():
    msg = torch.arange(3 * 5.0).view(1, 3, 5, 1).repeat(1, 1, 1, 4)  # token 5 * row + column
    below, above, right, left = Shift(4, 3)(msg)[0].unbind(2)
    assert below[:, 0].tolist() == [5, 10, 0]
    assert above[:, 0].tolist() == [10, 0, 5]
    assert right[0].tolist() == [1, 2, 0, 4, 3]  # regions of three and of two windows
    assert left[0].tolist() == [2, 0, 1, 4, 3]
    assert Shift(4, 1)(msg) is msg


def test_region_attention_is_attention_over_the_tokens_of_a_region():
    exchange, msg = build('attention', 16, 2), normal('msg', (1, 3, 3, 16))
    exchanged = exchange(msg)
    for rows, columns in ((slice(0, 2), slice(0, 2)), (slice(2, 3), slice(0, 2)), (slice(2, 3), slice(2, 3))):
        tokens = msg[:, rows, columns].flatten(1, 2)  # (1, tokens, 16)
        q, k, v = exchange.qkv(exchange.norm(tokens)).chunk(3, dim=2)
        expected = tokens + exchange.proj(torch.nn.functional.scaled_dot_product_attention(q, k, v))
        torch.testing.assert_close(exchanged[:, rows, columns].flatten(1, 2), expected)


def test_global_attention_is_a_weighted_mean_of_values_over_all_windows():
    exchange, msg = build('global', 16), normal('msg', (1, 3, 5, 16))
    q, k, v = exchange.qkv(exchange.norm(msg.view(15, 16))).chunk(3, dim=1)
    weights = q.softmax(dim=1) @ k.softmax(dim=0).T  # (15, 15): each row sums to 1
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(15))
    torch.testing.assert_close(exchange(msg).view(15, 16), msg.view(15, 16) + exchange.proj(weights @ v))


def test_mix_begins_as_the_shuffle_and_sums_all_chunks():
    msg = normal('msg', (1, 3, 5, 16))
    mix, shuffle = Mix(16, 2), Shuffle(16, 2)
    assert torch.equal(mix(msg), shuffle(msg))
    with torch.no_grad():
        mix.weight[4 * 1 + 2, 4 * 3 + 0] = 0.5  # chunk 2 of token 1 gets half of chunk 0 of token 3
    expected = shuffle(msg)
    expected[0, ::2, 1::2, 8:12][:1] += 0.5 * msg[0, 1:2, 1::2, 0:4]  # only in the regions that have a token 3
    torch.testing.assert_close(mix(msg), expected)


def test_an_exchange_for_each_stage_by_name_or_class():
    network = MSGTransformer(manip_type=['mix', Shift, 'none', 'global'])
    found = [type(block.exchange).__name__ for stage in network.layers for block in stage.blocks]
    assert found == ['Mix'] * 2 + ['Shift'] * 2 + ['NoExchange'] * 6 + ['GlobalAttention'] * 2
    assert stage_exchanges(RegionAttention, 2) == [RegionAttention, RegionAttention]
    with pytest.raises(ValueError, match='write one exchange, or a list of 4, one per stage'):
        MSGTransformer(manip_type=['shuf', 'none'])
    with pytest.raises(ValueError, match="manip_type is 'shove': write one of 'shuf', 'none'"):
        MSGTransformer(manip_type='shove')


def test_the_published_exchanges_have_no_parameters():
    with torch.device('meta'):
        published, plain = MSGTransformer(manip_type='shuf'), MSGTransformer(manip_type='none')
    names = {name for name, _ in published.named_parameters()}
    assert names == {name for name, _ in plain.named_parameters()}
    assert not any('exchange' in name for name in names)


def test_an_exchange_whose_output_is_not_read_has_gradients_of_zero():
    """DDP waits for the gradient of every parameter, so there must be one."""
    options = {'embed_dim': 32, 'depths': (1, 1), 'num_heads': (1, 2), 'shuffle_size': (2, 1), 'num_classes': 3}
    for head_tokens, is_read in (('msg', True), ('patches', False)):
        network = MSGTransformer(56, manip_type='attention', head_tokens=head_tokens, **options)
        network(torch.randn(1, 3, 56, 56)).sum().backward()
        last = network.layers[1].blocks[0].exchange.proj.weight.grad
        assert (last.abs().max() > 0) == is_read
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_exchanges_with_weights_for_a_region_keep_its_size():
    options = {'embed_dim': 48, 'depths': (1, 1), 'num_heads': (2, 4), 'shuffle_size': (2, 2)}
    network = MSGTransformer(56, patch_size=2, manip_type='mix', **options)
    network.set_input_size(112)  # the same regions
    state = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match='Mix exchanges MSG tokens in regions of 2 windows, and this size needs .* 1'):
        network.set_input_size(28)
    assert [stage.window_size for stage in network.layers] == [7, 7]
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    resized = MSGTransformer(56, patch_size=2, manip_type='attention', **options)
    resized.set_input_size(28)
    assert [stage.blocks[0].exchange.region_size for stage in resized.layers] == [2, 1]


def test_registered_exchanges_are_found_by_name(monkeypatch):
    monkeypatch.setattr('models.exchange.EXCHANGES', EXCHANGES | {})

    class Roll(Exchange):
        """Tokens move by one row."""

        def forward(self, msg):
            """Roll rows of (B, nH, nW, C)."""
            return msg.roll(1, dims=1)

    assert register_exchange('roll')(Roll) is Roll
    assert type(MSGTransformer(manip_type='roll').layers[0].blocks[0].exchange) is Roll
    assert register_exchange('roll')(Roll) is Roll  # a module that is imported again
    with pytest.raises(ValueError, match="the exchange 'shuf' is already models.exchange.Shuffle"):
        register_exchange('shuf')(Roll)
    with pytest.raises(ValueError, match='is not a subclass of Exchange'):
        register_exchange('other')(torch.nn.Identity)
