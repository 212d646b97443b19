import re

import pytest

from models.exchange import EXCHANGES
from tests.helpers.paths import DETECTION_CONFIGS, ROOT, TINY
from tools.summary import __main__ as program

MSG_TINY = ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml'
NO_SHUFFLE = ['--opts', 'MODEL.MSG.MANIP_TYPE', 'none']
DETECTOR = DETECTION_CONFIGS / 'digits.yaml'


def call(monkeypatch, capsys, *arguments):
    """The printed lines."""
    monkeypatch.setattr('sys.argv', ['summary', *map(str, arguments)])
    program.main()
    return capsys.readouterr().out.splitlines()


def cells(line):
    return [cell.strip() for cell in line.split('|')[1:-1]]


def test_configs_of_both_tasks_are_counted_in_one_table(monkeypatch, capsys):
    head, _, *rows = call(monkeypatch, capsys, MSG_TINY, DETECTOR, TINY)
    assert cells(head)[0] == 'model'
    assert [cells(row)[0] for row in rows] == ['msg_tiny_p4_win7_224', 'cascade_mask_rcnn_msg_digits', 'tiny']
    assert cells(rows[0])[1:4] == ['224 x 224', '28,290,166', '4,588,614,144']
    assert cells(rows[1])[1::2] == ['1280 x 800', '']
    (row,) = call(monkeypatch, capsys, DETECTOR, '--opts', 'MODEL.MASK.ENABLED', 'False')[2:]
    assert int(cells(row)[2].replace(',', '')) < int(cells(rows[1])[2].replace(',', ''))


def test_one_msg_network_is_printed_stage_by_stage(monkeypatch, capsys):
    names = ('embedding', 'stage 1', 'stage 2', 'head', 'total')
    monkeypatch.setattr(program, 'time_parts', lambda *_: {name: [0.002] for name in names})
    *count, blank, head, _, _, stage, _, _, total, blank_too, note = call(
        monkeypatch, capsys, TINY, '--time', '--opts', 'MODEL.NUM_CLASSES', '1'
    )
    assert cells(count[2])[:2] == ['tiny', '28 x 28']
    assert (blank, blank_too) == ('', '')
    assert cells(head)[-1] == 'time, ms'
    expected = ['stage 1', '14 x 14', '2 x 2', '7 x 7', '2 x 2', '200', '8', '1', '1']
    assert [*cells(stage)[:9], cells(stage)[-1]] == [*expected, '2.00']
    assert cells(total)[-3] == cells(count[2])[2]  # parameters
    assert cells(total)[-2] == cells(count[2])[3]  # multiply-adds
    assert re.search(r'median of 10 rounds, one image of 28 x 28 pixels, fp32, not compiled, cpu, \d+ thread', note)


def test_exchanges_are_compared(monkeypatch, capsys):
    head, _, *rows = call(monkeypatch, capsys, TINY, '--exchanges', *NO_SHUFFLE)
    assert cells(head)[0] == 'exchange'
    names, parameters = zip(*[(cells(row)[0].strip('`'), cells(row)[2]) for row in rows], strict=True)
    assert list(names) == list(EXCHANGES)
    assert cells(rows[0])[1].startswith('Published exchange: ')
    assert len(set(parameters)) == 3  # none, one head of attention, weights of chunks
    (row,) = call(monkeypatch, capsys, TINY, '--opts', 'MODEL.MSG.MANIP_TYPE', 'mix')[2:3]
    assert cells(row)[2:] == cells(rows[names.index('mix')])[2:]


def test_sizes_and_other_networks(monkeypatch, capsys):
    lines = call(monkeypatch, capsys, TINY, '--img-size', '56', '30')
    assert cells(lines[2])[1] == '56 x 30'
    assert 'time' not in lines[4]
    assert '| stage 2 | 14 x 8 | 2 x 2 | 7 x 7 | none |' in lines[8]
    (row,) = call(monkeypatch, capsys, TINY, '--opts', 'MODEL.TYPE', 'timm:test_vit', 'DATA.IMG_SIZE', '32')[2:]
    assert cells(row)[1::2] == ['32 x 32', '']


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        ([TINY, TINY, '--exchanges'], 2, 'are for one MSG-Transformer: give one config'),
        ([TINY, '--exchanges', '--time'], 2, '--exchanges counts at DATA.IMG_SIZE: leave out --img-size and --time'),
        ([TINY, '--exchanges', '--opts', 'MODEL.MSG.MSG_TOKENS', 'False'], 1, 'the network has no MSG tokens'),
        ([TINY, '--exchanges', *NO_SHUFFLE, 'MODEL.MSG.EMBED_DIM', '6'], 1, '--exchanges: embed_dim 6 does not fit'),
        (['nowhere'], 1, 'error: config file nowhere: No such file'),
        (
            [DETECTOR, '--time'],
            1,
            'are for MSG-Transformers, and MODEL.TYPE is cascade_rcnn',
        ),
        ([TINY, '--img-size', '30', '--opts', 'MODEL.TYPE', 'timm:resnet18'], 1, 'and MODEL.TYPE is timm:resnet18'),
        (
            [TINY, DETECTOR, '--time'],
            2,
            'are for one MSG-Transformer: give one config',
        ),
        ([TINY, '--img-size', '1'], 1, 'error: --img-size: image size 1 x 1 is smaller than one patch of 2 x 2 pixels'),
        ([TINY, '--img-size', '28', '28', '3'], 2, 'argument --img-size: write one number, or height and width'),
        ([TINY, '--img-size', 'x'], 2, 'x is not a positive integer'),
        ([TINY, '--opts', 'NO.KEY', '1'], 1, 'NO.KEY'),
        ([TINY, '--time', '--opts', 'DEVICE', 'tpu'], 1, 'DEVICE'),
    ],
)
def test_mistakes_are_reported_in_a_line(monkeypatch, capsys, arguments, code, message):
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, capsys, *arguments)
    text = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert message in text
    assert (1 if isinstance(exit_.value.code, str) else exit_.value.code) == code
