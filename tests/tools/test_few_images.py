"""`tools.few_images`: subsets, the choice of settings, and the whole experiment in small."""

import json
from argparse import Namespace

import pytest

from engine.checkpoint import load_checkpoint
from engine.experiment import PRETRAINED, SCRATCH
from tests.helpers.paths import TINY
from tests.helpers.processes import error_line, run_here
from tests.tools.test_study import digits  # noqa: F401
from tools import few_images
from tools.few_images import TUNING_SEED, FewImagesError, Results, Trial, make_subset, run_all
from tools.make_digits import make_digits


@pytest.fixture(scope='module')
def ten_digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ten_digits')
    make_digits(folder)
    return folder


def names(folder):
    return {path.resolve().name for path in folder.glob('*/*')}


def test_subsets_share_no_image_with_what_they_are_scored_on(ten_digits, tmp_path):
    tuning, *reported = (make_subset(ten_digits, tmp_path, 20, seed) for seed in (TUNING_SEED, 0, 1))
    held_out = names(tuning / 'val')
    for subset in (tuning, *reported):
        assert {path.name for path in (subset / 'train').iterdir()} == set('13579')
        assert [len(list(path.iterdir())) for path in (subset / 'train').iterdir()] == [20] * 5
        assert not names(subset / 'train') & held_out
        assert subset is tuning or not names(subset / 'train') & names(tuning / 'train')
    assert len(held_out) == 5 * few_images.HELD_OUT
    assert names(reported[0] / 'train') != names(reported[1] / 'train')
    assert names(reported[0] / 'val') == {
        path.name for digit in '13579' for path in (ten_digits / 'val' / digit).iterdir()
    }
    assert names(make_subset(ten_digits, tmp_path, 20, 0) / 'train') == names(reported[0] / 'train')


def test_too_few_images_or_classes_are_refused(ten_digits, digits, tmp_path):  # noqa: F811
    with pytest.raises(FewImagesError, match=r'train/1 has \d+ images, and 300 are needed'):
        make_subset(ten_digits, tmp_path, 100, 0)
    with pytest.raises(FewImagesError, match='train has 2 class folders: give a dataset of four or more'):
        make_subset(digits, tmp_path, 5, 0)


def test_settings_are_chosen_on_held_out_images(tmp_path):
    results = Results(tmp_path / 'few_images.json')
    for setting, accuracy in ((2.5e-4, 50.0), (5e-4, 60.0), (1e-3, 60.0), (2e-3, 40.0)):
        results.add(Trial('scratch', 5, TUNING_SEED, setting), accuracy)
        results.add(Trial('scratch', 5, 0, setting), 100 - accuracy)
    assert results.best_setting('scratch', 5) == 5e-4
    for neighbours, accuracy in ((1, 50.0), (3, 60.0), (5, 70.0)):  # not 10: there are 5 images of a class
        results.add(Trial('knn', 5, TUNING_SEED, neighbours), accuracy)
    assert results.best_setting('knn', 5) == 5
    assert Results(tmp_path / 'few_images.json').find(Trial('knn', 5, TUNING_SEED, 3)) == 60.0


def test_table_has_means_over_the_reported_seeds(tmp_path):
    results = Results(tmp_path / 'few_images.json')
    results.add(Trial('linear', 20, TUNING_SEED, None), 10.0)
    for seed, accuracy in enumerate((60.0, 62.0, 64.0)):
        results.add(Trial('linear', 20, seed, None), accuracy)
    done = run_here('-m', 'tools.few_images', '--results', tmp_path / 'few_images.json')
    assert done.stdout.splitlines()[2] == '| 20 |  |  | 62.0 ± 2.0 |  |'
    for seed, accuracy in enumerate((64.0, 67.0, 70.0)):
        results.add(Trial('finetune', 20, seed, 1e-3), accuracy)
    done = run_here('-m', 'tools.few_images', '--results', tmp_path / 'few_images.json')
    assert done.stdout.splitlines()[6] == '| 20 |  | +5.0 (+2.5 to +7.5) |  |'  # 4, 5 and 6 points
    (tmp_path / 'other.json').write_text('[1]')
    line = error_line('-m', 'tools.few_images', '--results', tmp_path / 'other.json')
    assert line.endswith('holds no results of tools.few_images')


@pytest.mark.slow
def test_the_experiment_in_small(ten_digits, tmp_path, monkeypatch, capsys):
    for name, value in {'PRETRAINING': TINY, 'FINETUNING': TINY, 'EPOCHS': 1, 'UPDATES': 2, 'SEEDS': (0, 1)}.items():
        monkeypatch.setattr(few_images, name, value)
    settings = {'scratch': (1e-3,), 'finetune': (1e-3,), 'linear': (None,), 'knn': (1, 3)}
    monkeypatch.setattr(few_images, 'SETTINGS', settings)
    args = Namespace(data_path=ten_digits, output=tmp_path / 'out', jobs=2, epochs=1, counts=[4])
    run_all(args)
    printed = capsys.readouterr().out
    trials = json.loads((tmp_path / 'out/few_images.json').read_text())['trials']
    assert len(trials) == 5 + 4 * 2  # every setting, and the best one of each way with two seeds
    fine_tuned = json.loads((tmp_path / 'out/finetune_4/seed0_0.001/metrics.jsonl').read_text().splitlines()[-1])
    assert next(x['top1'] for x in trials if x['way'] == 'finetune' and x['seed'] == 0) == round(fine_tuned['acc1'], 3)
    for way, kind in (('scratch', SCRATCH), ('finetune', PRETRAINED)):
        assert load_checkpoint(tmp_path / f'out/{way}_4/seed0_0.001/ckpt_epoch_1.pth')['origin']['kind'] == kind
    run_all(args)
    assert capsys.readouterr().out.strip() == printed.partition('\n\n')[2].strip()
