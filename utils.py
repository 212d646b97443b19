"""Leaf helpers: user errors, exits, atomic writes, random states, backend flags, the environment of a run."""

import argparse
import contextlib
import errno
import hashlib
import os
import platform
import random
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import PIL
import simplejpeg
import timm
import torch
import torchvision


class UserError(ValueError):
    """Something the user can fix; the message names the thing and the remedy."""


class OutputError(UserError):
    """A folder or file that cannot be written."""


def positive_int(text: str) -> int:
    """A positive integer, as the `type` of an argument.

    Raises:
        ArgumentTypeError: the text is not such a number.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} is not a positive integer')
    return int(text)


def non_negative_int(text: str) -> int:
    """A non-negative integer, as the `type` of an argument.

    Raises:
        ArgumentTypeError: the text is not such a number.
    """
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f'{text} is not a non-negative integer')
    return int(text)


def non_negative_float(text: str) -> float:
    """A non-negative number, as the `type` of an argument.

    Raises:
        ArgumentTypeError: the text is not such a number.
    """
    return _number(text, lambda value: 0 <= value < float('inf'), 'number from 0 on, such as 0.5')


def fraction(text: str) -> float:
    """A number above 0 and below 1, as the `type` of an argument.

    Raises:
        ArgumentTypeError: the text is not such a number.
    """
    return _number(text, lambda value: 0 < value < 1, 'number above 0 and below 1, such as 0.2')


def _number(text: str, fits: Callable[[float], bool], kind: str) -> float:
    with contextlib.suppress(ValueError):
        value = float(text)
        if fits(value):
            return value
    raise argparse.ArgumentTypeError(f'{text!r} is not a {kind}')


def home_path(text: str) -> Path:
    """A path with its leading ~ expanded, as the `type` of an argument; shells do not expand `--output=~/x`."""
    return Path(os.path.expanduser(text))


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def printable(text: object) -> str:
    """Escape control characters and undecodable bytes of file names, so that a text prints as one line."""
    shown = (char if char.isprintable() else repr(char)[1:-1] for char in str(text))
    return ''.join(shown)


def first_few(texts: Sequence[object], count: int = 3) -> str:
    """The first of some texts, for a message."""
    return ', '.join(map(str, texts[:count])) + (', ...' if len(texts) > count else '')


def leaves(tree: Mapping, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def shortened(text: object, length: int = 200) -> str:
    """Join a text into one line, and cut it to at most `length` characters."""
    line = ' '.join(str(text).split())
    return line if len(line) <= length else f'{line[: length - 3]}...'


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Exit with one line instead of a traceback for a `UserError`, Ctrl-C or a closed pipe.

    A `UserError` prints its message (exit code 1), Ctrl-C prints `interrupted` (130), and a closed pipe, as after
    `| head`, prints nothing (1). Other errors keep their traceback.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # `startup` has replaced it
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f'error: {printable(error)}')
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)  # what shells report after Ctrl-C
    except BrokenPipeError:
        discard_output()
        sys.exit(1)


@contextmanager
def orderly_termination() -> Iterator[None]:
    """Turn SIGTERM, which `timeout` and SLURM send, into `SystemExit`, so that clean-up code runs."""

    def end(number: int, frame: object) -> None:
        print('terminated', file=sys.stderr)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def discard_output() -> None:
    """Discard buffered and further standard output, so that the interpreter's exit does not fail on a closed pipe."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def report_write_errors(folder: Path) -> Iterator[None]:
    """Turn an `OSError` while writing to `folder` into an `OutputError` with a remedy."""
    try:
        yield
    except OSError as error:
        raise OutputError(f'output folder {folder}: {error.strerror}: write another --output, or make room') from error


def atomic_write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically and durably: after a crash, `path` has either its old content or all of the new content.

    The new file is written under a unique temporary name, flushed to disk and renamed; then the folder is flushed.

    Args:
        path: the file.
        write: writes the new content; its errors propagate, and the temporary file is removed.
    """
    temporary = path.with_name(f'{path.name}.{_host_hash()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp')
    try:
        with temporary.open('wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_dead_temporaries(folder: Path) -> None:
    """Remove temporary files of `atomic_write` whose process has died.

    The processes of other hosts and containers cannot be seen, and files of older versions do not name theirs: such a
    temporary file is removed when it has not changed for an hour.
    """
    for path in [*folder.glob('*.*-*-*.tmp'), *folder.glob('ckpt_*.pth.tmp')]:
        name = re.search(rf'\.{_host_hash()}-(\d+)-[0-9a-f]{{8}}\.tmp$', path.name)
        with contextlib.suppress(FileNotFoundError):
            if not is_running(int(name[1])) if name else time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def host_id() -> str:
    """Identify the host or container of this process: processes with the same ID see each other's process numbers.

    It has the host name, the boot ID and the PID namespace, since two containers may have the same host name. On
    systems without the latter two, it is the host name.
    """
    with contextlib.suppress(OSError):
        kernel = Path('/proc/sys/kernel/random/boot_id').read_text(encoding='utf-8').strip()
        return f'{platform.node()} {kernel} {os.readlink("/proc/self/ns/pid")}'
    return platform.node()


def _host_hash() -> str:
    """Hash of `host_id`, for file names."""
    return hashlib.blake2b(host_id().encode(errors='surrogateescape'), digest_size=6).hexdigest()


def is_running(pid: int) -> bool:
    """Whether a process with this number runs on this host (see `host_id`)."""
    if not 0 < pid < 2**31:  # read from a damaged file
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _flush_folder(folder: Path) -> None:
    """Make a rename in a folder durable, on file systems that support it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def set_seed(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's random number generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """States of Python's, NumPy's, PyTorch's and the device's generators, as plain data and tensors."""
    name, key, position, has_gauss, gauss = np.random.get_state()
    states = {
        'python': random.getstate(),
        'numpy': (name, key.tolist(), position, has_gauss, gauss),
        'torch': torch.get_rng_state(),
    }
    if device.type != 'cpu':
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Restore `random_states`; a device without a saved state keeps its own."""
    random.setstate(states['python'])
    np.random.set_state(states['numpy'])
    torch.set_rng_state(states['torch'])
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def set_backend_flags(tf32: bool, deterministic: bool) -> None:
    """Set PyTorch's backend flags: TF32, deterministic algorithms and cuDNN's benchmark mode.

    Args:
        tf32: let fp32 matmuls and convolutions round to TensorFloat-32.
        deterministic: use deterministic algorithms only; otherwise, cuDNN's benchmark mode picks the fastest ones.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when cuBLAS starts


# Environment variables of this project that change the last bits of results, and the speed: docs/performance.md
VARIABLES = ('MSG_CPU_LINEAR', 'MSG_MKL_AVX512')


def environment(device: torch.device) -> dict[str, str]:
    """Describe what a run's results depend on beyond its config: revision, versions, hardware, variables, command."""
    return {
        'revision': git_revision(Path(__file__).parent),
        'python': platform.python_version(),
        'torch': str(torch.__version__),  # a `TorchVersion`, which would not be plain data in a checkpoint
        'torchvision': str(torchvision.__version__),
        'timm': timm.__version__,
        'numpy': np.__version__,
        'opencv': cv2.__version__,
        'pillow': PIL.__version__,
        'simplejpeg': simplejpeg.__version__,
        'cuda': str(torch.version.cuda),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'cpu': torch.backends.cpu.get_cpu_capability(),
        'processor': f'{processor_name()}, {available_cores()} cores',
        'threads': str(torch.get_num_threads()),
        'variables': ' '.join(f'{name}={os.environ[name]}' for name in VARIABLES if name in os.environ),
        'host': platform.node(),
        'system': platform.platform(),
        'command': ' '.join(sys.argv),
    }


def short_revision(revision: str) -> str:
    """A `git_revision` with the first seven digits of the commit."""
    return re.sub(r'^(\w{7})\w+', r'\1', revision)


def processor_name() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        lines = (
            line.partition(':')
            for line in Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace').splitlines()
        )
        for name, _, value in lines:
            if name.strip() == 'model name':
                return value.strip()
    return platform.processor() or platform.machine()


def git_revision(folder: Path) -> str:
    """The commit of a checkout, marked where tracked files are modified; 'unknown' outside a checkout."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, encoding='utf-8', errors='replace', check=True
        ).stdout.strip()

    try:
        changed = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + (' (modified)' if changed else '')
    except (OSError, subprocess.CalledProcessError):
        return 'unknown'
