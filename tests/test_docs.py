"""README and docs: links lead somewhere, commands parse, documented counts and keys are those of the code."""

import argparse
import importlib
import re
import subprocess
import sys
import timeit

import pytest
import torch
from torch.distributed.run import get_args_parser

import config
import detection.config
import detection.main
import main
from tests.helpers.documents import DOCUMENTS, anchors, code_blocks, commands, links, prose, relative, words
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_here
from tools import list_config

README = (ROOT / 'README.md').read_text()
NOT_KEYS = {
    'WANDB_PROJECT',
    'MLFLOW_TRACKING_URI',
    'MLFLOW_EXPERIMENT_NAME',
    'CUDA_VISIBLE_DEVICES',
    'GLIBC_TUNABLES',
    'LOCAL_RANK',
    'MASTER_ADDR',
    'MASTER_PORT',
    'NCCL_SOCKET_IFNAME',
    'MSG_CPU_LINEAR',
    'OMP_NUM_THREADS',
    'SLURM_CPUS_PER_TASK',
}
CONFIGS = sorted([*ROOT.glob('configs/*.yaml'), *ROOT.glob('detection/configs/*.yaml')])


class ParsedError(Exception):
    """A program has read its command line."""


def parse_with_program(module, arguments, monkeypatch):
    """Run a program until its command line is read."""
    for name in ('parse_args', 'parse_intermixed_args'):
        parse = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(self, args=None, namespace=None, parse=parse):
            parse(self, args, namespace)
            raise ParsedError

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)
    monkeypatch.setattr(sys, 'argv', [module.__name__, *arguments])
    with pytest.raises(ParsedError):
        module.main()


def check_python(arguments, monkeypatch):
    """Parse the arguments of `python` with the program they name; training programs load the whole config."""
    script, *rest = arguments
    if script == 'main.py':
        config.get_config(main.parse_option(rest))
    elif script == '-m' and rest[0] == 'detection.main':
        detection.config.get_config(detection.main.parse_option(rest[1:]))
    elif script == '-m' and rest[0] == 'torch.distributed.launch':
        check_launcher(rest[1:], monkeypatch)
    elif script == '-m' and rest[0] == 'timeit':
        with torch.no_grad():  # restores the grad mode
            timeit.main(['-n', '1', '-r', '1', *rest[1:]])
    elif script == '-m' and rest[0] == 'venv':
        pass
    else:
        assert script == '-m', arguments
        name, *rest = rest
        package = ROOT / name.replace('.', '/')
        module = importlib.import_module(f'{name}.__main__' if package.is_dir() else name)
        for argument in rest:
            assert '*' not in argument or list(ROOT.glob(argument)), argument
        parse_with_program(module, rest, monkeypatch)


def check_launcher(arguments, monkeypatch):
    """Parse torchrun's arguments, then those of the program."""
    args = get_args_parser().parse_args(arguments)
    check_python(['-m'] * args.module + [args.training_script, *args.training_script_args], monkeypatch)


def check_command(command, monkeypatch):
    """Assert that a command parses."""
    program, *arguments = words(command)
    if program in ('python', 'python3', sys.executable):
        check_python(arguments, monkeypatch)
    elif program == 'torchrun':
        check_launcher(arguments, monkeypatch)
    elif program == 'make':
        done = subprocess.run(['make', '--dry-run', *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif program == 'sbatch':
        (script,) = (word for word in arguments if word.endswith('.sbatch'))  # after options of sbatch
        assert (ROOT / script).exists()
        check_python(['main.py', *arguments[arguments.index(script) + 1 :]], monkeypatch)
    elif program.endswith('pip'):
        assert arguments[0] == 'install'
        assert arguments[1:] == ['.'] or (arguments[1] == '-r' and (ROOT / arguments[2]).exists())
    elif program in ('bash', 'source'):
        assert arguments[0] == '.venv/bin/activate' or (ROOT / arguments[0]).exists()
    else:
        assert program in ('apt-get', 'echo', 'export', 'mkdir', 'tensorboard'), f'unknown program {program}'


@pytest.mark.parametrize('document', DOCUMENTS, ids=relative)
def test_links_exist(document):
    for link in links(document.read_text()):
        path, _, anchor = link.partition('#')
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text()), link


@pytest.mark.parametrize(
    ('document', 'command'),
    [(d, command) for d in DOCUMENTS for command in commands(d.read_text()) if '~/ideas/' not in command],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_commands_parse(document, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(command, monkeypatch)


@pytest.mark.parametrize('path', CONFIGS, ids=relative)
def test_configs_open_with_model_command_hardware_and_expected_result(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    _, command, hardware, expected = path.read_text().splitlines()[:4]
    check_command(command.removeprefix('# '), monkeypatch)
    assert path.name in command or command.startswith('# make ')
    assert hardware.startswith('# Hardware: ')
    assert expected.startswith('# Expected: ')


@pytest.mark.parametrize(
    'command', ['make dmo', 'python main.py --cfg configs/none.yaml', 'python -m tools.plot --rum x']
)
def test_a_wrong_command_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, config.ConfigError)):
        check_command(command, monkeypatch)


# The code of docs/export.md runs in models/test_export, which compares the file that it writes; that of
# docs/extending.md, and its commands, in test_extending; that of docs/distillation.md in test_distillation.
ELSEWHERE = ('export.md', 'extending.md', 'distillation.md')
WITH_CODE = [d for d in DOCUMENTS if d.name not in ELSEWHERE and code_blocks(d.read_text(), 'python')]


# The import of transformers takes ten seconds.
SLOW = ('huggingface.md',)


@pytest.mark.parametrize(
    'document',
    [pytest.param(d, marks=[pytest.mark.slow] * (d.name in SLOW)) for d in WITH_CODE],
    ids=map(relative, WITH_CODE),
)
def test_python_code_runs(document):
    for block in code_blocks(document.read_text(), 'python'):
        with torch.no_grad():
            exec(block, {})


# Half of the keys in coming_from.md are of other code bases: test_coming_from reads them
@pytest.mark.parametrize('document', [d for d in DOCUMENTS if d.name != 'coming_from.md'], ids=relative)
def test_named_keys_exist(document):
    keys = {*config.TREE.keys, *detection.config.TREE.keys}
    leaves = {key.rpartition('.')[2] for key in keys}
    named = set(re.findall(r'`([A-Z][A-Z0-9]*(?:[._][A-Z0-9_]+)+)[` ]', document.read_text()))
    assert {name for name in named if '.' in name} <= keys
    assert {name for name in named if '.' not in name} - NOT_KEYS <= leaves


def test_configuration_is_generated_from_the_trees():
    written = (ROOT / 'docs' / 'configuration.md').read_text()
    assert written == list_config.document(), 'stale: python -m tools.list_config > docs/configuration.md'


CLASSIFIERS, DETECTORS = 'configs/msg_*_224.yaml', 'detection/configs/*rcnn*.yaml'
TABLES = [  # documents, the configs of a command in it, and their number
    ('docs/published.md', CLASSIFIERS, 6),
    ('docs/published.md', 'detection/configs/cascade_mask_rcnn_msg_*.yaml', 6),
    ('docs/detection.md', DETECTORS, 11),
]


@pytest.mark.slow
def test_tables_of_models_are_those_that_their_commands_print():
    counts = {}
    for configs in (CLASSIFIERS, DETECTORS):
        done = run_here('-m', 'tools.summary', *sorted(ROOT.glob(configs)))
        row = r'^\| (\S+) \| \d+ x \d+ \| ([\d,]+) \| ([\d,]*) *\| ([\d,]+) \|$'
        for name, parameters, formula, measured in re.findall(row, done.stdout, re.MULTILINE):
            multiply_adds = formula or f'{int(measured.replace(",", "")) / 1e9:.1f}G'
            counts[f'{name}.yaml'] = (parameters, multiply_adds)
    for document, configs, rows in TABLES:
        text = (ROOT / document).read_text()
        assert f'python -m tools.summary {configs}' in commands(text)
        names = [path.name for path in ROOT.glob(configs)]
        assert len(names) == rows
        written = re.findall(r'\| `(\w+\.yaml)` \| ([\d,]+) \| ([\d,.]+G?) \|', text)
        assert {name: tuple(row) for name, *row in written if name in names} == {name: counts[name] for name in names}

    millions = {name: int(parameters.replace(',', '')) / 1e6 for name, (parameters, _) in counts.items()}
    billions = {
        name: float(value[:-1]) if value.endswith('G') else int(value.replace(',', '')) / 1e9
        for name, (_, value) in counts.items()
    }
    rounded = re.findall(r'\| `(\w+\.yaml)` \| ([\d.]+) M \| ([\d.]+) G \|', README)
    assert {name: tuple(row) for name, *row in rounded} == {
        path.name: (f'{millions[path.name]:.1f}', f'{billions[path.name]:.2f}') for path in ROOT.glob(CLASSIFIERS)
    }
    published = (ROOT / 'docs' / 'published.md').read_text()
    published = re.findall(r'`(\w+\.yaml)` \| [\d,]+ \| [\d,.]+G? \| (\d+)M \| ([\d.]+)G', published)
    assert len(published) == 12
    for name, parameters, multiply_adds in published:
        assert int(parameters) == pytest.approx(millions[name], abs=0.5), name
        assert float(multiply_adds) == pytest.approx(billions[name], rel=2e-3, abs=0.1), name


def test_published_accuracies_are_the_same_everywhere():
    """In README, in docs/published.md and in the head of each config."""
    text = (ROOT / 'docs' / 'published.md').read_text()
    tables = [
        (r'`(msg_\w+\.yaml)`.* \| ([\d.]+ %) \|', 'configs', '# Expected: {} top-1 on ImageNet-1K, by the '),
        (r'`(cascade\w+\.yaml)`(?: \|[^|]+){4} \| ([\d.]+) \|', 'detection/configs', '# Expected: {} box AP, '),
    ]
    for pattern, folder, head in tables:
        rows = re.findall(pattern, text)
        assert len(rows) == 6
        for name, value in rows:
            assert head.format(value) in (ROOT / folder / name).read_text(), name
            assert folder != 'configs' or re.search(rf'`{name}` .* \| {value} \|', README), name


def test_readme_is_a_front_page():
    unlinked = [path.name for path in ROOT.glob('docs/*.md') if f'docs/{path.name}' not in links(prose(README))]
    assert not unlinked
