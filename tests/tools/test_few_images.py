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


def test_tables_have_means_and_differences_of_the_reported_seeds(tmp_path):
    accuracies = {'linear': (60, 62, 64), 'finetune': (64, 67, 70)}
    trials = [
        {'way': way, 'count': 20, 'seed': seed, 'setting': None, 'top1': top1}
        for way, values in accuracies.items()
        for seed, top1 in enumerate(values)
    ]
    trials.append({'way': 'linear', 'count': 20, 'seed': TUNING_SEED, 'setting': None, 'top1': 0})
    data = {'train': {'images': 1437}, 'val': {'images': 360}}
    path = tmp_path / 'few_images.json'
    content = {'data': data, 'processor': 'AMD', 'revision': 'abc (modified)', 'trials': trials}
    path.write_text(json.dumps(content))
    lines = run_here('-m', 'tools.few_images', '--results', path).stdout.splitlines()
    assert lines[2] == '| 20 |  | 67.0 ± 3.0 | 62.0 ± 2.0 |  |'
    assert lines[6] == '| 20 |  | +5.0 (+2.5 to +7.5) |  |'  # of 4, 5 and 6 points
    assert lines[-1].startswith('Dataset of 1,437 and 360 images; ')
    assert lines[-1].endswith('; revision abc (modified).')
    path.write_text('[1]')
    line = error_line('-m', 'tools.few_images', '--results', path)
    assert line.endswith('holds no results of tools.few_images')


@pytest.mark.slow
def test_the_experiment_in_small(digits, tmp_path, monkeypatch, capsys):
    for name, value in {'PRETRAINING': TINY, 'FINETUNING': TINY, 'EPOCHS': 1, 'UPDATES': 2, 'SEEDS': (0, 1)}.items():
        monkeypatch.setattr(few_images, name, value)
    digits = shutil.copytree(digits, tmp_path / 'digits')
    settings = {'scratch': (1e-3,), 'finetune': (1e-3, 1e-2), 'linear': (None,), 'knn': (1, 3, 5)}
    monkeypatch.setattr(few_images, 'SETTINGS', settings)
    output = tmp_path / 'out'
    results = compare(Experiment(digits, output, epochs=1, jobs=2), [4])
    stored = json.loads((output / 'few_images.json').read_text())
    assert stored == results
    trials = stored['trials']
    assert len(trials) == 6 + 4 * 2  # every setting that 4 images allow, and the best one of each way with two seeds
    tuned = {x['setting']: x['top1'] for x in trials if (x['way'], x['seed']) == ('finetune', TUNING_SEED)}
    (setting,) = {x['setting'] for x in trials if x['way'] == 'finetune' and x['seed'] != TUNING_SEED}
    assert tuned[setting] == max(tuned.values())
    for way, rate, kind in (('scratch', '0_001', SCRATCH), ('finetune', '0_01', PRETRAINED)):
        checkpoint = load_checkpoint(output / f'{way}_4_lr_{rate}/seed{TUNING_SEED}/ckpt_epoch_1.pth')
        assert checkpoint['origin']['kind'] == kind
    assert '| 4 |' in tables(results)

    (output / 'few_images.json').unlink()
    again = compare(Experiment(digits, output, epochs=1, jobs=1), [4])  # of the finished runs
    assert sorted(map(str, again['trials'])) == sorted(map(str, trials))
    with pytest.raises(StudyError, match='holds a run with other settings'):
        compare(Experiment(digits, output, epochs=2, jobs=1), [4])
    (digits / 'val/0').joinpath('another.png').symlink_to(next((digits / 'val/0').glob('*.png')))
    with pytest.raises(FewImagesError, match='has runs on other data: write another --output'):
        compare(Experiment(digits, output, epochs=1, jobs=1), [4])
