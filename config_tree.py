"""Config trees of any task: how files, options and flags are merged into the defaults, checked and frozen."""

import ast
import difflib
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode


class ConfigError(ValueError):
    """A config key, value or flag that cannot work; the message says what to write."""


@dataclass(frozen=True)
class ConfigTree:
    """A task's keys, and what their values may be; keys are dotted.

    Attributes:
        defaults: every key with its default, whose type is the key's.
        optional: keys whose default is None, with the type of their other values.
        choices: the values of keys that have few.
        ranges: smallest and largest value of a number, or of every number in a list.
        no_effect: keys that change nothing of what a run computes.
        flags: the key behind each flag of the command line.
        check: raises `ConfigError` where keys do not go together.
    """

    defaults: CfgNode
    optional: dict[str, type]
    choices: dict[str, tuple[str, ...]]
    ranges: dict[str, tuple[float, float]]
    no_effect: set[str]
    flags: dict[str, str]
    check: Callable[[CfgNode], None]

    def load(self, cfg_file: str | Path, opts: Sequence[Any] = ()) -> CfgNode:
        """Defaults, then the file's BASE files, the file and the options, checked and frozen.

        Args:
            cfg_file: a YAML file with a part of the tree.
            opts: keys and values in turn, such as `['TRAIN.EPOCHS', '10']`; text is read as a Python value unless the
                key holds text.

        Raises:
            ConfigError: a file, key or value that cannot work.
        """
        config = self.defaults.clone()
        self._merge_file(config, Path(cfg_file))
        # The BASE files are merged now, so that a dump stands alone.
        config.BASE = self.defaults.BASE.copy()
        for key, value in _pairs(opts):
            if key == 'BASE':
                raise ConfigError('BASE is for config files: write it in the file that --cfg names')
            self._set(config, key, _parse(value, get(config, key, '--opts')), '--opts')
        self._check_values(config)
        self.check(config)
        config.freeze()
        return config

    def load_with_flags(self, args: Namespace) -> CfgNode:
        """`load` with the command line's flags on top; one that is not given (None) overrides nothing.

        Raises:
            ConfigError: a file, key or value that cannot work.
        """
        flags = [(key, getattr(args, flag, None)) for flag, key in self.flags.items()]
        given = [(key, value) for key, value in flags if value is not None]
        return self.load(args.cfg, list(chain(*_pairs(args.opts or ()), *given)))

    def changed_keys(self, config: CfgNode, saved: Mapping[str, Any]) -> list[str]:
        """Keys whose value differs from a checkpoint's, of those that change what a run computes.

        Args:
            config: the config tree.
            saved: the entry `config` of a checkpoint; without one, none have changed.
        """
        ours, theirs = dict(leaves(config)), dict(leaves(saved))
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in ours.items()}
        return [key for key in theirs if key not in self.no_effect and key in ours and theirs[key] != plain[key]]

    def part(self, keys: Sequence[str]) -> 'ConfigTree':
        """The tree of some of the keys, for another task to add its own to; nothing is checked among its keys."""
        defaults = CfgNode()
        for key in keys:
            *groups, name = key.split('.')
            node = defaults
            for group in groups:
                node = node.setdefault(group, CfgNode())
            node[name] = get(self.defaults, key, 'another tree')

        def of_keys(table: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in table.items() if key in keys}

        flags = {flag: key for flag, key in self.flags.items() if key in keys}
        no_effect = self.no_effect & set(keys)
        tables = (of_keys(self.optional), of_keys(self.choices), of_keys(self.ranges))
        return ConfigTree(defaults, *tables, no_effect, flags, lambda config: None)

    def _merge_file(self, config: CfgNode, path: Path, heirs: tuple[Path, ...] = ()) -> None:
        """Merge a YAML file's BASE files, in their order, then the file; `heirs` are the files that led to it."""
        if path.resolve() in heirs:
            raise ConfigError(f'config file {path} is among its own BASE files: remove it there')
        try:
            tree = yaml.safe_load(path.read_text())
        except OSError as error:
            raise ConfigError(f'config file {path}: {error.strerror}') from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f'config file {path} is not YAML: {" ".join(str(error).split())}') from error
        if not isinstance(tree, Mapping):
            raise ConfigError(f'config file {path} holds no keys: write some, such as MODEL: {{NAME: ...}}')
        bases = self._coerce('BASE', tree.get('BASE', self.defaults.BASE), self.defaults.BASE, str(path))
        for base in bases:
            if base:
                self._merge_file(config, path.parent / base, (*heirs, path.resolve()))
        for key, value in leaves(tree):
            self._set(config, key, value, str(path))

    def _set(self, config: CfgNode, key: str, value: Any, source: str) -> None:
        """Set the leaf at a dotted key to a value of its type."""
        value = self._coerce(key, value, get(config, key, source), source)
        *groups, name = key.split('.')
        for group in groups:
            config = config[group]
        config[name] = value

    def _coerce(self, key: str, value: Any, default: Any, source: str) -> Any:
        """The value as the key's type: whole numbers serve as floats, and lists and tuples as each other."""
        if key in self.optional and value is None:
            return None
        kind = self.optional.get(key, type(default))
        if kind in (list, tuple) and isinstance(value, list | tuple):
            item = type(default[0]) if default else float
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
            example = f'a list such as {list(default or [0.2, 0.8])}'
        else:
            example = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[kind]
        raise ConfigError(f'{key} is {value!r}: write {example} (in {source})')

    def _check_values(self, config: CfgNode) -> None:
        """Refuse the values that a key cannot have."""
        for key, choices in self.choices.items():
            value = get(config, key, 'config')
            if value not in choices:
                near = ', '.join(choice or "''" for choice in choices)
                raise ConfigError(f'{key} is {value!r}: write one of {near}')
        for key, (low, high) in self.ranges.items():
            value = get(config, key, 'config')
            for number in value if isinstance(value, list | tuple) else [value]:
                if number is not None and not low <= number <= high:
                    bound = f'at least {low}' if high == float('inf') else f'between {low} and {high}'
                    several = 'a number' if value is number else 'numbers'
                    raise ConfigError(f'{key} is {value}: write {several} {bound}')


def leaves(tree: Mapping, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of a nested mapping."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f'{prefix}{name}.')
        else:
            yield f'{prefix}{name}', value


def get(config: CfgNode, key: str, source: str) -> Any:
    """The value at a dotted key.

    Args:
        config: a config tree.
        key: the key.
        source: where it was written, for the message.

    Raises:
        ConfigError: there is no such key; the message names the nearest.
    """
    node: Any = config
    for name in str(key).split('.'):
        if not isinstance(node, CfgNode) or name not in node:
            near = difflib.get_close_matches(str(key), [known for known, _ in leaves(config)], n=1, cutoff=0.5)
            hint = f': did you mean {near[0]}?' if near else ''
            raise ConfigError(f'config key {key} does not exist{hint} (in {source})')
        node = node[name]
    if isinstance(node, CfgNode):
        raise ConfigError(
            f'config key {key} is a group: write one of its keys, such as {key}.{next(iter(node))} (in {source})'
        )
    return node


def _pairs(opts: Sequence[Any]) -> list[tuple[str, Any]]:
    """Keys with their values, from a flat list."""
    if len(opts) % 2:
        raise ConfigError(f'--opts takes pairs, KEY VALUE: {" ".join(map(str, opts))!r} has no value for {opts[-1]}')
    return list(zip(opts[0::2], opts[1::2], strict=True))


def _parse(value: Any, default: Any) -> Any:
    """Read an option's text as a Python value, unless the key holds text."""
    if not isinstance(value, str) or isinstance(default, str):
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
