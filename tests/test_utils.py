import subprocess

import pytest
import torch
from torch import nn

from checkpoint import CheckpointError
from utils import (
    all_reduce_sum,
    environment,
    gather_on_main_process,
    git_revision,
    on_main_process,
    set_arithmetic,
    synchronize_gradients,
)


def test_collectives_of_one_process():
    assert all_reduce_sum(torch.tensor([2.0])).item() == 2.0
    assert on_main_process(lambda: 'said') == 'said'
    assert gather_on_main_process('said') == ['said']
    with synchronize_gradients(nn.Linear(1, 1), enabled=False):
        pass

    def fail():
        raise CheckpointError('full')

    with pytest.raises(CheckpointError, match='full'):
        on_main_process(fail)


@pytest.mark.parametrize('tf32', [True, False])
@pytest.mark.parametrize('deterministic', [True, False])
def test_arithmetic(tf32, deterministic, monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    try:
        set_arithmetic(tf32, deterministic)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
    finally:
        set_arithmetic(tf32=False, deterministic=False)


def test_the_environment_and_the_revision(tmp_path):
    told = environment(torch.device('cpu'))
    assert told['torch'] == torch.__version__
    assert told.keys() >= {'revision', 'python', 'timm', 'cuda', 'device', 'host', 'command'}

    def git(*arguments):
        identity = ['-c', 'user.name=a', '-c', 'user.email=a@b.c']
        return subprocess.run(
            ['git', '-C', tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_revision(tmp_path) == 'unknown'
    git('init')
    (tmp_path / 'a').write_text('1')
    git('add', 'a')
    git('commit', '-m', 'a')
    assert git_revision(tmp_path) == git('rev-parse', 'HEAD')
    (tmp_path / 'b').write_text('untracked')
    assert git_revision(tmp_path) == git('rev-parse', 'HEAD')
    (tmp_path / 'a').write_text('2')
    assert git_revision(tmp_path) == git('rev-parse', 'HEAD') + ' (modified)'
