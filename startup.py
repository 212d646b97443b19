"""Setup that programs run before their slow imports; this module imports none of their libraries."""

import getpass
import io
import os
import signal
import sys


def before_imports() -> None:
    """Prepare a program for its imports.

    Until `utils.exit_on_user_error` takes over, an interrupt (Ctrl-C) ends it without a traceback, unless the shell has
    made it ignore interrupts. A user without a name (`docker run --user 12345`) gets its number as one: PyTorch names
    its cache folder after the user, and fails without one. Characters that the terminal's encoding does not have are
    printed as escapes; output that is closed, as under cron, goes nowhere.
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
