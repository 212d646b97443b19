import pytest

from tests.helpers.processes import run_here


@pytest.mark.parametrize(
    ('tool', 'flags', 'message'),
    [
        ('plot', ['--run', 'nowhere'], 'error: nowhere/metrics.jsonl: No such file'),
        ('predict', ['nowhere', '--resume', 'x'], 'error: checkpoint x does not exist'),
        ('predict', ['nowhere'], 'error: one of the arguments --resume --weights is required'),
        ('make_digits', [], 'error: the following arguments are required: --output'),
        ('summary', ['nowhere'], 'error: config file nowhere: No such file'),
        ('make_digits', ['--output', 'README.md'], 'error: '),
    ],
)
def test_tools_report_mistakes_in_one_line(tool, flags, message):
    done = run_here('-m', f'tools.{tool}', *flags)
    assert done.returncode not in (0, None)
    assert message in done.stderr.splitlines()[-1]
    assert 'Traceback' not in done.stderr
