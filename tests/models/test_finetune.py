import pytest
import torch

from engine.checkpoint import CheckpointError
from engine.weights import load_weights
from models import MSGTransformer
from tests.helpers.golden import fill_

NARROW = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8), 'num_classes': 3}


def test_weights_are_fitted_and_it_says_what_was_done():
    source = fill_(MSGTransformer(**NARROW, ape=True)).state_dict()
    before = dict(source)
    target = MSGTransformer(**NARROW, ape=True, img_size=192, window_size=6, shuffle_size=(2, 2, 2, 1))
    fitted, notes = target.fit_state_dict(source)
    target.load_state_dict(fitted)
    assert notes == [
        'msg_tokens of a shuffle region of 4 x 4 windows cropped to 2 x 2',
        'absolute_pos_embed of 56 x 56 patches interpolated to 48 x 48',
        'position bias of 5 block(s) interpolated from windows of 7 x 7 to 6 x 6',
    ]
    assert source == before
    unchanged = [name for name, value in source.items() if fitted[name] is value]
    assert len(source) - len(unchanged) == 2 + 2 * 5  # tokens, embedding; table and index of each block
    same, notes = MSGTransformer(**NARROW, ape=True).fit_state_dict(source)
    assert notes == []
    assert all(same[name] is value for name, value in source.items())


def test_another_network_is_left_for_loading_to_refuse():
    wide = MSGTransformer(**NARROW | {'embed_dim': 32, 'num_heads': (2, 4, 8, 16)}, img_size=384, window_size=12)
    fitted, notes = MSGTransformer(**NARROW).fit_state_dict(wide.state_dict())
    assert notes == []
    with pytest.raises(RuntimeError, match='size mismatch for layers.0.blocks.0.attn.relative_position_bias_table'):
        MSGTransformer(**NARROW).load_state_dict(fitted)
    with pytest.raises(ValueError, match='168 cells do not form a square grid'):
        MSGTransformer(**NARROW).fit_state_dict(
            {'layers.0.blocks.0.attn.relative_position_bias_table': torch.zeros(168, 1)}
        )


def test_weights_of_a_shuffle_start_a_network_with_another_exchange():
    source = {'model': fill_(MSGTransformer(**NARROW)).state_dict()}
    network = MSGTransformer(**NARROW, manip_type=['attention', 'mix', 'mean', 'shuf'])
    own = {name for name, _ in network.named_parameters() if '.exchange.' in name}
    with pytest.raises(CheckpointError, match='missing: layers.0.blocks.0.exchange.* --pretrained-missing allow loads'):
        load_weights(network, source, 'shuffle.pth', missing='report')
    loaded = load_weights(network, source, 'shuffle.pth', missing='allow')
    assert (set(loaded.missing), loaded.unexpected) == (own, [])
    assert f'{len(own)} weights not in the file, kept as initialized: layers.0.blocks.0.exchange' in loaded.notes[0]
    assert all(
        torch.equal(value, source['model'][name]) for name, value in network.state_dict().items() if name not in own
    )


@pytest.mark.parametrize(
    ('count', 'trained'),
    [
        (-1, {'patch_embed', 'msg_tokens', 'absolute_pos_embed', 'layers', 'norm', 'head'}),
        (0, {'layers', 'norm', 'head'}),
        (1, {'layers', 'norm', 'head'}),
        (4, {'head'}),
    ],
)
def test_frozen_stages_get_no_gradient_and_no_dropout(count, trained):
    model = MSGTransformer(**NARROW, ape=True, drop_rate=0.5, drop_path_rate=0.5)
    model.freeze_stages(count)
    model.train()
    assert [stage.training for stage in model.layers] == [i >= count for i in range(4)]
    assert model.pos_drop.training == (count < 0)
    assert model.head.training
    model(torch.randn(2, 3, 224, 224)).logsumexp(1).sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split('.')[0] for name in with_gradient} == trained
    stages = {int(name.split('.')[1]) for name in with_gradient if name.startswith('layers.')}
    assert stages == set(range(max(count, 0), 4))
    assert not model.eval().layers[3].training
    with pytest.raises(ValueError, match='5 stages cannot be frozen: the network has 4'):
        model.freeze_stages(5)
