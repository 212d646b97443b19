import pytest
import torch

from config import load_config
from models import build_model
from tests.helpers.paths import ROOT
from tools.summary.stages import summarise, table

MSG_TINY = ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml'


def meta_model(path):
    config = load_config(path)
    with torch.device('meta'):
        return build_model(config)


def test_stages_of_the_published_tiny_network():
    embedding, *stages, head, total = summarise(meta_model(MSG_TINY))
    assert [stage.patches for stage in stages] == [(56, 56), (28, 28), (14, 14), (7, 7)]
    assert [stage.windows for stage in stages] == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert [stage.window for stage in stages] == [7] * 4
    assert [stage.region for stage in stages] == [4, 4, 2, 1]
    assert [stage.tokens for stage in stages] == [56 * 56 + 64, 28 * 28 + 16, 14 * 14 + 4, 7 * 7 + 1]
    assert [stage.channels for stage in stages] == [96, 192, 384, 768]
    assert [stage.heads for stage in stages] == [3, 6, 12, 24]
    assert [stage.blocks for stage in stages] == [2, 2, 6, 2]
    assert (embedding.tokens, embedding.channels) == (3200, 96)
    assert embedding.parameters == 96 * 3 * 16 + 96 + 2 * 96 + 16 * 96
    assert embedding.flops == 56 * 56 * 96 * (3 * 16 + 1)
    assert head.parameters == 2 * 768 + 768 * 1000 + 1000
    assert head.flops == 768 * (49 + 1 + 1000)
    assert (total.blocks, total.parameters, total.flops) == (12, 28290166, 4588614144)


@pytest.mark.parametrize('path', sorted(ROOT.glob('configs/*.yaml')), ids=lambda path: path.name)
@pytest.mark.parametrize('size', [None, (250, 300)])
def test_parameters_and_multiply_adds_sum_to_the_networks(path, size):
    model = meta_model(path)
    if size:
        model.set_input_size(size)
    *parts, total = summarise(model)
    assert total.parameters == sum(part.parameters for part in parts) == sum(p.numel() for p in model.parameters())
    assert total.flops == sum(part.flops for part in parts) == model.flops()
    counted = [sum(p.numel() for p in stage.parameters()) for stage in model.layers]
    assert [part.parameters for part in parts[1:-1]] == counted


@pytest.mark.parametrize(
    'options',
    [
        {'MODEL__NUM_CLASSES': 0},
        {'MODEL__MSG__IN_CHANS': 1, 'MODEL__MSG__APE': True},
        {'MODEL__MSG__HEAD_TOKENS': 'patches'},
        {'MODEL__MSG__MSG_TOKENS': False},
        {'MODEL__MSG__MANIP_TYPE': "['attention', 'global']"},
    ],
)
def test_other_networks_are_summarised(tiny_config, options):
    model = build_model(tiny_config(**options))
    *parts, total = summarise(model)
    assert total.parameters == sum(p.numel() for p in model.parameters())
    assert total.flops == model.flops()
    assert parts[1].tokens == 14 * 14 + 4 * options.get('MODEL__MSG__MSG_TOKENS', True)
    assert 'nan' not in table([*parts, total])


def test_times_are_a_column():
    *_, head, total = summarise(meta_model(MSG_TINY))
    text = table([head, total], {'head': [0.003, 0.001, 0.002], 'total': [0.0105]})
    assert [line.split('|')[-2].strip() for line in text.splitlines()] == ['time, ms', '---:', '2.00', '10.50']


def test_the_documented_table_is_the_one_that_is_printed():
    printed = table(summarise(meta_model(MSG_TINY)))
    assert printed in (ROOT / 'docs' / 'prediction.md').read_text()
