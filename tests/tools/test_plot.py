import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from tools.plot import STYLES, PlotError, main, moving_average, plot, plot_losses, read_run, read_runs, short_names

STEPS = 10  # updates per epoch


def write_metrics(folder, *epochs, steps=STEPS, **metrics):
    """A run's metrics.jsonl: a record of every fifth update and one of each epoch, whose top-1 accuracy is given."""
    folder.mkdir(parents=True)
    records = []
    for epoch, acc1 in epochs:
        for update in range(epoch * steps + 1, (epoch + 1) * steps + 1, 5):
            records.append({'kind': 'train', 'epoch': epoch, 'updates': update, 'loss': 100 / update})
        record = {'kind': 'epoch', 'epoch': epoch, 'updates': (epoch + 1) * steps, 'train_loss': 2, 'lr': 0.1}
        records.append(record | (metrics or {'val_loss': 1, 'acc1': acc1}))
    write(folder, records)
    return folder


def write(folder, records):
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in records))


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


def call(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['plot', *map(str, arguments)])
    main()


def test_curves_of_a_run(tmp_path, monkeypatch, capsys):
    run = write_metrics(tmp_path / 'model' / 'run', (0, 10), (1, 20), (1, 30), (2, 40))
    call(monkeypatch, '--run', run)
    assert capsys.readouterr().out == f'{run}/curves.png\n'
    image = cv2.imread(str(run / 'curves.png'))
    assert image.shape == (420, 1440, 3)
    assert (image < 128).mean() > 0.005  # something is drawn
    figure = plot(read_runs([run]))
    assert figure.get_suptitle() == 'model / run'
    assert not figure.legends
    loss, accuracy, rate = figure.axes
    raw, average, evaluation = loss.lines
    assert raw.get_ydata() == pytest.approx([100 / update for update in (1, 6, 11, 16, 21, 26)])
    assert raw.get_xdata() == pytest.approx([0.1, 0.6, 1.1, 1.6, 2.1, 2.6])
    assert average.get_linestyle() == '--'
    assert np.ptp(average.get_ydata()) < np.ptp(raw.get_ydata())
    assert evaluation.get_xydata().tolist() == [[1, 1], [2, 1], [3, 1]]
    assert texts(loss.get_legend()) == ['training (augmented), average over 1 epoch(s)', 'evaluation']
    assert accuracy.lines[0].get_xydata().tolist() == [[1, 10], [2, 30], [3, 40]]
    assert accuracy.get_title() == 'Top-1 accuracy 40.0 % at the end'
    assert rate.lines[0].get_ydata().tolist() == [0.1] * 3
    loss = plot(read_runs([run]), smooth=0).axes[0]
    assert [len(line.get_xdata()) for line in loss.lines] == [6, 3]
    assert texts(loss.get_legend()) == ['training (augmented)', 'evaluation']


def test_runs_of_other_tasks_and_lengths_share_a_page(tmp_path, monkeypatch, capsys):
    first = write_metrics(tmp_path / 'msg' / r'_$\frac$', (0, 10), (1, 20))
    second = write_metrics(tmp_path / 'msg' / 'b', (0, 30), steps=20)
    detector = write_metrics(tmp_path / 'detector' / 'b', (0, 0), (1, 0), (2, 0), box_AP=20, mask_AP=None)
    unfinished = write_metrics(tmp_path / 'msg' / 'new')
    svg = tmp_path / 'new' / 'curves.svg'
    call(monkeypatch, '--run', first, second, '--run', detector, unfinished, second, '--output', svg)
    assert capsys.readouterr().err == f'{unfinished} has no finished epoch yet and is left out\n'
    assert '</svg>' in svg.read_text()
    figure = plot(read_runs([first, second, detector, second / '..' / 'b']))
    loss, accuracy, _ = figure.axes
    assert texts(figure.legends[0]) == [
        r'msg/_$\frac$: Top-1 accuracy 20.0 %',
        'msg/b: Top-1 accuracy 30.0 %',
        'detector/b: Box AP 20.0 %, Mask AP nan %',
    ]
    colors = [line.get_color() for line in figure.legends[0].get_lines()]
    assert len(set(colors)) == 3
    drawn = [(line.get_color(), len(line.get_xdata())) for line in accuracy.lines if len(line.get_xdata())]
    assert drawn == [(colors[0], 2), (colors[1], 1), (colors[2], 3), (colors[2], 3)]
    assert accuracy.lines[len(STYLES)].get_marker() == 'o'  # of a single point
    assert accuracy.get_title() == 'Top-1 accuracy, Box AP, Mask AP'
    assert texts(accuracy.get_legend()) == ['Top-1 accuracy', 'Box AP', 'Mask AP']
    assert loss.lines[3].get_xdata() == pytest.approx([0.05, 0.3, 0.55, 0.8])  # 20 updates per epoch
    figure.draw_without_rendering()  # $ is no formula


def test_a_detector_has_no_evaluation_loss(tmp_path):
    run = write_metrics(tmp_path / 'run', (0, 0), (1, 0), box_AP=21, mask_AP=11)
    loss, accuracy, _ = plot(read_runs([run])).axes
    assert texts(loss.get_legend()) == ['training (augmented), average over 1 epoch(s)']
    assert accuracy.get_title() == 'Box AP 21.0 %, Mask AP 11.0 % at the end'


def test_many_runs_have_different_colours(tmp_path):
    runs = [write_metrics(tmp_path / f'run {i}', (0, i)) for i in range(25)]
    figure = plot(read_runs(runs))
    assert len({tuple(line.get_color()) for line in figure.legends[0].get_lines()}) == 25
    figure.draw_without_rendering()
    bottom = figure.legends[0].get_window_extent()
    assert all(not axes.get_tightbbox().overlaps(bottom) for axes in figure.axes)


def test_updates_after_the_last_epoch_and_lost_ones(tmp_path):
    run = write_metrics(tmp_path / 'run', (0, 10), (1, 20))
    with (run / 'metrics.jsonl').open('a') as file:
        for update, loss in ((21, 'null'), (25, '3.0')):
            file.write(f'{{"kind": "train", "epoch": 2, "updates": {update}, "loss": {loss}}}\n')
        file.write('{"kind": "ep')  # the run was killed
    x, y = read_run(run, 'run').training_loss()
    assert x == pytest.approx([0.1, 0.6, 1.1, 1.6, 2.5])
    assert y[-1] == 3


def test_moving_average_is_that_of_the_formula():
    x, y = np.array([0, 1, 3]), np.array([4.0, 2, 8])
    e = np.exp(-1 / 2)
    expected = [4, (4 * e + 2) / (e + 1), (4 * e**3 + 2 * e**2 + 8) / (e**3 + e**2 + 1)]
    assert moving_average(x, y, 2) == pytest.approx(expected)
    assert moving_average(x, np.full(3, 5.0), 0.1) == pytest.approx([5] * 3)


@pytest.mark.parametrize(
    ('folders', 'names'),
    [
        (['out/msg/a'], ['msg/a']),
        (['out/msg/a', 'out/msg/b'], ['a', 'b']),
        (['out/tiny/default', 'out/small/default'], ['tiny', 'small']),
        (['out/tiny/a', 'out/tiny/b', 'out/small/a'], ['tiny/a', 'tiny/b', 'small/a']),
        (['b/a', 'b/out/a'], ['b', 'out']),
    ],
)
def test_names_are_the_shortest_that_differ(folders, names):
    assert short_names([Path('/') / folder for folder in folders]) == names


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (None, 'No such file.*: give --run the folder of a run'),
        (b'', 'holds no finished epoch yet'),
        (b'\xff\xfe', 'not a text'),
        (b'{"kind": "ep\n{}\n', 'metrics.jsonl, line 1 is not a record of a run'),
        (b'[]\n{}\n', 'metrics.jsonl, line 1 is not a record of a run'),
        (b'{"kind": "other"}\n{}\n', 'metrics.jsonl, line 1 is not a record of a run'),
    ],
)
def test_what_is_no_run_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / 'metrics.jsonl').write_bytes(content)
    with pytest.raises(PlotError, match=message):
        read_runs([tmp_path])


@pytest.mark.parametrize(
    ('arguments', 'code', 'message'),
    [
        (['--run', '{run}', '--smooth', 'nan'], 2, 'nan is not a number of epochs: write 0 or more'),
        (['--run', '{run}', '--smooth', '-1'], 2, '-1 is not a number of epochs'),
        (['--run', '{run}', '{run}'], 2, 'several runs need an --output'),
        (['--run', '{run}', '--output', 'curves.txt'], 1, 'curves.txt has no suffix of a picture: write .png or .svg'),
        (['--run', '{run}', '--output', '{run}'], 1, 'has no suffix of a picture'),
        (['--run', '{run}', '--output', '{run}/metrics.jsonl/c.png'], 1, 'write to another folder'),
    ],
)
def test_mistakes_are_reported_in_a_line(tmp_path, monkeypatch, capsys, arguments, code, message):
    run = write_metrics(tmp_path / 'run', (0, 10))
    with pytest.raises(SystemExit) as exit_:
        call(monkeypatch, *(argument.replace('{run}', str(run)) for argument in arguments))
    text = exit_.value.code if isinstance(exit_.value.code, str) else capsys.readouterr().err.splitlines()[-1]
    assert message in text
    assert (1 if isinstance(exit_.value.code, str) else exit_.value.code) == code


def test_each_loss_of_detectors_has_axes_of_its_own(tmp_path):
    for name, losses in (('a', ('loss_box_0', 'loss_mask_0')), ('b', ('loss_box_0',)), ('c', ())):
        (tmp_path / name).mkdir()
        train = [
            {'kind': 'train', 'epoch': 0, 'updates': i, 'loss': 3.0} | {loss: float(i) for loss in losses}
            for i in (1, 2)
        ]
        epoch = {'kind': 'epoch', 'epoch': 0, 'updates': 2, 'lr': 0.1}
        (tmp_path / name / 'metrics.jsonl').write_text(''.join(json.dumps(record) + '\n' for record in (*train, epoch)))
    a, b, c = read_runs([tmp_path / name for name in 'abc'])
    figure = plot_losses([a, b], smooth=0)
    assert [axes.get_title() for axes in figure.axes] == ['box_0', 'mask_0']
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1, 2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['a', 'b']
    a.epochs[0]['val_loss_box_0'] = 2.5
    evaluated = plot_losses([a, b], smooth=0).axes[0].lines[1]
    assert (evaluated.get_xdata().tolist(), evaluated.get_ydata().tolist()) == ([1], [2.5])
    with pytest.raises(PlotError, match='c has a single loss, which is drawn without --losses'):
        plot_losses([a, c])
