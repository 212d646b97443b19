"""Config files that nobody should have written: each ends in one line, soon."""

from datetime import date

import pytest

from config import load_config
from engine.config_tree import MAX_BASE_FILES, ConfigError, get, task_of_file
from tests.helpers.paths import TINY
from text_files import MAX_YAML_BYTES, MAX_YAML_VALUES, read_yaml
from tools.study.plan import MAX_BASES, StudyError, read_study
from utils import UserError


def multiplied(start, link):
    """Twelve anchors, each with the value before it nine times."""
    lines = [f'a0: &a0 {start}']
    return '\n'.join(lines + [f'a{i}: &a{i} {link(", ".join([f"*a{i - 1}"] * 9))}' for i in range(1, 12)])


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (multiplied('[x]', '[{}]'.format), f', line 6: more than {MAX_YAML_VALUES:,} values'),
        (multiplied('{x: 1}', '{{<<: [{}]}}'.format), f', line 6: more than {MAX_YAML_VALUES:,} values'),
        ('TRAIN: &a {EPOCHS: *a}', ', line 1: a value holds itself, by an alias'),
        ('[' * 10_000, ', line 1: more than 50 levels'),
        ('- ' * 10_000, ', line 1: more than 50 levels'),
        ('TAG: a\nTRAIN:\n  EPOCHS: 3\n  SEED: 1\n  EPOCHS: 4', ', line 5: EPOCHS is given in line 3 too: remove one'),
        ('{TAG: a, TAG: a}', ', line 1: TAG is given in line 1 too: remove one'),
        ('TRAIN: {EPOCHS: 3}\nTRAIN.EPOCHS: 4', ' gives TRAIN.EPOCHS twice: remove one'),
        ('SEED: 1\n---\nSEED: 2', ' is not YAML, line 2: expected a single document'),
        ('TAG: !!python/name:os.system', ' is not YAML, line 1: could not determine a constructor for the tag'),
        ('TRAIN:\n\tEPOCHS: 3', r" is not YAML, line 2: .* character '\\t' that cannot start any token"),
        ('SEED: !!int x', ' is not YAML: invalid literal for int'),
        ('SEED: !!bool x', " is not YAML: 'x'"),
        ('SEED: !!timestamp x', ' is not YAML: '),
        ('TAG: caf\xe9'.encode('latin-1'), ' is not YAML: .*: save it as UTF-8'),
        (b'TAG: \x00', ' is not YAML: unacceptable character #x0000'),
        ('#' * (MAX_YAML_BYTES + 1), f' is larger than {MAX_YAML_BYTES:,} bytes'),
        ('? [TAG, SEED]\n: 3', ' is not YAML, line 1: .*unhashable key'),
    ],
)
def test_yaml_that_is_not_taken_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / 'bad.yaml'
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=f'^config file {path}{message}') as error:
        load_config(path)
    assert len(str(error.value)) < 600
    assert '\n' not in str(error.value)


def test_aliases_that_multiply_little_are_read(tmp_path):
    (tmp_path / 'good.yaml').write_bytes('\ufeffa: &a {x: 1, y: [2, 3]}\nb: {<<: *a, x: *a}'.encode())
    expected = {'x': 1, 'y': [2, 3]}
    assert read_yaml(tmp_path / 'good.yaml', 'file', UserError) == {'a': expected, 'b': {'x': expected, 'y': [2, 3]}}


def test_yaml_as_text_keeps_what_is_written(tmp_path):
    (tmp_path / 'a.yaml').write_text('[010, 12:30, no, 1.10, 2024-01-02, 1e-3, null, ~, "null"]')
    values = read_yaml(tmp_path / 'a.yaml', 'file', UserError)
    assert values == [8, 750, False, 1.1, date(2024, 1, 2), '1e-3', None, None, 'null']
    as_text = read_yaml(tmp_path / 'a.yaml', 'file', UserError, as_text=True)
    assert as_text == ['010', '12:30', 'no', '1.10', '2024-01-02', '1e-3', None, None, 'null']


@pytest.mark.parametrize(
    ('key', 'written', 'value'),
    [
        ('TAG', '010', '010'),
        ('TAG', '12:30', '12:30'),
        ('TAG', 'no', 'no'),
        ('TAG', '1.10', '1.10'),
        ('TAG', '2024-01-02', '2024-01-02'),
        ('TAG', '"2024"', '2024'),
        ('TAG', '>\n  a\n  b\n', 'a b'),
        ('TRAIN.BASE_LR', '1e-3', 1e-3),
        ('TRAIN.BASE_LR', '.5', 0.5),
        ('TRAIN.EPOCHS', '1_000', 1000),
        ('TRAIN.EPOCHS', '+7', 7),
        ('TEST.CROP', 'off', False),
        ('TEST.CROP', 'Yes', True),
        ('MODEL.MSG.QK_SCALE', 'null', None),
        ('MODEL.MSG.QK_SCALE', 'None', None),
        ('AUG.SCALE', '[5e-1, 1]', (0.5, 1.0)),
    ],
)
def test_values_are_read_by_the_type_of_their_key(tmp_path, key, written, value):
    (tmp_path / 'c.yaml').write_text(f'BASE: [{TINY}]\n{key}: {written}')
    read = get(load_config(tmp_path / 'c.yaml'), key, 'test')
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ('written', 'message'),
    [
        ('TRAIN.EPOCHS: 010', "TRAIN.EPOCHS is '010': write an integer"),
        ('TRAIN.EPOCHS: 1:30', "TRAIN.EPOCHS is '1:30': write an integer"),
        ('TRAIN.EPOCHS: 1e3', 'TRAIN.EPOCHS is 1000.0: write an integer'),
        ('TRAIN.EPOCHS: 2024-01-02', "TRAIN.EPOCHS is '2024-01-02': write an integer"),
        (f'TRAIN.EPOCHS: 0x{"f" * 5000}', "TRAIN.EPOCHS is '0xf+[.]+: write an integer"),
        (f'TRAIN.BASE_LR: {"9" * 1000}', "TRAIN.BASE_LR is '9+[.]+: write a number"),
        ('TRAIN.BASE_LR: .inf', "TRAIN.BASE_LR is '.inf': write a number"),
        ('TRAIN.BASE_LR: 1e999', 'TRAIN.BASE_LR is inf: write a number'),
        ('TRAIN.BASE_LR: .nan', "TRAIN.BASE_LR is '.nan': write a number"),
        ('TEST.CROP: 1', 'TEST.CROP is 1: write True or False'),
        ('TAG:', 'TAG is None: write text on one line'),
        ('TAG: [a]', r"TAG is \['a'\]: write text"),
        ('TAG: "a\\0b"', r"TAG is 'a\\x00b': write text on one line"),
        ('AUG.SCALE: [yes, no]', r"AUG.SCALE is \['yes', 'no'\]: write a list"),
        ('MODEL.MSG.DEPTHS: [2, 010]', r"DEPTHS is \['2', '010'\]: write a list"),
        (f'TRAIN.EPOCHS: {"(" * 5000}', "TRAIN.EPOCHS is '[(]+[.]+: write an integer"),
    ],
)
def test_values_of_another_type_are_refused(tmp_path, written, message):
    (tmp_path / 'c.yaml').write_text(f'BASE: [{TINY}]\n{written}')
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / 'c.yaml')


def test_files_that_include_each_other_again_and_again_are_refused(tmp_path):
    for i in range(25):
        (tmp_path / f'{i}.yaml').write_text(f'BASE: [{i + 1}.yaml, {i + 1}.yaml]')
    (tmp_path / '25.yaml').write_text('SEED: 1')
    (tmp_path / 'common.yaml').write_text('BASE: [25.yaml]')
    (tmp_path / 'twice.yaml').write_text('BASE: [common.yaml, 25.yaml, common.yaml]')
    assert load_config(tmp_path / 'twice.yaml').SEED == 1
    for read in (load_config, task_of_file):
        with pytest.raises(ConfigError, match=f'is one of more than {MAX_BASE_FILES} BASE files: write fewer'):
            read(tmp_path / '0.yaml')


def test_studies_on_too_many_bases_are_refused(tmp_path):
    for i in range(MAX_BASES + 5):
        (tmp_path / f'{i}.yaml').write_text(f'base: {i + 1}.yaml')
    with pytest.raises(StudyError, match=f'is its own base, or one of more than {MAX_BASES}'):
        read_study(tmp_path / '0.yaml')
    (tmp_path / '0.yaml').write_text('base: ../nowhere/b.yaml')
    with pytest.raises(StudyError, match='nowhere/b.yaml: No such file'):
        read_study(tmp_path / '0.yaml')
    (tmp_path / '0.yaml').write_text('seeds: [0]\nseeds: [1]')
    with pytest.raises(StudyError, match='line 2: seeds is given in line 1 too'):
        read_study(tmp_path / '0.yaml')
