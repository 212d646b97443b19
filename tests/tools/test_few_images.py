"""`tools.few_images`: subsets, the choice of settings, and the whole experiment in small."""

import json
import shutil

import pytest

from engine.checkpoint import load_checkpoint
from engine.experiment import PRETRAINED, SCRATCH
from tests.helpers.paths import TINY
from tests.helpers.processes import error_line, run_here
from tools import few_images
from tools.few_images import HELD_OUT, TUNING_SEED, Experiment, FewImagesError, compare, tables
from tools.make_digits import make_digits
from tools.study.plan import StudyError
from tools.study.runs import StudyRuns


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits')
    make_digits(folder)
    (folder / 'train/.hidden').mkdir()
    (folder / 'train/1/notes.txt').write_text('no image')
    return folder


def names(folder):
    return {path.resolve().name for path in folder.glob('*/*')}


def test_subsets_share_no_image_with_what_they_are_scored_on(digits, tmp_path):
    experiment = Experiment(digits, tmp_path, epochs=1, jobs=1)
    tuning, *reported = (experiment.subset(20, seed) for seed in (TUNING_SEED, 0, 1))
    held_out = names(tuning / 'val')
    for subset in (tuning, *reported):
        assert {path.name for path in (subset / 'train').iterdir()} == set('13579')
        assert [len(list(path.iterdir())) for path in (subset / 'train').iterdir()] == [20] * 5
        assert not names(subset / 'train') & held_out
        assert subset is tuning or not names(subset / 'train') & names(tuning / 'train')
    assert len(held_out) == 5 * HELD_OUT
    assert names(reported[0] / 'train') != names(reported[1] / 'train')
    assert len(names(reported[0] / 'val')) == sum(len(list((digits / 'val' / x).iterdir())) for x in '13579')
    assert {path.name for path in (experiment.known() / 'train').iterdir()} == set('02468')


def test_a_dataset_is_kept_or_repaired(digits, tmp_path):
    experiment = Experiment(digits, tmp_path, epochs=1, jobs=1)
    subset = experiment.subset(5, 0)
    before, inode = names(subset / 'train'), subset.stat().st_ino
    assert experiment.subset(5, 0).stat().st_ino == inode
    link = next((subset / 'train').glob('*/*'))
    link.unlink()
    assert names(experiment.subset(5, 0) / 'train') == before


def test_too_few_images_or_classes_are_refused(digits, tmp_path):
    with pytest.raises(FewImagesError, match=r'class 1 has \d+ training images, and 300 are needed'):
        Experiment(digits, tmp_path, epochs=1, jobs=1).subset(100, 0)
    for split in ('train', 'val'):
        for digit in '01':
            (tmp_path / split / digit).mkdir(parents=True)
            (tmp_path / split / digit / '0.png').symlink_to(next((digits / split / digit).glob('*.png')))
    with pytest.raises(FewImagesError, match='has 2 classes: give a dataset of four or more'):
        Experiment(tmp_path, tmp_path / 'out', epochs=1, jobs=1)


def test_a_stopped_experiment_starts_no_run(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(StudyRuns, 'train', lambda *args: pytest.fail('a run was started'))
    experiment = Experiment(digits, tmp_path, epochs=1, jobs=1)
    experiment.stop()
    assert experiment.pretrain() is None


def test_tables_have_means_and_differences_of_the_reported_seeds(tmp_path):
    where = {'processor': 'AMD', 'revision': 'abc (modified)'}
    accuracies = {'linear': (60, 62, 64), 'finetune': (64, 67, 70)}
    trials = [
        {'method': method, 'count': 20, 'seed': seed, 'setting': 0.01, 'top1': top1, **where}
        for method, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]
    for setting in (0.1, 0.01):
        tuning = {'method': 'linear', 'count': 20, 'seed': TUNING_SEED, 'setting': setting, 'top1': 0}
        trials.append({**tuning, 'processor': 'Intel', 'revision': 'def'})
    data = {'train': {'images': 1437}, 'val': {'images': 360}}
    path = tmp_path / 'few_images.json'
    content = {'data': data, 'pretraining_epochs': 40, 'trials': trials}
    path.write_text(json.dumps(content))
    lines = run_here('-m', 'tools.few_images', '--results', path).stdout.splitlines()
    assert lines[2] == '| 20 |  | 67.0 ± 3.0 | 62.0 ± 2.0 |  |'
    assert lines[6] == '| 20 |  | +5.0 (+2.5 to +7.5) |  |'  # of 4, 5 and 6 points
    assert lines[10] == '| 20 |  | 0.01 | 0.01 * |  |'
    assert lines[-1].startswith('1,437 training and 360 validation images, ')
    assert lines[-1].endswith('; processor AMD and Intel; revision abc (modified), def.')
    path.write_text('[1]')
    line = error_line('-m', 'tools.few_images', '--results', path)
    assert line.endswith('holds no results that this version reads: give a few_images.json')


@pytest.mark.slow
def test_the_experiment_in_small(digits, tmp_path, monkeypatch, capsys):
    for name, value in {'PRETRAINING': TINY, 'FINETUNING': TINY, 'EPOCHS': 1, 'UPDATES': 2, 'SEEDS': (0, 1)}.items():
        monkeypatch.setattr(few_images, name, value)
    digits = shutil.copytree(digits, tmp_path / 'digits')
    settings = {'scratch': (1e-3,), 'finetune': (1e-3, 1e-2), 'linear': (0.1, 1), 'knn': (1, 3, 5)}
    monkeypatch.setattr(few_images, 'SETTINGS', settings)
    output = tmp_path / 'out'
    results = compare(Experiment(digits, output, epochs=1, jobs=2), [4])
    stored = json.loads((output / 'few_images.json').read_text())
    assert stored == results
    trials = stored['trials']
    assert len(trials) == 7 + 4 * 2  # every setting that 4 images allow, and the best one of each method with two seeds
    tuned = {x['setting']: x['top1'] for x in trials if (x['method'], x['seed']) == ('finetune', TUNING_SEED)}
    (setting,) = {x['setting'] for x in trials if x['method'] == 'finetune' and x['seed'] != TUNING_SEED}
    assert tuned[setting] == max(tuned.values())
    for method, rate, kind in (('scratch', '0_001', SCRATCH), ('finetune', '0_01', PRETRAINED)):
        checkpoint = load_checkpoint(output / f'{method}_4_lr_{rate}/seed{TUNING_SEED}/ckpt_epoch_1.pth')
        assert checkpoint['origin']['kind'] == kind
    assert '| 4 |' in tables(results)

    other_count = {**trials[0], 'count': 2}
    (output / 'few_images.json').write_text(json.dumps({**stored, 'trials': [other_count, *trials]}))
    finished = {path: path.stat().st_mtime_ns for path in output.glob('*/seed*/*')}
    again = compare(Experiment(digits, output, epochs=1, jobs=1), [4])
    assert sorted(map(str, again['trials'])) == sorted(map(str, [other_count, *trials]))
    assert {path: path.stat().st_mtime_ns for path in output.glob('*/seed*/*')} == finished
    with pytest.raises(FewImagesError, match='on other data or with other --epochs: write another --output'):
        compare(Experiment(digits, output, epochs=2, jobs=1), [4])
    (output / 'few_images.json').unlink()
    with pytest.raises(StudyError, match='holds another run'):
        compare(Experiment(digits, output, epochs=2, jobs=1), [4])
    (digits / 'val/0').joinpath('another.png').symlink_to(next((digits / 'val/0').glob('*.png')))
    with pytest.raises(StudyError, match=r'pretrained/seed0 holds another run \(val has'):
        compare(Experiment(digits, output, epochs=1, jobs=1), [4])
