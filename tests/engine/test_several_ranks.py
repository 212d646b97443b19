"""Runs of several ranks: the same sums, the same weights, the same decisions on every rank."""

import json
import re

import pytest

from engine.checkpoint import load_checkpoint
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import TORCHRUN, SpawnedRun, start, start_two_ranks
from tests.helpers.runs import differences

pytestmark = pytest.mark.slow


def test_three_ranks_sum_gradients_in_the_same_order_after_resuming(folder):
    """Two ranks always do; three only if DDP does not rebuild its buckets after the first update."""
    ranks = [*TORCHRUN, '3']
    options = 'DATA.BATCH_SIZE 2 TRAIN.EPOCHS 12 MODEL.MSG.EMBED_DIM 32 DATA.NUM_WORKERS 0'
    whole = SpawnedRun(folder, 'three', ranks, options)
    assert whole.wait() == 0, whole.output.read_text()
    checkpoint = whole.folder / 'ckpt_epoch_10.pth'
    resumed = SpawnedRun(folder, 'three_resumed', ranks, f'{options} MODEL.RESUME {checkpoint}')
    assert resumed.wait() == 0, resumed.output.read_text()
    assert differences(whole.last_checkpoint(), resumed.last_checkpoint()) == []


def test_another_number_of_ranks_resumes_and_logs_what_changes(folder, uninterrupted_pair):
    checkpoint = folder / 'output' / 'tiny' / 'pair' / 'ckpt_epoch_11.pth'
    run = SpawnedRun(folder, 'single', options=f'TRAIN.EPOCHS 13 MODEL.RESUME {checkpoint}')
    assert run.wait() == 0, run.output.read_text()
    message = 'not bit for bit: random numbers are not restored; TRAIN.EPOCHS has changed; world_size was 2 and is 1'
    assert message in run.log()


def test_logged_losses_are_means_over_the_ranks(folder, uninterrupted_pair):
    """Each rank logs the same means; the ranks' own losses differ, since their images do."""
    logs = [(folder / 'output' / 'tiny' / 'pair' / f'log_rank{rank}.txt').read_text() for rank in (0, 1)]
    first, second = (re.findall(r'Train: \[.*(loss .*\)\tgrad_norm .*?)\t', log) for log in logs)
    assert len(first) == 12 * 3
    assert first == second


def test_ema_weights_are_the_same_on_every_rank(folder):
    """The ranks start from their own seeds; what they evaluate must be what rank 0 saves."""
    options = 'TRAIN.EMA_DECAY 0.9999 TRAIN.EPOCHS 2'
    run = start_two_ranks(folder, 'ema', options)
    assert run.wait() == 0, run.output.read_text()
    record = json.loads((run.folder / 'metrics.jsonl').read_text().splitlines()[-1])
    checkpoint = run.folder / 'ckpt_epoch_1.pth'
    evaluation = SpawnedRun(folder, 'ema_eval', options=f'{options} EVAL_MODE True MODEL.RESUME {checkpoint}')
    assert evaluation.wait() == 0, evaluation.output.read_text()
    losses = [float(loss) for loss in re.findall(r'Test: \[2/3\].*Loss [\d.]+ \(([\d.]+)\)', evaluation.log())]
    assert losses == pytest.approx([record['val_loss'], record['ema_val_loss']], abs=1e-4)


NONFINITE_RANK = """
import os, main, config, engine.trainer, utils

train_step = engine.trainer.Trainer.train_step

def train_step_of_rank_1_on_nan(self, batches, pending):
    if os.environ['RANK'] == '1' and (self.state.epoch, self.state.step) == (1, 1):
        batches[0][0][0, 0, 0, 0] = float('nan')
    return train_step(self, batches, pending)

engine.trainer.Trainer.train_step = train_step_of_rank_1_on_nan
with utils.exit_on_user_error():
    main.main(config.get_config(main.parse_option()))
"""


def test_nonfinite_loss_on_one_rank_stops_both_before_the_update(folder):
    """A pixel of an image is not finite, as after a broken augmentation."""
    script = folder / 'nonfinite_rank.py'
    script.write_text(NONFINITE_RANK)
    flags = ['--cfg', TINY, '--data-path', folder / 'tree', '--output', folder / 'output', '--tag', 'nonfinite_rank']
    variables = {'PYTHONPATH': str(ROOT)}
    options = ['PRINT_FREQ', '1000', 'DATA.PIPELINE', 'published']  # images of floats
    done = start(*TORCHRUN, '2', script, *flags, '--opts', *options, variables=variables, timeout=120)
    assert done.returncode != 0
    run_folder = folder / 'output' / 'tiny' / 'nonfinite_rank'
    message = 'not finite at epoch 1, update 1, learning rate 0.000781: nothing was updated since.'
    assert done.stderr.count(message) == 2, done.stderr  # on both ranks
    assert f'The last good checkpoint is {run_folder / "ckpt_epoch_0.pth"}' in done.stderr
    weights = load_checkpoint(run_folder / 'ckpt_epoch_0.pth')['model']
    assert all(value.isfinite().all() for value in weights.values())
    assert {path.name for path in run_folder.glob('ckpt_*')} == {'ckpt_epoch_0.pth', 'ckpt_best.pth'}
