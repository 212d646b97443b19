"""Plugin registries, and import of the user modules that fill them.

A module that `--import` names is imported before the config is read. It registers plugins by name, and config keys
select them: see docs/extending.md.
"""

import importlib
import importlib.util
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from utils import UserError, first_line, printable, shortened

Part = TypeVar('Part', bound=Callable)


class ExtensionError(UserError):
    """A module of `--import` that cannot be used."""


class Registry(dict[str, Callable[..., Any]]):
    """Plugins of one kind by name, such as losses: the choices of a config key.

    Args:
        kind: noun for error messages.
        parts: built-in entries.
    """

    def __init__(self, kind: str, **parts: Callable[..., Any]):
        super().__init__(parts)
        self.kind = kind

    def register(self, name: str) -> Callable[[Part], Part]:
        """A decorator that makes a class or function available by name.

        Raises:
            ValueError: the name belongs to another part, or cannot be written in a config.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{name!r} is not a name for a {self.kind}: write @register_{self.kind}('my_{self.kind}')")

        def register(part: Part) -> Part:
            if not hasattr(part, '__qualname__'):
                raise ValueError(f'the {self.kind} {name!r} is neither a class nor a function: write one')
            known = self.get(name, part)
            if (known.__module__, known.__qualname__) != (part.__module__, part.__qualname__):
                raise ValueError(f'the {self.kind} {name!r} is already {known.__module__}.{known.__qualname__}')
            self[name] = part  # a module may be imported again
            return part

        return register


def is_path(name: str) -> bool:
    """Whether a name of `--import` is a path: it ends in .py, or has a slash."""
    return name.endswith('.py') or '/' in name


def absolute(name: str, folder: str | Path = '') -> str:
    """Resolve a relative path of `--import` against a folder; names of modules stay unchanged."""
    return os.path.abspath(os.path.join(folder, os.path.expanduser(name))) if is_path(name) else name


def import_modules(names: Iterable[str]) -> None:
    """Import modules, each once in a process.

    Args:
        names: names of modules on Python's path, or absolute paths of .py files. The folder of a file is appended to
            `sys.path`, so that DataLoader workers can import the module, and the module its neighbours.

    Raises:
        ExtensionError: a module does not exist, raises an error, or has the name of another module.
    """
    for name in names:
        if is_path(name):
            _import_file(Path(name))
        else:
            _import(name, name)


def missing_modules(recorded: Any, names: Iterable[str]) -> list[str]:
    """Return the modules that a checkpoint records in its key `IMPORT` and that are not imported in this run.

    Files with the same name in different folders count as the same module.

    Args:
        recorded: the key's value, untrusted.
        names: modules of this run.
    """
    recorded = [name for name in recorded if isinstance(name, str)] if isinstance(recorded, list) else []
    present = {Path(name).stem if is_path(name) else name for name in names}
    return [name for name in recorded if name and (Path(name).stem if is_path(name) else name) not in present]


def as_flags(names: Iterable[str]) -> str:
    """Format module names as `--import` flags, for messages."""
    return shortened(' '.join(f'--import {shlex.quote(name)}' for name in names), 1000)


def _import_file(path: Path) -> None:
    if path.suffix != '.py' or not os.path.isfile(path):
        problem = 'is no .py file' if os.path.exists(path) else 'does not exist'
        raise ExtensionError(f'--import {path} {problem}: give a .py file, or the name of a module')
    if '.' in path.stem:
        raise ExtensionError(f'--import {path}: the name of a module cannot contain a dot: rename the file')
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    importlib.invalidate_caches()
    loaded = sys.modules.get(path.stem)
    found = loaded.__spec__ if isinstance(loaded, ModuleType) else _find(path.stem)
    origin = getattr(found, 'origin', None) or ''
    if not (os.path.isfile(origin) and os.path.samefile(path, origin)):
        where = f', {origin}' if origin else ''
        raise ExtensionError(f'--import {path}: the name {path.stem} belongs to another module{where}: rename the file')
    _import(path.stem, str(path))


def _find(name: str) -> Any:
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # such as a.b.py, where a is no package
        return None


def _import(name: str, shown: str) -> None:
    """Import a module; errors in it are reported in one line with the line of its file."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f'{error.name}.')):
            raise _failed(shown, error) from error
        raise ExtensionError(
            f'--import {shown}: there is no module {error.name}: give the path of its .py file, or add its folder to '
            f'PYTHONPATH'
        ) from error
    except (Exception, SystemExit) as error:  # the module may raise anything
        raise _failed(shown, error) from error


def _failed(shown: str, error: BaseException) -> ExtensionError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if 'importlib' not in frame.filename]
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (None, None)
    if file is None and len(frames) > 1:  # the first is `_import`
        file, line = frames[1].filename, frames[1].lineno
    where = f' at line {line} of {file}' if file else ''
    return ExtensionError(printable(f'--import {shown} failed{where}: {type(error).__name__}: {first_line(error)}'))
