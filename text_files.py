"""Read untrusted YAML and JSON files within size limits, and write CSV rows without spreadsheet formulas."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from utils import UserError, first_line, shortened

# Bounds of a YAML file, far above what configs, studies and lists of classes need.
MAX_YAML_BYTES = 1_000_000
MAX_YAML_VALUES = 50_000
MAX_YAML_DEPTH = 50


class _YamlContentError(yaml.MarkedYAMLError):
    """YAML that is well-formed but refused, such as for a duplicate key."""

    def __init__(self, problem: str, mark: yaml.Mark):
        super().__init__(problem=problem, problem_mark=mark)


class _YamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with limits on nesting and on values repeated by aliases; duplicate keys are errors."""

    def __init__(self, stream: bytes):
        super().__init__(stream)
        self.depth, self.count = 0, 0  # an alias counts as all the values that it repeats
        self.counts: dict[yaml.Node, int] = {}  # number of values within each node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Compose a value or an alias, and check the limits."""
        mark, is_alias, before = self.peek_event().start_mark, self.check_event(yaml.AliasEvent), self.count
        self.depth += 1
        if self.depth > MAX_YAML_DEPTH:
            raise _YamlContentError(f'more than {MAX_YAML_DEPTH} levels', mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if is_alias and node not in self.counts:
            raise _YamlContentError('a value holds itself, by an alias', mark)
        self.count += self.counts[node] if is_alias else 1
        if self.count > MAX_YAML_VALUES:
            raise _YamlContentError(f'more than {MAX_YAML_VALUES:,} values', mark)
        self.counts.setdefault(node, self.count - before)
        return node

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Compose a mapping, and refuse duplicate keys, of which PyYAML would keep the last."""
        mapping = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in mapping.value:
            if isinstance(key, yaml.ScalarNode) and first.setdefault((key.tag, key.value), key) is not key:
                line = first[key.tag, key.value].start_mark.line + 1
                raise _YamlContentError(f'{key.value} is given in line {line} too: remove one', key.start_mark)
        return mapping


class _YamlTextLoader(_YamlLoader):
    """A loader that keeps scalars as text, except null."""


_YamlTextLoader.yaml_implicit_resolvers = {
    char: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((':null', ':merge'))]
    for char, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path, label: str, error_class: type[UserError], as_text: bool = False) -> Any:
    """Read an untrusted YAML file in UTF-8, with a single document.

    Args:
        path: the file.
        label: name of the file in error messages.
        error_class: class of the errors that are raised.
        as_text: keep values as they are written: YAML 1.1 reads 010 as 8, 12:30 as 750, no as False and 1.10 as 1.1.

    Raises:
        error_class: the file cannot be read, is not YAML, is too large, or has a duplicate key.
    """
    try:
        with path.open('rb') as file:
            content = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise error_class(f'{label}: {error.strerror}') from error
    if len(content) > MAX_YAML_BYTES:
        raise error_class(f'{label} is larger than {MAX_YAML_BYTES:,} bytes: give another file')
    try:
        return yaml.load(content, _YamlTextLoader if as_text else _YamlLoader)
    except yaml.MarkedYAMLError as error:
        problem = shortened(' '.join(filter(None, (error.context, error.problem))))
        line = f', line {error.problem_mark.line + 1}' if error.problem_mark else ''
        no_yaml = '' if isinstance(error, _YamlContentError) else ' is not YAML'
        raise error_class(f'{label}{no_yaml}{line}: {problem}') from error
    except yaml.reader.ReaderError as error:
        raise error_class(f'{label} is not YAML: {shortened(error)}: save it as UTF-8') from error
    except (yaml.YAMLError, ValueError, LookupError, AttributeError) as error:  # such as a month 13, or !!bool 3
        raise error_class(f'{label} is not YAML: {shortened(error)}') from error


def read_json(path: Path, label: str, error_class: type[UserError], remedy: str = 'replace it') -> Any:
    """Read a JSON file, with or without a byte order mark.

    Args:
        path: the file.
        label: name of the file in error messages.
        error_class: class of the errors that are raised.
        remedy: what the user can do, for error messages.

    Raises:
        error_class: the file cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise error_class(f'{label} cannot be read ({error.strerror}): {remedy}') from error
    except ValueError as error:  # including UnicodeDecodeError
        raise error_class(f'{label} is not JSON ({first_line(error)}): {remedy}') from error
    except RecursionError as error:
        raise error_class(f'{label} is not JSON (it is nested too deeply): {remedy}') from error


def csv_row(cells: Sequence[Any]) -> str:
    """Format a row of a CSV file, with its line end.

    A text that a spreadsheet would run as a formula (`=cmd()` as the name of a file or class) gets a leading
    apostrophe, which spreadsheets do not show.
    """
    row = io.StringIO()
    csv.writer(row, lineterminator='\n').writerow([_no_formula(cell) for cell in cells])
    return row.getvalue()


def _no_formula(cell: Any) -> Any:
    """Put an apostrophe before a text that a spreadsheet would run as a formula."""
    is_formula = isinstance(cell, str | Path) and str(cell).startswith(('=', '+', '-', '@', '\t', '\r'))
    return f"'{cell}" if is_formula else cell
