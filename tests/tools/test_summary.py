import re

import pytest
import torch

from config import load_config
from models import build_model
from tests.helpers.paths import DETECTION_CONFIGS, ROOT, TINY
from tests.helpers.runs import CPU
from tools.summary import forward_parts, main, summarise, table, time_parts

MSG_TINY = ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml'


def meta_model(path):
    with torch.device('meta'):
        return build_model(load_config(path))


def call(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['summary', *map(str, arguments)])
    main()


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


def test_timed_parts_are_those_of_a_forward_pass(tiny_config):
    model = build_model(tiny_config()).eval()
    with torch.inference_mode():
        calls = forward_parts(model, torch.randn(2, 3, *model.img_size))
        assert len(calls) == len(summarise(model))
        *_, head, whole = calls
        assert torch.equal(head(), whole())
    assert all(seconds > 0 for seconds in time_parts(model, CPU, rounds=1))


def test_table_is_printed(monkeypatch, capsys):
    monkeypatch.setattr('tools.summary.time_parts', lambda *_: [0.001, 0.002, 0.003, 0.004, 0.0105])
    call(monkeypatch, TINY, '--opts', 'MODEL.NUM_CLASSES', '1')
    head, line, *rows, blank, note = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.split('|')[1:-1]] for row in (head, line, *rows)]
    assert len({len(row) for row in cells}) == 1
    assert cells[3] == ['stage 1', '14 x 14', '2 x 2', '7 x 7', '2 x 2', '200', '8', '1', '1', *cells[3][9:11], '2.00']
    assert [row[0] for row in cells[2:]] == ['embedding', 'stage 1', 'stage 2', 'head', 'total']
    assert cells[-1][-1] == '10.50'
    assert blank == ''
    assert re.search(r'median of 10 rounds, one image of 28 x 28 pixels, fp32, not compiled, cpu, \d+ thread', note)
    call(monkeypatch, TINY, '--no-time', '--img-size', '56', '30')
    without = capsys.readouterr().out.splitlines()
    assert len(without) == 7
    assert 'time' not in without[0]
    assert '| stage 2 | 14 x 8 | 2 x 2 | 7 x 7 | none |' in without[4]


def test_other_networks_are_summarised(tiny_config):
    others = {'MODEL__NUM_CLASSES': 0}, {'MODEL__MSG__IN_CHANS': 1, 'MODEL__MSG__APE': True}
    for options in (*others, {'MODEL__MSG__HEAD_TOKENS': 'patches'}, {'MODEL__MSG__MSG_TOKENS': False}):
        model = build_model(tiny_config(**options)).eval()
        *parts, total = summarise(model)
        assert total.parameters == sum(p.numel() for p in model.parameters())
        assert total.flops == model.flops()
        assert parts[1].tokens == 14 * 14 + 4 * options.get('MODEL__MSG__MSG_TOKENS', True)
        with torch.inference_mode():
            *_, head, whole = forward_parts(model, torch.randn(2, model.in_chans, *model.img_size))
            assert torch.equal(head(), whole())
        assert 'nan' not in table([*parts, total])


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        (['nowhere'], 1, 'error: config file nowhere: No such file'),
        (
            [DETECTION_CONFIGS / 'digits.yaml'],
            1,
            'digits.yaml is not of a classifier; tools.complexity',
        ),
        (
            [TINY, '--opts', 'MODEL.TYPE', 'timm:resnet18'],
            1,
            'MODEL.TYPE is timm:resnet18, and this tool is for MSG-Transformers',
        ),
        ([TINY, '--img-size', '1'], 1, 'error: --img-size: image size 1 x 1 is smaller than one patch of 2 x 2 pixels'),
        ([TINY, '--img-size', '28', '28', '3'], 2, 'argument --img-size: write one number, or height and width'),
        ([TINY, '--img-size', 'x'], 2, 'x is not a positive integer'),
        ([TINY, '--opts', 'NO.KEY', '1'], 1, 'NO.KEY'),
        ([TINY, '--no-time', '--opts', 'DEVICE', 'tpu'], 1, 'DEVICE'),
    ],
)
def test_mistakes_are_reported_in_a_line(monkeypatch, capsys, arguments, code, message):
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, *arguments)
    text = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert message in text
    assert (1 if isinstance(exit_.value.code, str) else exit_.value.code) == code


def test_the_documented_table_is_the_one_that_is_printed():
    printed = table(summarise(meta_model(MSG_TINY)))
    assert printed in (ROOT / 'docs' / 'prediction.md').read_text()
