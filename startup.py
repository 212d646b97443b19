"""Setup that programs run before their slow imports; this module imports none of their libraries."""

import contextlib
import ctypes
import getpass
import io
import os
import signal
import sys

MKL_SWITCH = 'MSG_MKL_AVX512'  # environment variable


def before_imports() -> None:
    """Prepare a program for its imports.

    Until `utils.exit_on_user_error` takes over, an interrupt (Ctrl-C) ends it without a traceback, unless the shell has
    made it ignore interrupts. A user without a name (`docker run --user 12345`) gets its number as one: PyTorch names
    its cache folder after the user, and fails without one. Characters that the terminal's encoding does not have are
    printed as escapes; output that is closed, as under cron, goes nowhere. Memory stays with the process when it is
    freed: see `keep_freed_memory`. With the environment variable MSG_MKL_AVX512=1, MKL uses AVX-512 on AMD processors:
    see `make_mkl_assume_intel`.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, 'w', encoding='utf-8')  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors='backslashreplace')
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ['USER'] = str(os.getuid())
    keep_freed_memory()
    value, linear = os.environ.get(MKL_SWITCH, ''), os.environ.get('MSG_CPU_LINEAR', '')
    if value not in ('', '0', '1'):
        sys.exit(f'error: {MKL_SWITCH} is {value!r}: write 1 or 0')
    if linear not in ('', 'auto', 'pytorch', 'onednn'):  # as in models/linear.py
        sys.exit(f'error: MSG_CPU_LINEAR is {linear!r}: write one of auto, pytorch, onednn')
    if value == '1':
        make_mkl_assume_intel()


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for later allocations, unless the user has set its variables MALLOC_...

    By default, glibc returns large blocks to the system at once, so that the kernel must clear new pages for the next
    layer's output. docs/performance.md has the effect on speed. Other C libraries are not changed.
    """
    if any(name.startswith('MALLOC_') for name in os.environ) or 'glibc.malloc' in os.environ.get('GLIBC_TUNABLES', ''):
        return
    trim_threshold, mmap_threshold = -1, -3  # from malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc; TypeError: Windows
        libc = ctypes.CDLL(None)
        # Older versions of glibc refuse an mmap threshold above 32 MB. If it cannot be set, the trim threshold stays
        # unset too: alone, it slows programs down.
        if libc.mallopt(mmap_threshold, 2**31 - 1) or libc.mallopt(mmap_threshold, 2**25):
            libc.mallopt(trim_threshold, 2**31 - 1)


def make_mkl_assume_intel() -> None:
    """Make MKL choose its kernels as on an Intel processor: on AMD's with AVX-512, it then uses AVX-512.

    MKL calls its function `mkl_serv_intel_cpu_true` to find out whether the processor is Intel's. This function
    compiles a library that defines the same symbol, and loads it before PyTorch, so that MKL calls that one instead.
    The workaround is well known, but Intel does not support it.

    Exits with a message if there is no C compiler.
    """
    import shlex
    import subprocess
    from pathlib import Path
    from tempfile import TemporaryDirectory

    try:
        with TemporaryDirectory() as folder:
            source, library = Path(folder) / 'assume_intel.c', Path(folder) / 'assume_intel.so'
            source.write_text('int mkl_serv_intel_cpu_true(void) { return 1; }\n', encoding='utf-8')
            compiler = shlex.split(os.environ.get('CC', 'cc'))
            subprocess.run([*compiler, '-shared', '-fPIC', '-o', library, source], check=True, capture_output=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(
            f'error: {MKL_SWITCH}=1 needs a C compiler, and a temporary folder whose files can be executed: '
            f'install gcc, set TMPDIR, or unset the variable ({error})'
        )
