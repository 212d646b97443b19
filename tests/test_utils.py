import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.paths import ROOT
from utils import (
    OutputError,
    UserError,
    atomic_write,
    environment,
    exit_on_user_error,
    git_revision,
    home_path,
    printable,
    report_write_errors,
    set_backend_flags,
)


@pytest.mark.parametrize('tf32', [True, False])
@pytest.mark.parametrize('deterministic', [True, False])
def test_backend_flags(tf32, deterministic, monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    try:
        set_backend_flags(tf32, deterministic)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
    finally:
        set_backend_flags(tf32=False, deterministic=False)


def test_environment_and_revision(tmp_path):
    recorded = environment(torch.device('cpu'))
    assert recorded['torch'] == torch.__version__
    assert recorded.keys() >= {'revision', 'python', 'timm', 'cuda', 'device', 'host', 'command'}

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


def test_user_errors_end_in_one_line_and_others_keep_their_traceback():
    with pytest.raises(SystemExit, match='error: write something else'), exit_on_user_error():
        raise UserError('write something else')
    with pytest.raises(KeyError), exit_on_user_error():
        raise KeyError


def test_a_file_name_cannot_write_to_the_terminal():
    assert printable('photos/汽车 é.png') == 'photos/汽车 é.png'
    assert printable('a\x1b[2J\nb\r\u202e\udce9') == r'a\x1b[2J\nb\r\u202e\udce9'
    with pytest.raises(SystemExit) as raised, exit_on_user_error():
        raise UserError('no \x1b[31m.png')
    assert raised.value.code == r'error: no \x1b[31m.png'


def test_an_interrupt_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as raised, exit_on_user_error():
        raise KeyboardInterrupt
    assert raised.value.code == 130
    assert capsys.readouterr().err == 'interrupted\n'


def test_a_reader_that_has_read_enough_ends_a_program_quietly():
    program = 'from utils import exit_on_user_error\nwith exit_on_user_error():\n    print("a line\\n" * 100_000)\n'
    result = subprocess.run(
        f"{sys.executable} -c '{program}' | head -n 1", shell=True, capture_output=True, text=True, check=True
    )
    assert (result.stdout, result.stderr) == ('a line\n', '')


def test_write_errors_name_the_folder(tmp_path):
    message = 'nowhere: No such file or directory: write another --output'
    with pytest.raises(OutputError, match=message), report_write_errors(tmp_path / 'nowhere'):
        (tmp_path / 'nowhere' / 'a').write_text('')


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / 'a'
    atomic_write(path, lambda file: file.write(b'old'))

    def fail(file):
        file.write(b'new')
        raise OSError(28, 'No space left on device')

    with pytest.raises(OSError, match='No space'):
        atomic_write(path, fail)
    assert [x.name for x in tmp_path.iterdir()] == ['a']
    assert path.read_bytes() == b'old'


def test_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv('HOME', '/home/me')
    assert [home_path(text) for text in ('~/runs', '~', '~.txt', 'a/~', '-')] == [
        Path('/home/me/runs'), Path('/home/me'), Path('~.txt'), Path('a/~'), Path('-')
    ]  # fmt: skip


def test_programs_may_have_no_output():
    """As under cron, and in a daemon."""
    program = 'import startup, sys; startup.before_imports(); sys.stdout.write("1"); sys.stderr.write("2")'
    done = subprocess.run(f"{sys.executable} -c '{program}' >&- 2>&-", shell=True, cwd=ROOT)
    assert done.returncode == 0


def test_a_terminated_program_closes_its_files(tmp_path):
    program = f"""
import os, signal
from pathlib import Path
from utils import exit_on_user_error, orderly_termination
with exit_on_user_error(), orderly_termination(), Path({str(tmp_path / 'table')!r}).open('w') as file:
    file.write('a row')
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, 'terminated\n')
    assert (tmp_path / 'table').read_text() == 'a row'
