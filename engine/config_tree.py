"""Config trees: how files, options and flags are merged into a task's keys, checked and frozen."""

import argparse
import ast
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from engine.config_keys import ChangedKey, Key, KeyGroup
from extensions import absolute, as_flags, import_modules, missing_modules
from text_files import read_yaml
from utils import UserError, leaves, shortened

# Names of the tasks: values of the key TASK
TASKS = ('classification', 'detection')

# Maximum number of BASE files of a config file, each counted as often as it is named
MAX_BASE_FILES = 50

# Booleans as they are written in Python and YAML
BOOLEANS = {'true': True, 'yes': True, 'on': True, 'false': False, 'no': False, 'off': False}


# Keys of earlier versions, and what to write instead
REPLACED_KEYS = {'TENSORBOARD': 'TRACKER tensorboard or TRACKER none'}


class ConfigError(UserError):
    """A config key, value or flag that cannot work; the message says what to write."""


@dataclass(frozen=True)
class ConfigTree:
    """A task's keys.

    Attributes:
        task: name of the task.
        root: the keys.
        check: raises `ConfigError` if values do not work together.
    """

    task: str
    root: KeyGroup
    check: Callable[[CfgNode], None]

    @cached_property
    def keys(self) -> dict[str, Key]:
        """Every key by its dotted name, in the order of the tree."""
        return dict(leaves(self.root))

    def add_key(self, name: str, key: Key) -> None:
        """Add a key, as modules of `--import` do.

        Args:
            name: dotted name; groups that do not exist are made.
            key: the key. Flags are for the project's own keys.

        Raises:
            ValueError: another key or a group has the name, a part of the name is a key, or the key has a flag.
        """
        parts = name.split('.')
        if key.flag or not all(re.fullmatch('[A-Z][A-Z0-9_]*', part) for part in parts):
            raise ValueError(f'config key {name}: write the name in capital letters, and the key without a flag')
        for other, known in self.keys.items():
            if (other == name and known != key) or other.startswith(f'{name}.'):
                raise ValueError(f'config key {name} already exists: write another name')
            if name.startswith(f'{other}.'):
                raise ValueError(f'config key {name}: {other} is a key, not a group')
        group = self.root
        for part in parts[:-1]:
            group = group.setdefault(part, KeyGroup())
        group[parts[-1]] = key
        del vars(self)['keys']  # computed again

    def defaults(self) -> CfgNode:
        """A new config tree of the defaults."""

        def values(group: KeyGroup) -> CfgNode:
            return CfgNode({k: values(x) if isinstance(x, KeyGroup) else _copy(x.default) for k, x in group.items()})

        return values(self.root)

    def load(
        self,
        cfg_file: str | Path | None,
        opts: Sequence[Any] = (),
        saved: Mapping[str, Any] | None = None,
        repeats: bool = False,
    ) -> CfgNode:
        """Merge defaults, a saved config, the file's BASE files, the file and the options, in this order.

        The config is checked and frozen. Before anything else is read, the modules that the file, its BASE files and
        the options name as `IMPORT` are imported. Modules that a saved config names are not, since it is untrusted.

        Args:
            cfg_file: a YAML file with part of the tree; None for none.
            opts: alternating keys and values, such as `['TRAIN.EPOCHS', '10']`. Text is read, as in files, as a value
                of the key's type.
            saved: a checkpoint's `config`. Some of its keys are not read: keys with a flag, which belong to the command
                that wrote it; unknown keys, which belong to another program; and names of plugins that have not been
                imported, which may not be needed.
            repeats: read keys with a flag too, to repeat the checkpoint's run; `opts` must name the run's modules.

        Raises:
            ConfigError: a file, key or value that cannot work.
            ExtensionError: a module cannot be imported.
        """
        files = _read_with_bases(Path(cfg_file)) if cfg_file is not None else []
        pairs = _pairs(opts)
        modules = [absolute(name, path.parent) for path, tree in files for name in _modules(tree.get('IMPORT'), path)]
        modules += [absolute(name) for key, value in pairs if key == 'IMPORT' for name in _modules(value, '--opts')]
        modules = list(dict.fromkeys(modules))
        import_modules(modules)
        missing, theirs = missing_modules((saved or {}).get('IMPORT'), modules), dict(leaves(saved or {}))
        if repeats:
            if missing:
                raise ConfigError(f'the run had {as_flags(missing)}: add it')
            theirs = {name: key.before for name, key in self.keys.items() if key.before is not None} | theirs
        config = self.defaults()
        for name, value in theirs.items():
            if name not in self.keys or name == 'IMPORT':
                continue
            if repeats or not (self.keys[name].flag or self._is_unregistered(name, value)):
                self._set(config, name, self._stored(name, value), "the checkpoint's config")
        for path, tree in files:
            self._merge_file(config, path, tree)
        for key, value in pairs:
            if key == 'BASE':
                raise ConfigError('BASE is for config files: write it in the file given to --cfg')
            if key != 'IMPORT':
                self._set(config, key, value, '--opts')
        if modules:
            config.IMPORT = modules
        try:
            self.check(config)
        except ConfigError as error:
            if not missing:
                raise
            raise ConfigError(f"{error}. The checkpoint's run had {as_flags(missing)}") from error
        config.freeze()
        return config

    def _is_unregistered(self, name: str, value: Any) -> bool:
        """Whether a saved value names a part, such as a loss, of a module that has not been imported."""
        key = self.keys[name]
        return isinstance(key.choices, Mapping) and not key.is_choice(value)

    def load_with_flags(self, args: argparse.Namespace) -> CfgNode:
        """Load a config, and override it by command-line flags; a flag not given (None) overrides nothing.

        Raises:
            ConfigError: a file, key or value that cannot work.
        """
        flags = ((name, getattr(args, _destination(key), None)) for name, key in self.keys.items() if key.flag)
        given = [(name, value) for name, value in flags if value is not None]
        return self.load(args.cfg, list(chain(*_pairs(args.opts or ()), *given)))

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the flag of every key that has one, with None as its default."""
        for name, key in self.keys.items():
            if not key.flag or name == 'IMPORT':  # see `add_options`
                continue
            options: dict[str, Any] = {'help': f'{key.help} ({name})', 'default': None}
            if key.type is bool:
                options['action'] = 'store_true'
            elif key.choices:
                options['choices'] = [choice for choice in key.choices if choice]
            else:
                options |= {'type': key.type, 'metavar': key.metavar or 'N'}
            parser.add_argument(*key.flag.split(), **options)

    def changed_keys(
        self, config: CfgNode, saved: Mapping[str, Any], names: Sequence[str] | None = None
    ) -> list[ChangedKey]:
        """Keys that differ from a checkpoint's config.

        Args:
            config: the config tree.
            saved: the checkpoint's `config`. A key that an older checkpoint lacks counts as `Key.value_before`.
            names: the keys; None for all that affect what a run computes.
        """
        theirs = dict(leaves(saved))
        if names is None:
            names = [name for name, key in self.keys.items() if key.affects != 'nothing']
        changed = []
        for name in names:
            key = self.keys[name]
            ours = get(config, name, 'config')
            before = self._stored(name, theirs[name]) if name in theirs else key.value_before
            if _plain(before) != _plain(ours):
                changed.append(ChangedKey(name, key.affects, before, ours))
        return changed

    def _stored(self, name: str, value: Any) -> Any:
        """Reduce a value in a checkpoint's config to what is used of it; see `Key.stored`."""
        stored = self.keys[name].stored
        return stored(value) if stored and isinstance(value, str) else value

    def differences(self, config: CfgNode) -> list[str]:
        """Keys that differ from their defaults, with their values."""
        changed = ((name, value) for name, value in leaves(config) if _plain(value) != _plain(self.keys[name].default))
        return [f'{name} {value!r}' for name, value in changed]

    def unused(self, config: CfgNode) -> list[str]:
        """Keys that differ from their defaults without any effect, with the setting that they need; see `Key`."""
        unused, values = [], dict(leaves(config))
        for name, key in self.keys.items():
            other, _, needed = key.used_with.partition(' ')
            if not other or _plain(values[name]) == _plain(key.default):
                continue
            value = values[other]
            wanted = needed.split('|') if needed else []
            if str(value) not in wanted if wanted else not value:
                hint = f', not {", ".join(wanted[:3])}{", ..." * (len(wanted) > 3)}' if wanted else ''
                unused.append(f'{name} has no effect: {other} is {value!r}{hint}')
        return unused

    def _merge_file(self, config: CfgNode, path: Path, tree: Mapping[str, Any]) -> None:
        """Merge a YAML file without its BASE files."""
        task = stated_task(tree)
        if task not in (None, self.task):
            raise ConfigError(
                f'config file {path} is for {task}, and this program is for {self.task}: '
                f'start the program of {task}, or give another --cfg'
            )
        names = set()
        for name, value in leaves(tree):
            if name in names:  # as TRAIN.EPOCHS, and within TRAIN
                raise ConfigError(f'config file {path} gives {shortened(name)} twice: remove one')
            names.add(name)
            if name not in ('BASE', 'IMPORT'):  # merged now, so a dump stands alone; imported before
                self._set(config, name, value, str(path))

    def _set(self, config: CfgNode, name: str, value: Any, source: str) -> None:
        """Set the leaf of a dotted name to a value of its type, within its bounds."""
        get(config, name, source)  # it must exist
        key = self.keys[name]
        try:
            read = _read_value(key, value)
        except ValueError as error:
            raise ConfigError(f'{name} is {_quoted(value)}: write {_example(key)} (in {source})') from error
        if key.is_path:
            read = os.path.expanduser(read)
        self._check_value(name, read, source)
        *groups, leaf = name.split('.')
        for group in groups:
            config = config[group]
        config[leaf] = read

    def _check_value(self, name: str, value: Any, source: str) -> None:
        """Refuse a value that the key does not allow."""
        key = self.keys[name]
        values = value if isinstance(value, list | tuple) else [value]
        low, high = (-float('inf') if key.min is None else key.min), (float('inf') if key.max is None else key.max)
        is_outside = any(isinstance(x, int | float) and not low <= x <= high for x in values)
        if is_outside or not key.is_choice(value):
            raise ConfigError(f'{name} is {_quoted(value)}: write {key.allowed} (in {source})')


class _ImportOption(argparse.Action):
    """`--import NAME` as `--opts IMPORT NAME`."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, name: Any, option: Any) -> None:
        namespace.opts = [*namespace.opts, 'IMPORT', absolute(name)]


def add_options(parser: argparse.ArgumentParser, text: str = 'config keys and values') -> None:
    """Add `--opts` and `--import`; both are in the attribute `opts` of the parsed command line.

    Args:
        parser: gets the flags.
        text: help of `--opts`.
    """
    parser.add_argument('--opts', nargs='+', action='extend', default=[], metavar='KEY VALUE', help=text)
    parser.add_argument(
        '--import',
        dest='opts',
        action=_ImportOption,
        metavar='MODULE',
        help='.py file, or name of a module, with your own parts (docs/extending.md); may be repeated',
    )


def _modules(value: Any, source: str | Path) -> list[str]:
    """The names of modules in a value of the key IMPORT.

    Raises:
        ConfigError: it is neither a name nor a list of names.
    """
    if isinstance(value, str):
        names = _split(value) if value.strip().startswith('[') else [value]  # a path may contain commas
    else:
        names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ConfigError(f'IMPORT is {_quoted(value)}: write a list such as [my_module.py] (in {source})')
    return [name for name in names if name]


def stated_task(config: Mapping[str, Any]) -> str | None:
    """The task that a config file, or the config in a checkpoint, states; None if it states none.

    Files from before there was the key `TASK` state it by their `MODEL.TYPE`.
    """
    if config.get('TASK'):
        return str(config['TASK'])
    model = config.get('MODEL')
    network = str(model.get('TYPE')) if isinstance(model, Mapping) else ''
    if network == 'cascade_rcnn':
        return 'detection'
    return 'classification' if network == 'msg' or network.startswith('timm:') else None


def task_of_file(path: str | Path) -> str:
    """The task of a config file, which it or one of its BASE files states; classification if none does.

    Raises:
        ConfigError: a file cannot be read, is among its own BASE files, or has too many of them.
    """
    tasks = (stated_task(tree) for _, tree in reversed(_read_with_bases(Path(path))))
    return next(filter(None, tasks), 'classification')


def _read_with_bases(path: Path) -> list[tuple[Path, Mapping[str, Any]]]:
    """Paths and contents of a config file's BASE files, which have their own, and of the file, as they are merged."""
    files: list[tuple[Path, Mapping[str, Any]]] = []

    def read(path: Path, included_from: tuple[Path, ...]) -> None:
        if path.resolve() in included_from:
            raise ConfigError(f'config file {path} is among its own BASE files: remove it there')
        tree = read_yaml(path, f'config file {path}', ConfigError, as_text=True)
        if not isinstance(tree, Mapping):
            raise ConfigError(f'config file {path} holds no keys: write some, such as MODEL: {{NAME: ...}}')
        bases = tree.get('BASE', [])
        if not isinstance(bases, list) or not all(isinstance(base, str) and base.isprintable() for base in bases):
            raise ConfigError(f'BASE is {_quoted(bases)}: write a list such as [base.yaml] (in {path})')
        for base in filter(None, bases):
            read(path.parent / os.path.expanduser(base), (*included_from, path.resolve()))
        files.append((path, tree))
        if len(files) > MAX_BASE_FILES:
            raise ConfigError(f'config file {path} is one of more than {MAX_BASE_FILES} BASE files: write fewer')

    read(Path(os.path.expanduser(path)), ())
    return files


def get(config: CfgNode, name: str, source: str) -> Any:
    """The value of a dotted name.

    Args:
        config: a config tree.
        name: the key's name.
        source: the file or flag that names it, for the message.

    Raises:
        ConfigError: there is no such key; the message names the closest.
    """
    node: Any = config
    for part in str(name).split('.'):
        if not isinstance(node, CfgNode) or part not in node:
            near = _closest(str(name), [known for known, _ in leaves(config)])
            hint = f': did you mean {near}?' if near else ''
            hint = f': write {REPLACED_KEYS[name]}' if name in REPLACED_KEYS else hint
            raise ConfigError(f'config key {shortened(name)} does not exist{hint} (in {source})')
        node = node[part]
    if isinstance(node, CfgNode):
        raise ConfigError(
            f'config key {name} is a group: write one of its keys, such as {name}.{next(iter(node))} (in {source})'
        )
    return node


def _destination(key: Key) -> str:
    """The attribute in which argparse stores a key's flag."""
    return key.flag.split()[0].removeprefix('--').replace('-', '_')


def _plain(value: Any) -> Any:
    """A value as YAML keeps it, which has no tuples."""
    return list(value) if isinstance(value, tuple) else value


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, list) else value


def _pairs(opts: Sequence[Any]) -> list[tuple[str, Any]]:
    """Keys with their values, from a flat list."""
    if len(opts) % 2:
        raise ConfigError(f'--opts takes pairs, KEY VALUE: {" ".join(map(str, opts))!r} has no value for {opts[-1]}')
    return list(zip(opts[0::2], opts[1::2], strict=True))


def _closest(name: str, known: Sequence[str]) -> str | None:
    """The known key that a misspelt name probably means: both its last part and the whole name are similar."""
    if len(name) > 100:
        return None

    def likeness(key: str) -> float:
        pairs = ((name, key), (name.rpartition('.')[2], key.rpartition('.')[2]))
        whole, last = (difflib.SequenceMatcher(None, one.upper(), two).ratio() for one, two in pairs)
        return last + whole if last >= 0.75 and whole >= 0.55 else 0

    best = max(known, key=likeness)
    return best if likeness(best) else None


def _read_value(key: Key, value: Any) -> Any:
    """Convert text or a Python value to the key's type; lists and tuples are interchangeable.

    Raises:
        ValueError: it has another type.
    """
    if key.optional and (value is None or (value == 'None' and key.optional is not str)):  # which YAML calls null
        return None
    if key.or_list and (items := _split(value)):
        return [_read_scalar(key.type, item) for item in items]
    if key.type not in (list, tuple):
        return _read_scalar(key.type, value)
    values = _parse(value)
    if not isinstance(values, list | tuple):
        raise ValueError
    item = type(key.default[0]) if key.default else key.item
    return key.type(_read_scalar(item, x) for x in values)


def _split(value: Any) -> list[Any] | None:
    """The items of a list, or of text such as `[shuf, none]` or `shuf,none`; None for a single value."""
    if isinstance(value, str):
        found = re.fullmatch(r'\[([^\[\]()]*)\]|\(([^\[\]()]*)\)|([^\[\]()]*,[^\[\]()]*)', value.strip())
        text = next(filter(None, found.groups()), '') if found else ''
        value = [item.strip(' "\'') for item in text.split(',') if item.strip()]
    return list(value) if isinstance(value, list | tuple) else None


def _read_scalar(kind: type, value: Any) -> Any:
    """Convert a value to bool, int, float or str; an integer is accepted as a float, and a number as text.

    Raises:
        ValueError: it has another type, is not finite or huge, or is text with control characters.
    """
    if kind is bool and isinstance(value, str):
        value = BOOLEANS.get(value.lower(), value)
    if kind in (int, float):
        value = _parse(value)
    allowed = {bool: bool, int: int, float: int | float, str: str | int | float}[kind]
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        raise ValueError
    limit = sys.maxsize if isinstance(value, int) else sys.float_info.max
    if isinstance(value, int | float) and not abs(value) <= limit:  # nor is nan
        raise ValueError
    value = kind(value)
    if kind is str:
        value = value.rstrip('\n')  # of YAML's blocks
        if any(char < ' ' and char != '\t' for char in value):
            raise ValueError
    return value


def _parse(value: Any) -> Any:
    """Parse text as a Python literal; other text stays text."""
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return value


def _example(key: Key) -> str:
    """What a value of a key's type looks like."""
    if key.type in (list, tuple):
        return f'a list such as {list(key.default or ([1, 2] if key.item is int else [0.2, 0.8]))}'
    return {bool: 'True or False', int: 'an integer', float: 'a number', str: 'text on one line'}[key.type]


def _quoted(value: Any) -> str:
    """A value as messages show it."""
    is_short_text = isinstance(value, str) and len(value) < 100
    return shortened(repr(_parse(value) if is_short_text else value))
