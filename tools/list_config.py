"""Print every config key of both tasks as Markdown: docs/configuration.md.

python -m tools.list_config > docs/configuration.md
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
from itertools import groupby
from typing import Any

import config as classification
import detection.config
from engine.config_keys import Key
from engine.config_tree import ConfigTree
from utils import exit_on_user_error

INTRODUCTION = """# Configuration

<!-- Written by `python -m tools.list_config > docs/configuration.md`: change the keys, not this file. -->

Every setting is a key of a config tree. Flags override `--opts`, `--opts` override the file given to `--cfg`, the file
overrides its `BASE` files, and those override the defaults below. Unknown keys and flags are errors.

```bash
python main.py --cfg configs/msg_tiny_p4_win7_224.yaml --data-path <data> --opts MODEL.NUM_CLASSES 10 TRAIN.EPOCHS 100
```

Config files are YAML. A value is read as the type of its key: `TAG: 010` is the text 010, and `TRAIN.BASE_LR: 1e-3` a
number. A key that a file gives twice is an error. In keys that are paths, `~` is the home folder.

A run writes all of its keys to `config.yaml`, and logs those that differ from the defaults. Settings that would not
take effect before the run ends, such as a warm-up that is longer than the run, are errors.

Modules of `--import` can add keys, and new values of keys such as `TRAIN.LOSS`: see [extending](extending.md).

- [Classification](#classification): `main.py`, [config.py](../config.py)
- [Detection](#detection): `detection/main.py`, [detection/config.py](../detection/config.py)
"""


def main() -> None:
    """Print the document."""
    argparse.ArgumentParser('python -m tools.list_config', description=__doc__.splitlines()[0]).parse_args()
    with exit_on_user_error():
        print(document(), end='')


def document() -> str:
    """The text of docs/configuration.md."""
    sections = [INTRODUCTION]
    for title, tree in (('Classification', classification.TREE), ('Detection', detection.config.TREE)):
        sections.append(f'## {title}\n')
        sections += tables(tree)
    return '\n'.join(sections)


def tables(tree: ConfigTree) -> list[str]:
    """A Markdown table for each group of a tree's keys, the root's first."""
    rows = sorted(tree.keys.items(), key=lambda item: item[0].rpartition('.')[0])  # stable: keys keep their order
    sections = []
    for group, items in groupby(rows, key=lambda item: item[0].rpartition('.')[0]):
        lines = [f'### {group}\n'] if group else []
        lines += ['| key | default | meaning | allowed | flag |', '|---|---|---|---|---|']
        lines += [row(name, key) for name, key in items]
        sections.append('\n'.join(lines) + '\n')
    return sections


def row(name: str, key: Key) -> str:
    """One key as a row of a table."""
    flags = ', '.join(f'`{flag}`' for flag in key.flag.split())
    cells = (f'`{name}`', f'`{written(key.default)}`', escaped(key.help), escaped(key.allowed), flags)
    return f'| {" | ".join(cells)} |'


def escaped(text: str) -> str:
    """Text that Markdown takes literally."""
    return text.replace('|', '\\|').replace('<', '&lt;').replace("''", "`''`")


def written(value: Any) -> str:
    """A value as it is written in YAML; floats in the fewest digits."""
    if isinstance(value, list | tuple):
        return f'[{", ".join(map(written, value))}]'
    if isinstance(value, str):
        return f"'{value}'" if value in ('', 'none') else value
    return f'{value:.4g}' if isinstance(value, float) and value else str(value)


if __name__ == '__main__':
    main()
