import logging

import torch

from engine import meter
from engine.meter import TrainMeter
from logger import MetricsLog
from models import build_model
from tests.helpers.runs import build_trainer

NO, YES = torch.tensor(False), torch.tensor(True)


def test_log_line_and_record_hold_the_last_update_and_the_means(tiny_config, monkeypatch, caplog):
    """An epoch resumed at update 2: three updates of a second each, then one of four seconds."""
    clock = [100.0]
    monkeypatch.setattr(meter.time, 'monotonic', lambda: clock[0])
    monkeypatch.setattr(meter, 'peak_memory_mb', lambda device: 12.0)
    written = []
    metrics = MetricsLog(None)
    monkeypatch.setattr(metrics, 'write', lambda kind, updates, **record: written.append((kind, updates, record)))
    config = tiny_config()
    state = build_trainer(config, build_model(config), steps_per_epoch=8).state
    state.phases, state.step = [state.phase._replace(images_per_update=4)], 2
    train_meter = TrainMeter(logging.getLogger('test'), metrics, state, epochs=2)

    def update(seconds, loss, grad_norm, skipped=NO):
        clock[0] += seconds
        state.add_update(torch.tensor(loss), torch.tensor(grad_norm), skipped, NO, 0.1)
        state.skip() if skipped else state.advance()

    with caplog.at_level(logging.INFO, 'test'):
        update(1.0, 3.0, 5.0)
        update(1.0, 1.0, 7.0)
        update(1.0, float('nan'), float('inf'), YES)  # not in the means
        train_meter.log(0.25, torch.tensor(1.0), torch.tensor(7.0), {})
        update(4.0, 2.0, 3.0)
        losses = {'class': torch.tensor(1.5), 'box': torch.tensor(0.5)}
        train_meter.log(0.125, torch.tensor(2.0), torch.tensor(3.0), losses)
    assert train_meter.seconds == 7.0
    first, second = [record.getMessage() for record in caplog.records if record.name == 'test']
    assert first.startswith(
        'Train: [0/2][4/8]\teta 0:00:03 lr 0.250000\ttime 1.0000 (1.0000)\tdata 0.0000 (0.0000)\tloss 1.0000 (2.0000)\t'
    )
    assert second == (
        'Train: [0/2][5/8]\teta 0:00:03 lr 0.125000\ttime 4.0000 (1.7500)\tdata 0.0000 (0.0000)\tloss 2.0000 (2.0000)\t'
        'grad_norm 3.0000 (5.0000)\tmem 12MB\t1 images/s'
    )
    kind, updates, record = written[1]
    assert (kind, updates) == ('train', 5)  # six, of which one was skipped
    assert record == {
        'class': 1.5, 'box': 0.5, 'epoch': 0, 'step': 5, 'lr': 0.125, 'loss': 2.0, 'grad_norm': 3.0,
        'data_s': 0.0, 'images_per_s': 1.0, 'memory_mb': 12.0,
    }  # fmt: skip


def test_eta_leaves_out_the_update_that_compiles(tiny_config, monkeypatch, caplog):
    clock = [100.0]
    monkeypatch.setattr(meter.time, 'monotonic', lambda: clock[0])
    config = tiny_config()
    state = build_trainer(config, build_model(config), steps_per_epoch=8).state
    state.phases = [state.phase._replace(images_per_update=4)]
    train_meter = TrainMeter(logging.getLogger('test'), MetricsLog(None), state, epochs=2)
    with caplog.at_level(logging.INFO, 'test'):
        for seconds in (60.0, 1.0, 1.0):
            clock[0] += seconds
            state.step += 1
            state.advance()
            if seconds == 60:
                train_meter.leave_out()
            train_meter.log(0.25, torch.tensor(1.0), torch.tensor(7.0), {})
    etas = [record.getMessage().partition('eta ')[2].partition(' lr')[0] for record in caplog.records]
    assert etas == ['?', '0:00:06', '0:00:05']
    assert train_meter.seconds == 62
