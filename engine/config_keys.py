"""Keys of a config tree: each with its default, meaning, allowed values and what it affects."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils import shortened


@dataclass(frozen=True)
class Key:
    """One key of a config tree.

    Attributes:
        default: default value; its type is the type of the key.
        help: description, for `--help` and docs/configuration.md.
        choices: allowed values; `timm:<name>` allows any text that starts with `timm:`. A `Registry` is read when a
            config is loaded, so that a user's modules can add to it.
        min, max: bounds of a number, or of every number in a list; None for no bound.
        optional: type of the values, if None is allowed too.
        item: type of the items of a list that is empty by default.
        or_list: whether a list of such values is allowed too; names are separated by commas.
        flag: command-line flag, if any; several spellings are separated by spaces.
        metavar: name of the flag's value in `--help`.
        is_path: whether the value is a path, in which a leading ~ is expanded.
        used_with: the setting without which the key has no effect: a key, whose value is neither 0 nor empty, or a key
            and its value, or values separated by |, such as `TRAIN.OPTIMIZER.NAME sgd|lars`.
        affects: what another value changes: the `network`, the content of the `data`, how `training` proceeds, or
            `nothing` that a run computes.
        before: value that describes runs from before the key existed, if it is not the default. Set it when a default
            changes.
        stored: function that reduces a value in a checkpoint's config, which is untrusted, to what is used of it; None
            uses the value unchanged.
    """

    default: Any
    help: str
    choices: Collection[str] = ()
    min: float | None = None
    max: float | None = None
    optional: type | None = None
    item: type = float
    or_list: bool = False
    flag: str = ''
    metavar: str | None = None
    is_path: bool = False
    used_with: str = ''
    affects: str = 'training'
    before: Any = None
    stored: Callable[[Any], Any] | None = None

    @property
    def type(self) -> type:
        """Type of the key's values other than None."""
        return self.optional or type(self.default)

    @property
    def value_before(self) -> Any:
        """Value of the key in runs from before it existed."""
        return self.default if self.before is None else self.before

    def is_choice(self, value: Any) -> bool:
        """Whether a value is among the choices; True for any value if there are no choices."""
        prefixes = tuple(choice.partition('<')[0] for choice in self.choices if choice.endswith('>'))
        values = value if isinstance(value, list) else [value]
        return not self.choices or all(
            isinstance(x, str) and (x in self.choices or bool(prefixes and x.startswith(prefixes))) for x in values
        )

    @property
    def allowed(self) -> str:
        """Allowed values in words; '' if any value of the type is allowed."""
        if self.choices:
            own = ', or another name that a module of --import registers' if isinstance(self.choices, Mapping) else ''
            return 'one of ' + ', '.join(choice or "''" for choice in self.choices) + own
        if self.min is None and self.max is None:
            return ''
        numbers = 'numbers' if self.type in (list, tuple) else 'a number'
        if self.min is None:
            return f'{numbers} at most {self.max}'
        if self.max is None:
            return f'{numbers} at least {self.min}'
        return f'{numbers} between {self.min} and {self.max}'


class ChangedKey(NamedTuple):
    """A key whose value differs from the value in a checkpoint's config; see `Key.affects`."""

    name: str
    affects: str
    before: Any
    now: Any

    @property
    def defines_experiment(self) -> bool:
        """Whether a run with another value is a different experiment."""
        return self.affects in ('network', 'data')

    def __str__(self) -> str:
        before, now = (shortened(repr(value)) for value in (self.before, self.now))
        return f'{self.name} has changed from {before} to {now}'


class KeyGroup(dict):
    """Keys, and further groups, by name: `group.NAME = Key(...)`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(name) from error

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value
