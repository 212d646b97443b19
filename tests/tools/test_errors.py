import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here


@pytest.mark.parametrize(
    ('tool', 'flags', 'message'),
    [
        ('plot', ['--run', 'nowhere'], 'error: nowhere/metrics.jsonl: No such file'),
        ('predict', ['nowhere', '--resume', 'x'], 'error: checkpoint x does not exist'),
        ('predict', ['nowhere'], 'error: one of the arguments --resume --weights --backend is required'),
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


def test_every_argument_that_is_a_path_takes_the_home_folder():
    """`type=Path` would make a folder named ~ of `--output=~/runs`, which shells leave as it is."""
    for path in [*ROOT.glob('tools/**/*.py'), *ROOT.glob('detection/**/*.py'), *ROOT.glob('engine/*.py')]:
        assert 'type=Path' not in path.read_text(), path
