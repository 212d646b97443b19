import math
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main as program
from logger import MetricsLog, add_log_file, create_logger, parse_record
from tests.helpers.bad_files import as_lines, bad_files
from tests.helpers.paths import ROOT
from tests.helpers.runs import folder_of, records


def test_nonfinite_numbers_are_null(tmp_path):
    MetricsLog(tmp_path).write('train', 3, a=math.inf, b=1.5)
    assert (tmp_path / 'metrics.jsonl').read_text() == '{"kind": "train", "updates": 3, "a": null, "b": 1.5}\n'


def test_records_that_will_be_repeated_are_removed(tmp_path):
    log = MetricsLog(tmp_path)
    for epoch, step in ((0, 0), (0, 1), (0, None), (1, 0), (1, 1)):
        log.write('epoch' if step is None else 'train', 0, epoch=epoch, **({} if step is None else {'step': step}))
    before = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    MetricsLog(tmp_path, epoch=1, step=1)
    assert (tmp_path / 'metrics.jsonl').read_text().splitlines() == before[:4]


def test_damaged_lines_are_removed_and_whole_ones_stay(tmp_path):
    whole = [
        {'kind': kind, 'epoch': epoch, 'step': step, 'updates': 2 * epoch + step, 'loss': 1.0, 'acc1': 50.0}
        for epoch in (0, 1, 2)
        for kind, step in (('train', 0), ('train', 1), ('epoch', 0))
    ]
    path, kept = tmp_path / 'metrics.jsonl', 0
    extremes = (b'', b'\n', b'[' * 9_000 + b'\n', b'9' * 9_000 + b'\n')  # too deep, too many digits for Python
    for content in (*extremes, *bad_files(whole, as_lines)):
        path.write_bytes(content)
        MetricsLog(tmp_path, epoch=1, step=1)
        lines = path.read_bytes().splitlines(keepends=True)
        kept += len(lines)
        assert all(parse_record(line)['epoch'] <= 1 for line in lines)
        assert all(line in content.splitlines(keepends=True) for line in lines)
    assert kept > 100


def test_log_is_utf_8_and_loses_no_line(tmp_path, capsys):
    logger, path = create_logger(1), tmp_path / 'log_rank1.txt'
    add_log_file(logger, path)
    logger.info('\u6c7d\u8f66 \udcff')
    assert path.read_bytes().endswith('\u6c7d\u8f66 \\udcff\n'.encode())
    assert capsys.readouterr().err == ''


def test_only_rank_0_writes_to_the_console(tmp_path, capsys):
    for rank in (0, 1):
        logger, path = create_logger(rank), tmp_path / f'log_rank{rank}.txt'
        add_log_file(logger, path)
        logger.info(f'rank {rank}')
        assert f'INFO rank {rank}' in path.read_text()
    out = capsys.readouterr().out
    assert 'rank 0' in out
    assert 'rank 1' not in out


def test_tensorboard_has_the_same_metrics(tiny_config, image_tree):
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree), TAG='without', TRACKER='none'))
    assert not (folder_of(tiny_config(TAG='without')) / 'tensorboard').exists()
    config = tiny_config(DATA__DATA_PATH=str(image_tree))
    program.main(config)
    for name in ('ckpt_epoch_1.pth', 'ckpt_best.pth'):  # so that the last epoch is repeated
        (folder_of(config) / name).unlink(missing_ok=True)
    program.main(config)
    events = EventAccumulator(str(folder_of(config) / 'tensorboard')).Reload()
    for kind, key in (('train', 'loss'), ('train', 'lr'), ('epoch', 'acc1'), ('epoch', 'val_loss')):
        written = [(event.step, event.value) for event in events.Scalars(f'{kind}/{key}')]
        expected = [(record['updates'], pytest.approx(record[key])) for record in records(config, kind)]
        assert written == expected  # each once, also those of the repeated epoch


@pytest.mark.slow
def test_a_log_goes_on_after_the_reader_of_the_console_has_ended(tmp_path):
    program = f"""
from pathlib import Path
from logger import add_log_file, create_logger
logger = create_logger(0)
add_log_file(logger, Path({str(tmp_path / 'log.txt')!r}))
for number in range(20_000):
    logger.info(number)
"""
    command = f'{sys.executable} -c "$0" | head -n 1'
    done = subprocess.run(['bash', '-c', command, program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ''
    assert len((tmp_path / 'log.txt').read_text().splitlines()) == 20_000
