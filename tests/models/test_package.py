"""The network outside this checkout: installed by pip, and by torch.hub."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv

import pytest

from tests.helpers.paths import ROOT, copy_sources
from tests.helpers.processes import environment

# What a user does from an empty folder: create, run, save, load.
USE = """
import warnings
from pathlib import Path
import timm, torch
import msg_transformer

assert Path(msg_transformer.__file__).parent.name == 'msg_transformer'
options = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), num_classes=3)
model = timm.create_model('msg_transformer_v2_tiny', **options).eval()
assert type(model) is msg_transformer.MSGTransformer
images = torch.randn(1, 3, 50, 70)
with torch.no_grad():
    logits = model(images)
torch.save(model.state_dict(), 'weights.pth')
other = msg_transformer.msg_transformer_v2_tiny(**options).eval()
other.load_state_dict(torch.load('weights.pth'))
with torch.no_grad():
    assert torch.equal(other(images), logits) and logits.shape == (1, 3)
nano = timm.create_model('msg_transformer_nano', pretrained=True)
assert nano.default_cfg['label_descriptions']['n03888257'] == 'parachute'
"""

# In a process with a `models` of its own.
HUB = """
import sys
import models
assert models.ANSWER == 42
import torch
repository = sys.argv[1]
options = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
model = torch.hub.load(repository, 'msg_transformer_tiny', source='local', num_classes=4, **options)
again = torch.hub.load(repository, 'msg_transformer_tiny', source='local', num_classes=4, **options)
assert type(model) is type(again)
assert model.eval()(torch.randn(1, 3, 64, 64)).shape == (1, 4)
assert models.ANSWER == 42 and sys.modules['models'] is models
assert repository not in sys.path
import runpy
entries = {name for name, value in runpy.run_path(f'{repository}/hubconf.py').items() if callable(value)}
expected = {f'msg_transformer_{v}{s}' for v in ('', 'v2_') for s in ('tiny', 'small', 'base')}
expected |= {'msg_transformer_nano'}
assert {name for name in entries if name[0] != '_'} == expected, entries
assert torch.hub.load(repository, 'msg_transformer_nano', source='local', pretrained=True).num_classes == 10
import timm
assert type(timm.create_model('msg_transformer_tiny', **options)) is type(model)
"""


def run_in(folder, code, *arguments, python=sys.executable, path=''):
    """Run code in a process started in a folder, with the network of no checkout at hand."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [python, '-c', code, *map(str, arguments)],
        cwd=folder,
        env=environment(PYTHONPATH=str(path)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_package_is_the_folder_of_models():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())
    assert project['tool']['setuptools'] == {
        'packages': ['msg_transformer'],
        'package-dir': {'msg_transformer': 'models'},
        'package-data': {'msg_transformer': ['weights/*']},
    }
    pins = dict(line.split('==') for line in (ROOT / 'requirements.txt').read_text().splitlines() if '==' in line)
    for requirement in project['project']['dependencies']:
        name, _, limits = requirement.partition('>=')
        least, _, most = limits.partition(',<')
        assert version(least) <= version(pins[name]) < version(most)


def version(text):
    return [int(part) for part in text.split()[0].split('.')]


def test_it_works_as_a_package_beside_the_models_of_a_checkout(tmp_path):
    shutil.copytree(ROOT / 'models', tmp_path / 'site' / 'msg_transformer')
    code = USE + "import models\nassert timm.create_model('msg_transformer_tiny').num_features == 768\n"
    done = run_in(tmp_path / 'empty', code, path=f'{tmp_path / "site"}:{ROOT}')
    assert 'Overwriting msg_transformer_tiny in registry' in done.stderr  # timm warns, and goes on


def test_hub_loads_it_where_the_caller_has_models_of_its_own(tmp_path):
    (tmp_path / 'models.py').write_text('ANSWER = 42\n')
    run_in(tmp_path, HUB, ROOT)


@pytest.mark.slow
def test_pip_installs_the_network_alone(tmp_path):
    """`pip install .` into a fresh environment, which borrows this one's torch and timm."""
    copy_sources(tmp_path / 'source')  # so that no build is left behind
    venv.create(tmp_path / 'venv')
    python = tmp_path / 'venv' / 'bin' / 'python'
    pip = [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', tmp_path / 'source']
    subprocess.run(pip, check=True, cwd=tmp_path, env=environment())
    (site,) = (tmp_path / 'venv' / 'lib').glob('python*/site-packages')
    (metadata,) = site.glob('msg_transformer-*.dist-info')
    assert {path.name for path in site.iterdir()} == {'msg_transformer', metadata.name}
    for pattern in ('*.py', 'weights/*'):
        installed = {path.name for path in (site / 'msg_transformer').glob(pattern)}
        assert installed == {path.name for path in (ROOT / 'models').glob(pattern)}
    run_in(tmp_path / 'empty', USE, python=python, path=sysconfig.get_path('purelib'))


def test_the_oldest_versions_are_those_of_make_test_versions():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    tested = next(line for line in (ROOT / 'Makefile').read_text().splitlines() if line.startswith('OLDEST := '))
    for requirement in project['dependencies']:
        name, lower = requirement.partition(',')[0].split('>=')
        assert any(f'{pin}.'.startswith(f'{name}=={lower}.') for pin in tested.split()), requirement
