"""Config trees: how files, options and flags are merged into a task's keys, checked and frozen."""

import argparse
import ast
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from engine.config_keys import ChangedKey, Key, KeyGroup
from utils import UserError, read_yaml

# Names of the tasks: values of the key TASK
TASKS = ('classification', 'detection')


class ConfigError(UserError):
    """A config key, value or flag that cannot work; the message says what to write."""


@dataclass(frozen=True)
class ConfigTree:
    """A task's keys.

    Attributes:
        task: name of the task.
        root: the keys.
        check: raises `ConfigError` where values do not go together.
    """

    task: str
    root: KeyGroup
    check: Callable[[CfgNode], None]

    @cached_property
    def keys(self) -> dict[str, Key]:
        """Every key by its dotted name, in the order of the tree."""
        return dict(leaves(self.root))

    def defaults(self) -> CfgNode:
        """A new config tree of the defaults."""

        def values(group: KeyGroup) -> CfgNode:
            return CfgNode({k: values(x) if isinstance(x, KeyGroup) else _copy(x.default) for k, x in group.items()})

        return values(self.root)

    def load(
        self, cfg_file: str | Path | None, opts: Sequence[Any] = (), saved: Mapping[str, Any] | None = None
    ) -> CfgNode:
        """Defaults, overridden by a saved config, the file's BASE files, the file and the options; checked and frozen.

        Args:
            cfg_file: a YAML file with part of the tree; None for none.
            opts: alternating keys and values, such as `['TRAIN.EPOCHS', '10']`; text is parsed as a Python value unless
                the key holds text.
            saved: a checkpoint's `config`. Keys with a flag belong to the command that wrote it, and keys that are
                unknown to another program: neither is read.

        Raises:
            ConfigError: a file, key or value that cannot work.
        """
        config = self.defaults()
        for name, value in leaves(saved or {}):
            if name in self.keys and not self.keys[name].flag:
                self._set(config, name, value, "the checkpoint's config")
        if cfg_file is not None:
            self._merge_file(config, Path(cfg_file))
        config.BASE = _copy(self.keys['BASE'].default)  # merged now, so a dump stands alone
        for key, value in _pairs(opts):
            if key == 'BASE':
                raise ConfigError('BASE is for config files: write it in the file given to --cfg')
            self._set(config, key, _parse(value, get(config, key, '--opts')), '--opts')
        self.check(config)
        config.freeze()
        return config

    def load_with_flags(self, args: argparse.Namespace) -> CfgNode:
        """`load`, overridden by the command line's flags; a flag not given (None) overrides nothing.

        Raises:
            ConfigError: a file, key or value that cannot work.
        """
        flags = ((name, getattr(args, _destination(key), None)) for name, key in self.keys.items() if key.flag)
        given = [(name, value) for name, value in flags if value is not None]
        return self.load(args.cfg, list(chain(*_pairs(args.opts or ()), *given)))

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Add the flag of every key that has one, with None as its default."""
        for name, key in self.keys.items():
            if not key.flag:
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
            saved: the checkpoint's `config`. A key that it does not have, since it is older, had its value of then.
            names: the keys; None for all that affect what a run computes.
        """
        theirs = dict(leaves(saved))
        if names is None:
            names = [name for name, key in self.keys.items() if key.affects != 'nothing']
        changed = []
        for name in names:
            key = self.keys[name]
            ours, before = get(config, name, 'config'), theirs.get(name, key.value_before)
            if _plain(before) != _plain(ours):
                changed.append(ChangedKey(name, key.affects, before, ours))
        return changed

    def _merge_file(self, config: CfgNode, path: Path, included_from: tuple[Path, ...] = ()) -> None:
        """Merge a YAML file's BASE files, in order, then the file; `included_from` are the files that led to it."""
        tree = _read_file(path, included_from)
        task = stated_task(tree)
        if task not in (None, self.task):
            raise ConfigError(
                f'config file {path} is for {task}, and this program is for {self.task}: '
                f'start the program of {task}, or give another --cfg'
            )
        default = self.keys['BASE'].default
        for base in self._coerce('BASE', tree.get('BASE', default), str(path)):
            if base:
                self._merge_file(config, path.parent / base, (*included_from, path.resolve()))
        for key, value in leaves(tree):
            self._set(config, key, value, str(path))

    def _set(self, config: CfgNode, name: str, value: Any, source: str) -> None:
        """Set the leaf of a dotted name to a value of its type, within its bounds."""
        get(config, name, source)  # it must exist
        value = self._coerce(name, value, source)
        self._check_value(name, value, source)
        *groups, leaf = name.split('.')
        for group in groups:
            config = config[group]
        config[leaf] = value

    def _coerce(self, name: str, value: Any, source: str) -> Any:
        """The value in the key's type: an integer serves as a float, lists and tuples as each other."""
        key = self.keys[name]
        if key.optional and (value is None or (value == 'None' and key.optional is not str)):  # which YAML calls null
            return None
        kind = key.type
        if kind in (list, tuple) and isinstance(value, list | tuple):
            item = type(key.default[0]) if key.default else float
            if all(_is_a(x, item) for x in value):
                return kind(item(x) for x in value)
        elif _is_a(value, kind) and kind not in (list, tuple):
            return kind(value)
        elif kind is float and isinstance(value, str):  # YAML reads 5e-4, without a dot, as text
            try:
                return float(value)
            except ValueError:
                pass
        if kind in (list, tuple):
            example = f'a list such as {list(key.default or [0.2, 0.8])}'
        else:
            example = {bool: 'True or False', int: 'an integer', float: 'a number', str: 'text'}[kind]
        raise ConfigError(f'{name} is {value!r}: write {example} (in {source})')

    def _check_value(self, name: str, value: Any, source: str) -> None:
        """Refuse a value that the key does not allow."""
        key = self.keys[name]
        values = value if isinstance(value, list | tuple) else [value]
        low, high = (-float('inf') if key.min is None else key.min), (float('inf') if key.max is None else key.max)
        is_outside = any(isinstance(x, int | float) and not low <= x <= high for x in values)
        if is_outside or not key.is_choice(value):
            raise ConfigError(f'{name} is {value!r}: write {key.allowed} (in {source})')


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
        ConfigError: a file cannot be read, or is among its own BASE files.
    """
    return _task_of_file(Path(path), ()) or 'classification'


def _task_of_file(path: Path, included_from: tuple[Path, ...]) -> str | None:
    tree = _read_file(path, included_from)
    bases = tree.get('BASE') or []
    paths = [path.parent / str(base) for base in ([bases] if isinstance(bases, str) else bases) if base]
    tasks = (_task_of_file(base, (*included_from, path.resolve())) for base in paths)
    return stated_task(tree) or next(filter(None, tasks), None)


def _read_file(path: Path, included_from: tuple[Path, ...] = ()) -> Mapping[str, Any]:
    """Content of a config file; `included_from` are the files that name it, one after the other, in their BASE."""
    if path.resolve() in included_from:
        raise ConfigError(f'config file {path} is among its own BASE files: remove it there')
    tree = read_yaml(path, f'config file {path}', ConfigError)
    if not isinstance(tree, Mapping):
        raise ConfigError(f'config file {path} holds no keys: write some, such as MODEL: {{NAME: ...}}')
    return tree


def leaves(tree: Mapping, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every leaf of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


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
            near = difflib.get_close_matches(str(name), [known for known, _ in leaves(config)], n=1, cutoff=0.5)
            hint = f': did you mean {near[0]}?' if near else ''
            raise ConfigError(f'config key {name} does not exist{hint} (in {source})')
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


def _parse(value: Any, current: Any) -> Any:
    """Parse an option's text as a Python value, unless the key holds text."""
    if not isinstance(value, str) or isinstance(current, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if kind is str:  # YAML reads a tag such as 2024 as a number
        return isinstance(value, str | int | float)
    return isinstance(value, (int, float) if kind is float else kind)
