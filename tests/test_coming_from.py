"""docs/coming_from.md: the tables name every flag and key of the other code bases, and what they name here works."""

import argparse
import json
import re
import shlex

import pytest
import timm
import torch
from torchvision.models import get_model
from yacs.config import CfgNode

import config
import main
from engine.checkpoint import CheckpointError, load_checkpoint
from engine.config_tree import get
from engine.state import TrainingState
from engine.weights import choose_weights, fit_weights, load_weights
from models import build_model
from tests.helpers.documents import code_blocks, prose
from tests.helpers.paths import ROOT, TINY

PAGE = (ROOT / 'docs' / 'coming_from.md').read_text()
OTHERS = json.loads((ROOT / 'tests' / 'fixtures' / 'flags_of_others.json').read_text())

# The section of each code base
SECTIONS = {
    'hustvl/MSG-Transformer': "The authors' MSG-Transformer",
    'microsoft/Swin-Transformer': 'Swin-Transformer',
    'huggingface/pytorch-image-models': 'timm',
    'pytorch/vision': 'torchvision',
}


def section(title, text=PAGE, level=2):
    """The text below a heading, up to the next one of its level."""
    marks = '#' * level
    found = re.search(rf'^{marks} {re.escape(title)}$\n(.*?)(?=^{marks} |\Z)', text, re.DOTALL | re.MULTILINE)
    assert found, title
    return found[1]


def table(repository, file):
    """Rows (theirs, here, remark) of the table of one file of a code base; headings of groups are left out."""
    text = section(SECTIONS[repository])
    title = re.search(rf'^### ((?:Flags|Keys) of `{re.escape(file)}`.*)$', text, re.MULTILINE)
    rows = [line.strip('| ').split(' | ') for line in section(title[1], text, 3).splitlines() if line[:3] == '| `']
    assert all(len(row) in (2, 3) for row in rows), rows  # an empty remark is stripped
    return [(row[0], row[1].removesuffix(' |'), (row[2] if len(row) == 3 else '').strip()) for row in rows]


def names(cell, known):
    """The names in a cell; `--naflex-*` is all of those known that start so."""
    found = re.findall(r'`([^`]+)`', cell)
    return [name for x in found for name in ([k for k in known if k.startswith(x[:-1])] if x[-1] == '*' else [x])]


FILES = [(repository, file) for repository, files in OTHERS.items() for file in files]
OUR_FLAGS = {'--cfg', *(flag for key in config.TREE.keys.values() for flag in key.flag.split()), '--opts', '--import'}
# Settings in the column `here`, with the remarks of their rows
CELLS = {}
for _place in FILES:
    for _, _here, _remark in table(*_place):
        if _here.startswith('`'):
            CELLS.setdefault(_here.strip('`'), []).append(_remark)


@pytest.mark.parametrize(('repository', 'file'), FILES)
def test_tables_name_every_flag_and_key_once(repository, file):
    known = OTHERS[repository][file]['names']
    named = [name for theirs, _, _ in table(repository, file) for name in names(theirs, known)]
    assert sorted(named) == sorted(known)


@pytest.mark.parametrize(('repository', 'file'), FILES)
def test_rows_say_what_to_write_or_why_not(repository, file):
    known = OTHERS[repository][file]['names']
    for theirs, here, remark in table(repository, file):
        if here == 'same':
            assert set(names(theirs, known)) <= {*config.TREE.keys, *OUR_FLAGS}, theirs
        elif here == '—':
            assert remark.startswith(('Not needed', 'Not available')), theirs
        else:
            assert re.fullmatch('`[^`]+`', here), theirs


def load(cell):
    """The config of a cell, and the name of the last key in it; None where the cell sets a flag."""
    words = shlex.split(cell)
    arguments = words if words[0].startswith('--') else ['--opts', *words]
    args = main.parse_option(['--cfg', str(ROOT / 'configs' / 'msg_tiny_p4_win7_224.yaml'), *arguments])
    return config.get_config(args), None if words[0].startswith('--') else words[-2]


@pytest.mark.parametrize('cell', sorted(CELLS))
def test_settings_load_and_defaults_are_as_said(cell, monkeypatch):
    if 'MODEL.TIMM_ARGS' not in cell:  # which only the network can check
        monkeypatch.setattr(config, 'check_network', lambda *_, **options: None)
    loaded, name = load(cell)
    default = config.TREE.keys[name].default if name else None
    for remark in CELLS[cell]:
        said = re.search(r'; here ([\d.e-]*\d|True|False|msg|adamw|bicubic|cosine)\b', remark)
        if name and re.search(r'\b[Ss]ame default', remark):
            value = get(loaded, name, '')
            assert str(value) == str(default) or value == pytest.approx(default, rel=1e-4), remark
        if name and said:
            assert said[1] == str(default) or float(said[1]) == default, remark


@pytest.mark.parametrize('repository', OTHERS)
def test_flags_and_keys_in_the_text_exist(repository):
    """Those of ours, or of the code base of the section."""
    theirs = {name for file in OTHERS[repository].values() for name in file['names']}
    text = prose(section(SECTIONS[repository]))
    for code in re.findall(r'`([^`]+)`', text):
        keys = re.findall(r'\b[A-Z][A-Z_]*(?:\.[A-Z][A-Z0-9_]*)+', code)
        flags = re.findall(r'(?<!\S)--\w[\w-]*', code)
        unknown = {*keys, *flags} - theirs - OUR_FLAGS - config.TREE.keys.keys()
        unknown -= {key[: len(name)] for name in unknown for key in theirs if key.startswith(f'{name}.')}  # groups
        assert unknown <= {'--naflex-'}, code


# Checkpoints


def made_up(repository, network):
    """A checkpoint with the entries of a code base."""
    raw = network.state_dict()
    ema = {name: value + 1 if value.is_floating_point() else value for name, value in raw.items()}
    optimizer = {'state': {}, 'param_groups': []}
    if repository in ('hustvl/MSG-Transformer', 'microsoft/Swin-Transformer'):
        node = CfgNode({'MODEL': CfgNode({'TYPE': 'msg', 'NAME': 'msg_tiny'}), 'AMP_OPT_LEVEL': 'O1'})
        return {
            'model': raw, 'optimizer': optimizer, 'lr_scheduler': {}, 'max_accuracy': 80.9, 'epoch': 299,
            'config': node, 'amp': {'loss_scaler0': {'loss_scale': 2.0, 'unskipped': 0}},
        }  # fmt: skip
    if repository == 'pytorch/vision':
        averaged = {'n_averaged': torch.tensor(7), **{f'module.{name}': value for name, value in ema.items()}}
        return {
            'model': raw, 'model_ema': averaged, 'optimizer': optimizer, 'lr_scheduler': {'last_epoch': 3}, 'epoch': 3,
            'args': argparse.Namespace(lr=0.5, model='resnet18'), 'scaler': {'scale': 2.0},
        }  # fmt: skip
    return {
        'epoch': 3, 'arch': 'resnet18', 'optimizer': optimizer, 'version': 2, 'args': argparse.Namespace(lr=0.5),
        'amp_scaler': {'scale': 2.0}, 'state_dict': {f'module.{name}': value for name, value in raw.items()},
        'state_dict_ema': ema, 'metric': 81.0, 'saver': {'checkpoint_files': [('a', 1.0)], 'pending': (3, 81.0)},
    }  # fmt: skip


@pytest.fixture(scope='module')
def network():
    return build_model(config.load_config(TINY))


@pytest.mark.parametrize('repository', ['hustvl/MSG-Transformer', 'huggingface/pytorch-image-models', 'pytorch/vision'])
def test_checkpoints_of_others_load(repository, network, tmp_path):
    torch.save(made_up(repository, network), tmp_path / 'checkpoint.pth.tar')
    checkpoint = load_checkpoint(tmp_path / 'checkpoint.pth.tar')
    other = build_model(config.load_config(TINY))
    for choice in ('raw', 'ema') if 'model_ema' in checkpoint else ('raw',):
        weights, _ = choose_weights(checkpoint, 'file', choice)
        load_weights(other, {'model': fit_weights(other, weights, 'file')[0]}, 'file')
        shift = choice == 'ema'
        for ours, theirs in zip(other.parameters(), network.parameters(), strict=True):
            assert torch.equal(ours, theirs + shift)
    assert ('model_ema' in checkpoint) == (repository != 'hustvl/MSG-Transformer')
    if repository != 'hustvl/MSG-Transformer':
        with pytest.raises(CheckpointError, match='has no max_accuracy, .*start a new run with --pretrained'):
            TrainingState.load_state_dict(None, checkpoint, 0, 1)


@pytest.mark.parametrize('name', ['resnet18', 'wide_resnet50_2', 'densenet121'])
def test_networks_of_torchvision_have_the_names_of_timm(name):
    with torch.device('meta'):
        theirs, ours = get_model(name).state_dict(), timm.create_model(name).state_dict()
    assert {key: value.shape for key, value in theirs.items()} == {key: value.shape for key, value in ours.items()}


def test_checkpoints_of_swin_are_converted_as_described(tmp_path, monkeypatch):
    """With a small network, whose weights get the names of Swin's code."""
    monkeypatch.chdir(tmp_path)
    name = 'swin_tiny_patch4_window7_224'
    size = {'embed_dim': 8, 'depths': (1, 1), 'num_heads': (1, 2), 'img_size': 32, 'window_size': 4}
    small = timm.create_model(name, **size)
    theirs = {
        re.sub(r'layers.(\d+).downsample', lambda found: f'layers.{int(found[1]) - 1}.downsample', key): value
        for key, value in small.state_dict().items()
    }
    theirs = {key.replace('head.fc.', 'head.'): value for key, value in theirs.items()}
    theirs['layers.0.blocks.0.attn.relative_position_index'] = torch.zeros(16, 16, dtype=torch.long)
    torch.save(made_up('microsoft/Swin-Transformer', small) | {'model': theirs}, f'{name}.pth')

    code = next(iter(code_blocks(section(SECTIONS['microsoft/Swin-Transformer']), 'py')))
    monkeypatch.setattr(timm, 'create_model', lambda _: small)
    exec(code, {})
    converted = load_checkpoint('swin_tiny.pth')['model']
    assert converted.keys() == small.state_dict().keys() != theirs.keys()
    assert all(torch.equal(value, converted[key]) for key, value in small.state_dict().items())
