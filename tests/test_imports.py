"""The rooms: imports go one way, modules import alone."""

import ast
import os
import re
import signal
import subprocess
import sys
from functools import partial
from graphlib import TopologicalSorter

import pytest

import startup
from tests.helpers.paths import ROOT
from tests.helpers.processes import environment

PACKAGES = ('data', 'detection', 'engine', 'models', 'tools')
FILES = [*ROOT.glob('*.py'), *(path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))]


def module_name(path):
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


MODULES = {module_name(path): path for path in FILES}

# Modules of the project that a room may import, in addition to its own.
ALLOWED = {
    'startup': (),
    'utils': (),
    'extensions': ('utils',),
    'text_files': ('utils',),
    'models': (),
    'lr_scheduler': (),
    'optimizer': ('models',),
    'trackers': ('extensions', 'utils'),
    'logger': ('trackers', 'utils'),
    'data': ('extensions', 'text_files', 'utils'),
    'engine': ('data.samplers', 'extensions', 'logger', 'text_files', 'trackers', 'utils'),
    'config': (
        'data.losses',
        'data.mixup',
        'data.python_dataset',
        'data.transforms',
        'engine.config_keys',
        'engine.config_tree',
        'models',
        'optimizer',
        'trackers',
    ),
    'evaluation': ('data', 'engine', 'evaluation_report', 'models'),
    'evaluation_report': ('data', 'engine', 'text_files', 'utils'),
    'distillation': ('data', 'engine', 'extensions', 'models', 'utils'),
    'main': (
        'config',
        'data',
        'distillation',
        'engine',
        'evaluation',
        'lr_scheduler',
        'models',
        'optimizer',
        'startup',
        'tools.benchmark.throughput',
        'utils',
    ),
    'detection': (
        'config',
        'data',
        'engine',
        'logger',
        'startup',
        'models',
        'optimizer',
        'text_files',
        'tools.benchmark.throughput',
        'tools.duplicates',
        'utils',
    ),
    'tools': ('config', 'data', 'detection', 'engine', 'logger', 'main', 'models', 'startup', 'text_files', 'utils'),
}


def imported_names(path):
    """Dotted names that a file imports anywhere in it; relative ones made absolute."""
    package = module_name(path).split('.')
    if path.name != '__init__.py':
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            origin = base if node.level else node.module
            yield from (f'{origin}.{alias.name}' for alias in node.names)


def imports(path):
    """The project's own modules that a file imports."""
    modules = set()
    for name in imported_names(path):
        for candidate in (name, name.rpartition('.')[0]):
            if candidate in MODULES:
                modules.add(candidate)
                break
    return modules


def is_allowed(room, name):
    return any(name == prefix or name.startswith(f'{prefix}.') for prefix in (room, *ALLOWED[room]))


def test_imports_go_one_way():
    pairs = [(module, name) for module, path in MODULES.items() for name in imports(path)]
    assert len(pairs) > 100
    assert not [pair for pair in pairs if not is_allowed(pair[0].partition('.')[0], pair[1])]


def test_no_circles():
    graph = {module: imports(path) - {module} for module, path in MODULES.items()}
    assert len(graph['main']) >= 9
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_models_import_relatively():
    names = {name for path in (ROOT / 'models').glob('*.py') for name in ast.walk(ast.parse(path.read_text()))}
    absolute = [node.module for node in names if isinstance(node, ast.ImportFrom) and node.level == 0]
    assert not [name for name in absolute if name.split('.')[0] == 'models']


# Switches of the compiler that have no public name, and one operator.
PRIVATE = {
    'models.linear': {'torch.ops.mkldnn._linear_pointwise'},
    'tools.benchmark.cases': {'torch._dynamo.config', 'torch._inductor.config'},
    'tools.export.formats': {'torch.fx.experimental._config'},
}


def private_names(path, library):
    """Names of a library's private parts that a file imports or reaches through attributes."""
    attributes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute))
    names = {*imported_names(path), *map(ast.unparse, attributes)}
    parts = {name: name.split('.') for name in names if name.startswith(f'{library}.')}
    return {name for name in parts if any(re.match('_[^_]', part) for part in parts[name])}


def test_private_parts_of_torch_are_not_used():
    used = {module: private_names(path, 'torch') for module, path in MODULES.items()}
    assert {module: names for module, names in used.items() if names} == PRIVATE


def test_private_parts_of_torchvision_are_imported_in_one_place():
    users = {module for module, path in MODULES.items() if private_names(path, 'torchvision')}
    assert users == {'detection.models.torchvision_private'}


IMPORT = """
import importlib, sys, torch
from torch import nn
from torch.optim import optimizer
for name in sys.argv[1:]:
    before = set(sys.modules)
    importlib.import_module(name)
    hooks = [optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks]
    hooks += [nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks]
    hooks += [nn.modules.module._global_backward_hooks]
    assert not any(hooks), name
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled(), name
    for loaded in set(sys.modules) - before if {alone} else ():
        if loaded.partition('.')[0] in {packages}:
            del sys.modules[loaded]
"""


@pytest.mark.parametrize('alone', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_module_imports_and_registers_no_global_hook(alone):
    """One after the other, and each alone, which takes a minute."""
    rooms = {module.partition('.')[0] for module in MODULES}
    names = [name for name in MODULES if not name.endswith('__main__')]
    code = IMPORT.replace('{packages}', repr(rooms)).replace('{alone}', str(alone))
    command = [sys.executable, '-c', code, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_programs_end_without_a_traceback_when_interrupted_during_their_imports():
    programs = {path: path.read_text() for path in FILES if "if __name__ == '__main__':" in path.read_text()}
    assert len(programs) > 20
    call = "if __name__ == '__main__':\n    import startup\n\n    startup.before_imports()"
    for path, text in programs.items():
        first = next(node for node in ast.parse(text).body if not isinstance(node, ast.Expr))  # after the docstring
        assert ast.get_source_segment(text, first) == call, path
        assert 'with exit_on_user_error()' in text, path


INTERRUPTED = """
import os, signal
import startup
startup.before_imports()
if {imported}:
    from utils import exit_on_user_error
    with exit_on_user_error():
        os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(('imported', 'code', 'err'), [(False, -signal.SIGINT, ''), (True, 130, 'interrupted\n')])
def test_interrupts_before_and_after_the_imports(imported, code, err):
    command = [sys.executable, '-c', INTERRUPTED.format(imported=imported)]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in a shell's background ignore interrupts
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=listen)
    assert (done.returncode, done.stdout, done.stderr) == (code, '', err)


def test_user_without_a_name_gets_a_number(monkeypatch):
    def fail():
        raise KeyError('getpwuid(): uid not found: 12345')

    before = signal.getsignal(signal.SIGINT)
    try:
        monkeypatch.setattr('getpass.getuser', fail)
        monkeypatch.setenv('USER', '')
        startup.before_imports()
        assert os.environ['USER'] == str(os.getuid())
    finally:
        signal.signal(signal.SIGINT, before)
