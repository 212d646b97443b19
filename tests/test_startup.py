"""What programs set up before their imports: memory that is kept, and MKL's kernels."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.processes import environment

FAULTS = """
import resource
import startup
startup.before_imports()
for _ in range(20):
    bytearray(50_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

MKL = """
import startup
startup.before_imports()
from models import linear
print(linear._mkl_assumes_intel(), linear.LIBRARY)
"""


def run(code, **variables):
    command = [sys.executable, '-c', code]
    return subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='glibc only')
def test_freed_memory_is_kept_unless_the_user_has_set_the_allocator():
    pages = 50_000_000 // os.sysconf('SC_PAGE_SIZE')
    kept, set_by_user = (int(run(FAULTS, **variables).stdout) for variables in ({}, {'MALLOC_PERTURB_': '0'}))
    assert kept < 4 * pages
    assert set_by_user > 15 * pages


@pytest.mark.skipif(shutil.which('cc') is None, reason='no C compiler')
@pytest.mark.skipif(sys.platform != 'linux', reason='symbols are bound in another way')
@pytest.mark.parametrize(('value', 'assumes_intel'), [('1', True), pytest.param('0', False, marks=pytest.mark.slow)])
def test_mkl_is_told_that_the_processor_is_intels(value, assumes_intel):
    done = run(MKL, MSG_MKL_AVX512=value, MSG_CPU_LINEAR='pytorch')
    assert (done.stdout, done.returncode) == (f'{assumes_intel} pytorch\n', 0), done.stderr


def test_without_a_compiler_one_line_says_what_to_do():
    done = run(MKL, MSG_MKL_AVX512='1', CC='no-such-compiler')
    assert done.returncode == 1
    assert done.stderr.startswith('error: MSG_MKL_AVX512=1 needs a C compiler, and a temporary folder')
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize(('name', 'value'), [('MSG_MKL_AVX512', 'off'), ('MSG_CPU_LINEAR', 'mkl')])
def test_unknown_values_are_errors_of_one_line(name, value):
    done = run('import startup; startup.before_imports()', **{name: value})
    assert done.returncode == 1
    assert done.stderr.startswith(f'error: {name} is {value!r}: write ')
