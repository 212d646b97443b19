"""Progressive image sizes: what the network sees, learning rates, and exact resuming in every phase."""

import multiprocessing

import pytest

import main as program
from data import DataError, Preprocess
from engine.state import Phase, phase_index, updates_before
from tests.helpers.runs import PLAIN, differences, folder_of, last_checkpoint, log_of, one_thread, records

# 24 images: 3 updates in each of epochs 0 and 1, 6 in epochs 2 and 3
SIZES = {'DATA__IMG_SIZES': '[14, 28]', 'DATA__IMG_SIZE_EPOCHS': '[0, 2]', 'DATA__IMG_SIZE_BATCHES': '[8, 4]'}


def test_updates_before_an_epoch():
    phases = [Phase(0, 3, 0, 0), Phase(2, 6, 0, 0), Phase(5, 10, 0, 0)]
    lengths = [3, 3, 6, 6, 6, 10, 10]
    assert [updates_before(phases, epoch) for epoch in range(8)] == [sum(lengths[:epoch]) for epoch in range(8)]
    assert [phase_index(phases, epoch) for epoch in range(7)] == [0, 0, 1, 1, 1, 2, 2]


def test_sizes_and_learning_rates_follow_the_phases(tiny_config, image_tree, monkeypatch):
    data = {'DATA__DATA_PATH': str(image_tree), 'PRINT_FREQ': '1', 'SAVE_STEPS': '1', 'SAVE_KEEP': '0', **PLAIN}
    data |= {'TRAIN__EPOCHS': '4', 'TRAIN__WARMUP_EPOCHS': '0'}
    shapes = []

    class RecordShapes(Preprocess):
        def __call__(self, batch):
            shapes.append(tuple(batch.image.shape[:2]))
            return super().__call__(batch)

    monkeypatch.setattr(program, 'Preprocess', RecordShapes)  # of training
    with one_thread():
        whole = tiny_config(TAG='whole', **SIZES, **data)
        program.main(whole)
        assert shapes == [(8, 14)] * 6 + [(4, 28)] * 12
        assert 'from epoch 2 on: images of 28 px, 4 per process and batch' in log_of(whole)
        # BASE_LR is for BASE_BATCH images per update, in each phase, and the schedule is over all 18 updates
        rates = [record['lr'] / (8 if record['epoch'] < 2 else 4) for record in records(whole, 'train')]
        assert len(rates) == 18
        uniform = tiny_config(TAG='uniform', **data | {'TRAIN__EPOCHS': '3', 'DATA__BATCH_SIZE': '4'})
        program.main(uniform)  # as many updates, of 4 images
        expected = [record['lr'] / 4 for record in records(uniform, 'train')]
        assert rates == pytest.approx(expected)
        checkpoint = folder_of(whole) / 'ckpt_epoch_1_step_2.pth'
        program.main(tiny_config(TAG='resumed', MODEL__RESUME=str(checkpoint), **SIZES, **data))
    resumed = tiny_config(TAG='resumed', **data)
    assert differences(last_checkpoint(whole), last_checkpoint(resumed)) == []
    assert 'the run resumes bit for bit, as if it had never stopped' in log_of(resumed)


def test_swin_is_trained_at_several_sizes(tiny_config, image_tree):
    swin = 'embed_dim=8 depths=(2,2) num_heads=(1,2) window_size=3 patch_size=2 strict_img_size=False'
    data = {'DATA__DATA_PATH': str(image_tree), 'DATA__IMG_SIZE': '28', 'TRAIN__EPOCHS': '3', **PLAIN}
    config = tiny_config(MODEL__TYPE='timm:swin_tiny_patch4_window7_224', MODEL__TIMM_ARGS=swin, **SIZES, **data)
    program.main(config)
    assert 'from epoch 2 on: images of 28 px' in log_of(config)
    assert len(records(config, 'epoch')) == 3


def test_odd_batches_of_a_phase_are_refused_before_training(tiny_config, image_tree):
    options = SIZES | {'DATA__IMG_SIZE_BATCHES': '[8, 3]', 'TRAIN__EPOCHS': '3'}
    config = tiny_config(DATA__DATA_PATH=str(image_tree), **options)
    with pytest.raises(DataError, match='DATA.IMG_SIZE_BATCHES is 3, but .* write an even DATA.IMG_SIZE_BATCHES'):
        program.main(config)


@pytest.mark.slow
def test_worker_processes_end_with_their_phase(tiny_config, image_tree, monkeypatch):
    workers, evaluate = [], program.validate

    def count(*arguments):
        workers.append(len([child for child in multiprocessing.active_children() if child.is_alive()]))
        return evaluate(*arguments)

    monkeypatch.setattr(program, 'validate', count)
    data = {'DATA__DATA_PATH': str(image_tree), 'DATA__NUM_WORKERS': '1', 'TRAIN__EPOCHS': '4'}
    program.main(tiny_config(**SIZES, **data))
    assert workers == [1, 2, 2, 2]  # of training, and of evaluation from its first time on
