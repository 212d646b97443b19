"""Keys of a config tree: each with its default, meaning, allowed values and what it affects."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils import shortened


@dataclass(frozen=True)
class Key:
    """One key of a config tree.

    Attributes:
        default: its default, whose type is the key's.
        help: what it means, for readers of the tree, of `--help` and of docs/configuration.md.
        choices: its values, where they are few; `timm:<name>` is any text that starts so. A `Registry` of parts is read
            when a config is loaded, so that modules of users can add to it.
        min, max: bounds of a number, or of every number in a list; None for none.
        optional: type of its values where None is one of them.
        item: type of the items of a list that is empty by default.
        or_list: whether a list of such values is one of its values too; names are separated by commas.
        flag: its command-line flag, if any; several spellings are separated by spaces.
        metavar: what `--help` shows as the flag's value.
        is_path: whether it is a path, in which a leading ~ is the user's home folder.
        used_with: the setting without which the key has no effect: a key, whose value is neither 0 nor empty, or a key
            and its value, or values separated by |, such as `TRAIN.OPTIMIZER.NAME sgd|lars`.
        affects: what another value changes: the `network`, the content of the `data`, the course of the `training`, or
            `nothing` that a run computes.
        before: what runs did before there was the key, where that is not its default. To be set where a default
            changes.
        stored: what is taken of a value in a checkpoint's config, which may come from anyone; None takes it as it is.
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
        """Its value in runs from before there was the key."""
        return self.default if self.before is None else self.before

    def is_choice(self, value: Any) -> bool:
        """Whether a value is among the choices; any is where there are none."""
        prefixes = tuple(choice.partition('<')[0] for choice in self.choices if choice.endswith('>'))
        values = value if isinstance(value, list) else [value]
        return not self.choices or all(
            isinstance(x, str) and (x in self.choices or bool(prefixes and x.startswith(prefixes))) for x in values
        )

    @property
    def allowed(self) -> str:
        """Its values in words; '' where any of its type will do."""
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
    """A key whose value differs from that of a checkpoint; see `Key.affects`."""

    name: str
    affects: str
    before: Any
    now: Any

    @property
    def defines_experiment(self) -> bool:
        """Whether a run with another value is another experiment."""
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
