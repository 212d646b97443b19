import json

import cv2
import pytest
from matplotlib.figure import Figure

from tools.plot import plot, read_epochs


def write_metrics(folder, *epochs):
    folder.mkdir(parents=True)
    records = [{'kind': 'train', 'epoch': 0, 'loss': 9}]
    for epoch, acc1 in epochs:
        records.append({'kind': 'epoch', 'epoch': epoch, 'train_loss': 2, 'val_loss': 1, 'acc1': acc1, 'lr': 0.1})
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))
    return folder


def test_curves(tmp_path):
    run = write_metrics(tmp_path / 'model' / 'run', (0, 10), (1, 20), (1, 30), (2, 40))
    assert [record['acc1'] for record in read_epochs(run / 'metrics.jsonl')] == [
        10,
        30,
        40,
    ]
    plot(run, tmp_path / 'curves.png')
    image = cv2.imread(str(tmp_path / 'curves.png'))
    assert image.shape == (420, 1440, 3)
    assert (image < 128).mean() > 0.005  # something is drawn
    with pytest.raises(ValueError, match='No such file.*--run'):
        plot(tmp_path / 'nowhere', tmp_path / 'c.png')
    with pytest.raises(ValueError, match='no finished epoch'):
        plot(write_metrics(tmp_path / 'none'), tmp_path / 'c.png')
    with (run / 'metrics.jsonl').open('a') as file:
        file.write('{"kind": "ep')  # truncated
    assert len(read_epochs(run / 'metrics.jsonl')) == 3
    with (run / 'metrics.jsonl').open('a') as file:
        file.write('\n{}\n')
    with pytest.raises(ValueError, match='metrics.jsonl, line 6'):
        read_epochs(run / 'metrics.jsonl')


def test_curves_of_a_detector(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *_, **__: figures.append(figure))
    metrics = [{'train_loss': 3, 'lr': 0.1, 'box_AP': 20 + n, 'mask_AP': 10 + n} for n in range(2)]
    records = [{'kind': 'epoch', 'epoch': n} | record for n, record in enumerate(metrics)]
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, records)))
    plot(tmp_path, tmp_path / 'curves.png')
    loss, accuracy, _ = figures[0].axes
    assert [line.get_label() for line in loss.lines] == ['training (augmented)']
    assert [line.get_ydata().tolist() for line in accuracy.lines] == [[20, 21], [10, 11]]
    assert accuracy.get_title() == 'Box AP 21.0 %, Mask AP 11.0 % at the end'
