import pytest

import main as program
from engine.checkpoint import CheckpointError
from models import build_model
from tests.helpers.runs import PLAIN, build_trainer, last_checkpoint, records


def test_longer_run_with_larger_batches_resumes_on_its_own_schedule(tiny_config, image_tree):
    data = {'DATA__DATA_PATH': str(image_tree), **PLAIN}
    program.main(tiny_config(**data))
    longer = tiny_config(TRAIN__EPOCHS='4', DATA__BATCH_SIZE='8', **data)
    program.main(longer)
    new = tiny_config(TRAIN__EPOCHS='4', DATA__BATCH_SIZE='8', TAG='new', **data)
    program.main(new)
    rates = [[r['lr'] for r in records(config, 'train') if r['epoch'] >= 2] for config in (longer, new)]
    assert rates[0] == pytest.approx(rates[1])


def test_published_optimizer_state_resumes_and_another_optimizers_does_not(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='3')
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))
    checkpoint = last_checkpoint(tiny_config())
    del checkpoint['optimizer']['class']
    for group in checkpoint['optimizer']['param_groups']:  # PyTorch 1.8, of the published runs, has no others
        for name in group.keys() - {'lr', 'betas', 'eps', 'weight_decay', 'amsgrad', 'initial_lr', 'params'}:
            del group[name]
    state = build_trainer(config, build_model(config)).state
    state.load_state_dict(checkpoint, 0, 1)
    assert (state.epoch, state.step) == (2, 0)
    assert all(group['fused'] and group['decoupled_weight_decay'] for group in state.optimizer.param_groups)
    state.optimizer.step()
    sgd = tiny_config(TRAIN__OPTIMIZER__NAME='sgd')
    with pytest.raises(CheckpointError, match="optimizer is different from the config's.*write its TRAIN.OPTIMIZER"):
        build_trainer(sgd, build_model(sgd)).state.load_state_dict(checkpoint, 0, 1)
    checkpoint['optimizer'] = {}
    with pytest.raises(CheckpointError, match="optimizer is different from the config's"):
        state.load_state_dict(checkpoint, 0, 1)


def test_optimizer_options_are_the_configs_not_the_checkpoints(tiny_config, image_tree):
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))
    config = tiny_config(TRAIN__WEIGHT_DECAY='0.3', TRAIN__OPTIMIZER__EPS='1e-6')
    state = build_trainer(config, build_model(config)).state
    state.load_state_dict(last_checkpoint(config), 0, 1)
    assert [group['weight_decay'] for group in state.optimizer.param_groups] == [0.3, 0.0]
    assert [group['eps'] for group in state.optimizer.param_groups] == [1e-6, 1e-6]


def test_loss_scale_is_restored(tiny_config, image_tree):
    options = {'DATA__DATA_PATH': str(image_tree), 'AMP_OPT_LEVEL': 'O1', 'AMP_DTYPE': 'float16'}
    config = tiny_config(**options)
    program.main(config)
    checkpoint = last_checkpoint(config)
    checkpoint['precision']['scale'] = 128.0
    state = build_trainer(config, build_model(config)).state
    state.load_state_dict(checkpoint, 0, 1)
    assert state.precision.scaler.get_scale() == 128.0


def test_progress_under_its_old_name_place(tiny_config, image_tree):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__EPOCHS='3')
    program.main(tiny_config(DATA__DATA_PATH=str(image_tree)))
    checkpoint = last_checkpoint(tiny_config())
    checkpoint['place'] = checkpoint.pop('progress') | {'skipped': 3}
    state = build_trainer(config, build_model(config), steps_per_epoch=6).state
    state.load_state_dict(checkpoint, 0, 1)
    assert (state.epoch, state.step, state.skipped, state.updates) == (2, 0, 3, 9)
