"""What a study trains: variants of one config, and seeds."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from engine.task import Task
from text_files import read_yaml
from tools.tasks import TASKS
from utils import UserError, shortened

KEYS = {'config', 'reference', 'seeds', 'variants'}
OPTIONAL = {'comparisons', 'further_references', 'options', 'task'}
MAX_BASES = 20  # of a study, one the base of the next


class StudyError(UserError):
    """A study that cannot be run or read; the message says what to write."""


@dataclass(frozen=True)
class Variant:
    """A network or recipe of a study.

    Attributes:
        label: what tables and charts call it.
        options: config keys and values, over those of the study's config.
    """

    label: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A study file.

    Attributes:
        name: of the file, without suffix.
        cfg_file: the config that all variants share.
        reference: the variant that others are compared with.
        seeds: those of the file.
        variants: by name, in the order of tables.
        comparisons: pairs of variants, whose difference is reported.
        further_references: variants that Dunnett's test takes as references, next to `reference`.
        task: what is trained.
    """

    name: str
    cfg_file: Path
    reference: str
    seeds: list[int]
    variants: dict[str, Variant]
    comparisons: list[tuple[str, str]]
    further_references: list[str]
    task: Task

    @property
    def metric_name(self) -> str:
        """What tables and charts call the metric."""
        return {'acc1': 'top-1'}.get(self.task.metric, self.task.metric_name)

    def options(self, variant: str, seed: int, opts: Sequence[str] = ()) -> list[str]:
        """A run's config keys and values, as for `--opts`; `opts` override those of the variant."""
        own = self.variants[variant].options
        pairs = [text for key, value in own.items() for text in (key, str(value))]
        return [*pairs, *opts, 'MODEL.NAME', variant, 'TAG', f'seed{seed}', 'SEED', str(seed)]

    def config(self, variant: str, seed: int, opts: Sequence[str] = ()) -> CfgNode:
        """A run's config, checked.

        Raises:
            ConfigError: it cannot work.
            StudyError: it has another metric than the study's task.
        """
        config = self.task.tree.load(self.cfg_file, self.options(variant, seed, opts))
        if config.DATA.get('MULTI_LABEL'):
            raise StudyError(f'variant {variant}: studies compare {self.metric_name}: write DATA.MULTI_LABEL False')
        return config

    def select_variants(self, names: Sequence[str] | None) -> list[str]:
        """The variants of these names, or all.

        Raises:
            StudyError: one does not exist.
        """
        for name in names or ():
            if name not in self.variants:
                raise StudyError(f'no variant {name} in the study: write one of {", ".join(self.variants)}')
        return list(dict.fromkeys(names or self.variants))


def read_study(path: Path) -> Study:
    """Read a study file.

    It has the keys `config`, `reference`, `seeds` and `variants`, and may have `comparisons`, `further_references`,
    `options` of all variants, and a `task`.

    `base` names a study file whose keys this one overrides, relative to it. Variants are merged by name.

    Raises:
        StudyError: it cannot be read, or lacks something.
    """
    content = _read(path)
    if not KEYS <= content.keys() <= KEYS | OPTIONAL:
        raise StudyError(f'study {path}: write the keys {", ".join(sorted(KEYS))}, as in configs/studies/')
    variants, shared = {}, _options(content, f'study {path}')
    for name, entry in content['variants'].items():
        label = f'study {path}, variant {shortened(name)}'
        if not re.fullmatch(r'[\w-]+', str(name)):
            raise StudyError(f'{label}: write a name of letters, digits, _ and -, as it names a folder')
        if not isinstance(entry, Mapping) or not {'label'} <= entry.keys() <= {'label', 'options'}:
            raise StudyError(f'{label}: write its label and, if it has any, its options')
        variants[str(name)] = Variant(str(entry['label']).replace('|', '/'), shared | _options(entry, label))
    reference, seeds = str(content['reference']), content['seeds']
    if reference not in variants:
        raise StudyError(f'study {path}: reference {shortened(reference)} is none of its variants')
    if not isinstance(seeds, list) or not seeds or not all(re.fullmatch(r'[0-9]{1,9}', str(seed)) for seed in seeds):
        raise StudyError(f'study {path}: seeds is {shortened(seeds)}: write a list such as [0, 1, 2]')
    comparisons = content.get('comparisons') or []
    if not isinstance(comparisons, list) or not all(_is_pair(pair, variants) for pair in comparisons):
        raise StudyError(f'study {path}: comparisons is {shortened(comparisons)}: write a list of pairs of variants')
    further = content.get('further_references') or []
    if not isinstance(further, list) or not {*map(str, further)} <= variants.keys() - {reference}:
        raise StudyError(
            f'study {path}: further_references is {shortened(further)}: write a list of variants, without the reference'
        )
    task = content.get('task', 'classification')
    if not isinstance(task, str) or task not in TASKS:
        raise StudyError(f'study {path}: task is {shortened(task)}: write {" or ".join(TASKS)}')
    return Study(
        name=path.stem,
        cfg_file=content['config'],
        reference=reference,
        seeds=[int(seed) for seed in seeds],
        variants=variants,
        comparisons=[(str(name), str(other)) for name, other in comparisons],
        further_references=[*dict.fromkeys(map(str, further))],
        task=TASKS[task],
    )


def _is_pair(pair: Any, variants: Mapping[str, Variant]) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(str(name) in variants for name in pair)


def _options(entry: Mapping[str, Any], label: str) -> dict[str, Any]:
    options = entry.get('options') or {}
    if not isinstance(options, Mapping):
        raise StudyError(f'{label}: options is {shortened(options)}: write config keys and values')
    return dict(options)


def _read(path: Path, *readers: Path) -> dict[str, Any]:
    """The keys of a study file and its base; `readers` have this one as their base."""
    if path in readers or len(readers) > MAX_BASES:
        raise StudyError(f'study {path} is its own base, or one of more than {MAX_BASES}: remove it there')
    content = read_yaml(path, f'study {path}', StudyError, as_text=True)
    if not isinstance(content, Mapping) or not isinstance(content.get('variants', {}), Mapping):
        raise StudyError(f'study {path}: write the keys {", ".join(sorted(KEYS))}, as in configs/studies/')
    content = dict(content)
    if 'config' in content:  # relative to the file that names it
        content['config'] = path.parent / os.path.expanduser(str(content['config']))
    if 'base' not in content:
        return content
    base = _read(path.parent / os.path.expanduser(str(content['base'])), *readers, path)
    variants = base.get('variants', {}) | content.get('variants', {})
    return base | {key: value for key, value in content.items() if key != 'base'} | {'variants': variants}
