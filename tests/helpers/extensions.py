"""Modules of `--import` in tests: what they change in this process, and what docs/extending.md holds."""

import contextlib
import re
import sys

import detection.config
from config import TREE
from data.losses import LOSSES
from data.python_dataset import DATASETS
from data.transforms import TRANSFORMS
from distillation import TEACHERS
from models.exchange import EXCHANGES
from tests.helpers.paths import ROOT
from trackers import TRACKERS

PAGE = (ROOT / 'docs' / 'extending.md').read_text()


def examples_in(page):
    """Content of the example files of a page, by name."""
    return dict(re.findall(r'^`~/ideas/(\w+\.py)`:\n\n```python\n(.*?)^```$', page, re.DOTALL | re.MULTILINE))


EXAMPLES = examples_in(PAGE)


def groups_of(group):
    """A group of keys and all groups in it."""
    return [group, *(inner for value in group.values() if isinstance(value, dict) for inner in groups_of(value))]


@contextlib.contextmanager
def forgotten_modules():
    """Context after which modules that were imported, their parts and their keys are gone."""
    changed = [EXCHANGES, DATASETS, TRANSFORMS, LOSSES, TEACHERS, TRACKERS]
    changed += [group for tree in (TREE, detection.config.TREE) for group in groups_of(tree.root)]
    before, path, modules = [dict(x) for x in changed], sys.path[:], set(sys.modules)
    try:
        yield
    finally:
        for one, content in zip(changed, before, strict=True):
            one.clear()
            one.update(content)
        for tree in (TREE, detection.config.TREE):
            vars(tree).pop('keys', None)
        added = [x for x in sys.path if x not in path]
        sys.path[:] = path
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], '__file__', None) or ''
            if any(file.startswith(f'{folder}/') for folder in added):
                del sys.modules[name]


def write_examples(folder):
    """Write the files of docs/extending.md."""
    folder.mkdir()
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    return folder
