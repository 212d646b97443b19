"""What every recipe of tests/helpers/recipes.py keeps: exact resuming, and equal results on every rank."""

import pytest

import main as program
from tests.helpers.extensions import forgotten_modules
from tests.helpers.processes import TORCHRUN, start
from tests.helpers.recipes import RECIPES, options_of, train_and_resume
from tests.helpers.runs import differences, folder_of, last_checkpoint, log_of, one_thread, records


@pytest.fixture(autouse=True)
def without_modules():
    with forgotten_modules():
        yield


@pytest.mark.parametrize('recipe', RECIPES)
def test_resumes_bit_for_bit(tiny_config, image_tree, recipe):
    options = {'DATA__DATA_PATH': str(image_tree)} | options_of(recipe, image_tree)
    with one_thread():
        whole, resumed = train_and_resume(tiny_config, **options)
    assert differences(last_checkpoint(whole), last_checkpoint(resumed)) == []
    assert 'the run resumes bit for bit, as if it had never stopped' in log_of(resumed)


@pytest.mark.slow
def test_two_ranks_have_the_same_results(tiny_config, image_tree, tmp_path):
    done = start(*TORCHRUN, '2', '-m', 'tests.helpers.recipes', image_tree, tmp_path / 'output')
    assert done.returncode == 0, done.stdout + done.stderr
    for recipe in RECIPES:
        options = {'DATA__DATA_PATH': str(image_tree)} | options_of(recipe, image_tree)
        config = tiny_config(TAG=recipe, **options)
        results = [
            [line.split('INFO')[1] for line in log_of(config, rank).splitlines() if ' * ' in line] for rank in (0, 1)
        ]
        assert results[0] == results[1], recipe
        assert len(results[0]) == 4, recipe
        last = folder_of(config) / 'ckpt_epoch_1.pth'
        alone = tiny_config(TAG=f'{recipe}_alone', EVAL_MODE='True', MODEL__RESUME=str(last), **options)
        program.main(alone)  # one process sees what two saw
        line = next(line for line in log_of(alone).splitlines() if ' * ' in line)
        assert line.endswith(results[0][2]), recipe
        assert records(config, 'epoch')[-1]['val_loss'] is not None
