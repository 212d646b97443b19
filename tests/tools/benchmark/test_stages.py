import torch

from models import build_model
from tests.helpers.paths import TINY
from tests.helpers.processes import error_line, run_here
from tests.helpers.runs import CPU
from tools.benchmark.stages import forward_parts, time_parts
from tools.summary.stages import summarise


def test_timed_parts_are_those_of_a_forward_pass(tiny_config):
    others = {'MODEL__NUM_CLASSES': 0}, {'MODEL__MSG__IN_CHANS': 1, 'MODEL__MSG__APE': True}
    others += {'MODEL__MSG__HEAD_TOKENS': 'patches'}, {'MODEL__MSG__MSG_TOKENS': False}
    for options in ({}, *others):
        model = build_model(tiny_config(**options)).eval()
        with torch.inference_mode():
            calls = forward_parts(model, torch.randn(2, model.in_chans, *model.img_size))
            assert list(calls) == [part.name for part in summarise(model)]
            assert torch.equal(calls['head'](), calls['total']())
    times = time_parts(model, CPU, rounds=2)
    assert [len(seconds) for seconds in times.values()] == [2] * len(calls)


def test_stages_are_reported(tmp_path):
    flags = ['--batch', '3', '--rounds', '1', '--device', 'cpu', '--output', tmp_path / 'stages']
    done = run_here('-m', 'tools.benchmark', 'stages', TINY, *flags)
    assert done.returncode == 0, done.stderr
    for name in ('embedding', 'stage 1', 'stage 2', 'head', 'total'):
        assert f'| {name} | inference, fp32, eager, batch 3, 28 x 28 px | ' in done.stdout
    line = error_line('-m', 'tools.benchmark', 'stages', TINY, '--opts', 'MODEL.TYPE', 'timm:resnet18', *flags)
    assert 'MODEL.TYPE is timm:resnet18' in line
