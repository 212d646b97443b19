"""Teachers and distillation losses; docs/distillation.md as written. For exact resuming: tests/helpers/recipes.py."""

import hashlib
import math
import re
import shutil
from unittest import mock

import pytest
import timm
import torch
from torch import nn
from torchvision.transforms import Normalize

import distillation
import main as program
from data.transforms import mean_and_std
from distillation import (
    TEACHERS,
    TeacherError,
    build_distillation,
    build_teacher,
    hard_distillation,
    register_teacher,
    soft_distillation,
)
from engine.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from engine.experiment import ExperimentError
from engine.weights import hash_weights
from extensions import import_modules
from models import build_model
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.documents import commands, words
from tests.helpers.extensions import examples_in, forgotten_modules
from tests.helpers.images import write_images
from tests.helpers.paths import ROOT, TINY
from tests.helpers.processes import run_here
from tests.helpers.runs import assert_same_weights, build_run, folder_of, last_checkpoint, log_of, records

PAGE = (ROOT / 'docs' / 'distillation.md').read_text()
NAMES = ['class_0', 'class_1', 'class_2']


class Channels(nn.Module):
    """A teacher whose logits are sums of the channels' means."""

    def __init__(self, config=None, classes=NAMES, **attributes):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.dropout = nn.Dropout(0.5)
        self.classes = classes
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, images):
        self.images = images
        return self.dropout(images.mean(dim=(2, 3)) @ self.weight)


@pytest.fixture
def build(tiny_config):
    """A function that builds a run with its teacher; a module is registered as `mine`."""

    def build(network=None, **options):
        options = {'DISTILL__TEACHER': 'mine'} | options if network is not None else options
        run = build_run(tiny_config(**options))
        with mock.patch.dict(TEACHERS, mine=lambda config: network):
            return run._replace(teacher=build_teacher(run, program.TASK))

    return build


def test_losses_are_those_of_the_papers():
    logits, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(soft_distillation(logits, teacher, 2.0), expected)
    assert soft_distillation(teacher, teacher, 3.0).abs() < 1e-6
    expected = -logits.log_softmax(1)[range(4), teacher.argmax(1)].mean()
    torch.testing.assert_close(hard_distillation(logits, teacher), expected)


@pytest.mark.parametrize(('kind', 'classes'), [('soft', ''), ('hard', '[class_2, 0, 1]')])
def test_losses_by_name(build, kind, classes):
    run = build(Channels(), DISTILL__KIND=kind, DISTILL__WEIGHT='0.25', DISTILL__CLASSES=classes)
    logits, images = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, 28, 28)
    losses = build_distillation(run, NAMES)(torch.tensor(2.0), logits, images)
    teacher = images.mean(dim=(2, 3))[:, [2, 0, 1] if classes else [0, 1, 2]]
    distil = soft_distillation(logits, teacher, 1.0) if kind == 'soft' else hard_distillation(logits, teacher)
    assert losses['label_loss'] == 1.5
    torch.testing.assert_close(losses['distillation_loss'], 0.25 * distil)
    losses['distillation_loss'].backward()  # through no tensor of the inference mode
    assert logits.grad.abs().sum() > 0
    assert run.teacher.network.weight.grad is None
    assert build_distillation(run._replace(teacher=None), NAMES)(torch.tensor(2.0), logits, images) == {'loss': 2.0}


def test_the_teacher_sees_the_images_in_its_size_and_normalisation(build):
    run = build(network := Channels(input_size=(3, 20, 24), mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)))
    pixels = torch.rand(2, 3, 1, 1).expand(2, 3, 28, 28)
    run.teacher(Normalize(*mean_and_std(run.config))(pixels))
    expected = Normalize((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))(pixels)[:, :, :20, :24]
    torch.testing.assert_close(network.images, expected)
    run = build(network := Channels())
    images = torch.randn(1, 3, 28, 28)
    run.teacher(images)
    assert torch.equal(network.images, images)  # of the student's form by default


class Convolutions(nn.Module):
    """A teacher with convolutions in two and in three dimensions; only the first kind has channels last."""

    def __init__(self):
        super().__init__()
        self.plane, self.space = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 2, (1, 3, 3))

    def forward(self, images):
        return self.space(self.plane(images).unsqueeze(1)).mean(dim=(1, 3, 4))[:, :3]


def test_a_teacher_with_convolutions(build):
    network = Convolutions()
    images = torch.randn(2, 3, 28, 28)
    expected = network(images)
    run = build(network)
    assert network.plane.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(run.teacher(images), expected)


def test_classes_are_found_by_name(build):
    wordnet = ['n03888257', 'n01440764']
    teacher = build(DISTILL__TEACHER='timm:msg_transformer_nano').teacher
    assert (teacher.size, teacher.count, teacher.find_classes(wordnet)) == ((112, 112), 10, [9, 0])
    assert teacher.find_classes(['fish', 'sky'], ['n01440764', '9']) == [0, 9]
    with pytest.raises(TeacherError, match=r'cat is not among the 10 classes \(n01440764, .*\) of the teacher timm'):
        teacher.find_classes(['n01440764', 'cat'])
    with pytest.raises(TeacherError, match='10 is not among .* correct DISTILL.CLASSES'):
        teacher.find_classes(['fish'], ['10'])
    unnamed = build(Channels(classes=None)).teacher
    assert unnamed.find_classes(['a', 'b', 'c']) == [0, 1, 2]
    with pytest.raises(TeacherError, match='3 classes without names, and the data have 2: name .* DISTILL.CLASSES'):
        unnamed.find_classes(['a', 'b'])


def test_weights_of_a_timm_teacher_from_a_file(build, tmp_path):
    network = timm.create_model('test_efficientnet', num_classes=4)
    save_checkpoint(path := tmp_path / 'four.pth', {'model': network.state_dict(), 'classes': list('abcd')})
    options = {'DISTILL__TEACHER': 'timm:test_efficientnet', 'DISTILL__TEACHER_WEIGHTS': str(path)}
    teacher = build(**options).teacher
    expected = hash_weights(network.state_dict(), hashlib.sha256())
    assert teacher.identity == {'name': 'timm:test_efficientnet', 'sha256': expected}
    assert (teacher.size, teacher.find_classes(['b', 'a'])) == ((160, 160), [1, 0])
    whole = timm.create_model('test_efficientnet')
    save_checkpoint(path, whole.state_dict())
    assert build(**options).teacher.find_classes(['n01440764', 'n15075141']) == [0, 999]
    with pytest.raises(CheckpointError, match='four.pth holds a different model'):
        build(**options | {'DISTILL__TEACHER': 'timm:test_vit'})
    offline = mock.patch.object(timm, 'create_model', side_effect=OSError('no route\nto host'))
    message = r'timm:resnet18: .* cannot be fetched \(no route.*\): give a file of them with DISTILL.TEACHER_WEIGHTS'
    with offline, pytest.raises(TeacherError, match=message):
        build(DISTILL__TEACHER='timm:resnet18')
    registered_by_user = mock.patch.object(timm, 'get_pretrained_cfg', return_value=None)
    message = 'timm:resnet18: timm knows no pretrained weights of it: give a file of them with DISTILL.TEACHER_WEIGHTS'
    with registered_by_user, pytest.raises(TeacherError, match=message):
        build(DISTILL__TEACHER='timm:resnet18')


def test_mistakes_in_one_line(build, tiny_config, tmp_path):
    grey = write_checkpoint(tmp_path / 'grey.pth', tiny_config(MODEL__MSG__IN_CHANS='1'), NAMES)
    save_checkpoint(weights := tmp_path / 'weights.pth', build_model(tiny_config()).state_dict())
    for options, message in (
        ({'DISTILL__TEACHER': 'none.pth'}, 'TEACHER is none.pth: there is no such file, .* or add --import'),
        ({'DISTILL__TEACHER': 'resnet18'}, 'write timm:resnet18'),
        ({'DISTILL__TEACHER': str(grey)}, r'takes images of 1 channel\(s\), and MODEL.MSG.IN_CHANS is 3'),
        ({'DISTILL__TEACHER': str(weights)}, r'no config.*: for weights of timm, write DISTILL.TEACHER timm:<name>'),
        ({'network': 'a'}, 'the teacher mine is a str: return a torch.nn.Module'),
        ({'network': nn.Identity()}, r'mine gives a Tensor, .*, \(1, 3, 28, 28\): return logits'),
        ({'network': nn.Conv2d(1, 1, 1)}, r'does not take images of \(1, 3, 28, 28\): Given groups=1'),
        ({'network': Channels(input_size=28)}, r'the input_size 28: write \(channels, height, width\)'),
        ({'network': Channels(classes=['one'])}, 'names of 1 classes, and 3 logits'),
        ({'network': Channels(classes=3)}, 'mine has the classes 3: write a list of names'),
    ):
        with pytest.raises((TeacherError, CheckpointError), match=message) as error:
            build(**options)
        assert '\n' not in str(error.value)


def test_a_checkpoint_that_teaches_runs_no_code(build, tiny_config, tmp_path):
    path = write_checkpoint(tmp_path / 'a.pth', tiny_config(DATA__IMG_SIZE='56'), NAMES)
    content = torch.load(path)
    evil = tmp_path / 'evil.py'
    evil.write_text('raise RuntimeError')
    content['config'] |= {'IMPORT': [str(evil)], 'DISTILL': {'TEACHER': 'timm:resnet18', 'CLASSES': 'x'}}
    content['origin'] = {'kind': 'scratch', 'teacher': 'x'}
    torch.save(content, path)
    assert load_checkpoint(path)['ignored'] == ['origin (dict)']
    teacher = build(DISTILL__TEACHER=str(path)).teacher
    assert (teacher.size, teacher.classes) == ((56, 56), NAMES)
    assert not teacher.network.training
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())


@pytest.fixture
def taught(tiny_config, image_tree, tmp_path):
    """A function that trains with options; and the path of a checkpoint that can teach."""

    def train(**options):
        options = {'DATA__DATA_PATH': str(image_tree), 'SAVE_STEPS': '3', 'TRACKER': 'none'} | options
        program.main(config := tiny_config(**options))
        return config

    return train, write_checkpoint(tmp_path / 'teacher.pth', tiny_config(MODEL__MSG__EMBED_DIM='16'), NAMES)


def test_a_teacher_changes_no_random_number(taught):
    train, path = taught
    plain = train(TAG='plain', MODEL__DROP_RATE='0.2')
    silent = train(TAG='silent', MODEL__DROP_RATE='0.2', DISTILL__TEACHER=str(path), DISTILL__WEIGHT='0')
    one, two = (last_checkpoint(config) for config in (plain, silent))
    assert_same_weights(one['model'], two['model'], rtol=0, atol=0)
    record = records(silent, 'train')[-1]
    assert record['loss'] == record['label_loss'] > record['distillation_loss'] == 0
    assert 'distillation_loss' not in records(plain, 'train')[-1]


def test_a_run_continues_with_its_teacher_alone(taught, tmp_path):
    train, path = taught
    options = {'DISTILL__TEACHER': str(path), 'DISTILL__KIND': 'hard'}
    config = train(**options)
    origin = last_checkpoint(config)['origin']
    assert origin == {'kind': 'scratch', 'teacher': {'name': str(path), 'sha256': mock.ANY}}
    assert math.isfinite(records(config, 'epoch')[-1]['train_loss'])
    assert re.search(rf'teacher {path}: [\d,]+ parameters, images of 28 x 28, 3 classes', log_of(config))

    moved = str(shutil.move(path, tmp_path / 'moved.pth'))
    train(**options | {'DISTILL__TEACHER': moved})
    assert 'the run resumes bit for bit' in log_of(config)
    with pytest.raises(ExperimentError, match=f'its teacher was {path}, and now there is none; give that teacher with'):
        train()
    content = torch.load(moved)
    content['model']['head.bias'] += 1
    torch.save(content, moved)
    with pytest.raises(ExperimentError, match=f'its teacher was {path}, and now is {moved}; .*: write another --tag'):
        train(**options | {'DISTILL__TEACHER': moved})
    shutil.move(moved, path)
    with pytest.raises(ExperimentError, match=f'the weights of its teacher {path} have changed'):
        train(**options)
    first = str(folder_of(config) / 'ckpt_epoch_0.pth')
    other = train(**options, TAG='other', MODEL__RESUME=first)  # in an empty folder
    assert f'not bit for bit: the weights of its teacher {path} have changed' in log_of(other)
    assert last_checkpoint(other)['origin']['teacher']['sha256'] != origin['teacher']['sha256']
    train(TAG='plain')
    with pytest.raises(ExperimentError, match='it had no teacher, and now has .*; leave it out'):
        train(TAG='plain', **options)
    with mock.patch.object(distillation, 'load_checkpoint', side_effect=AssertionError):
        train(**options, EVAL_MODE='True', MODEL__RESUME=first)  # needs no teacher


def test_the_page_as_written(tmp_path):
    ideas, images = tmp_path / 'ideas', write_images(tmp_path / 'images', classes=3, train=4, val=1)
    ideas.mkdir()
    for split in ('train', 'val'):
        for label, name in enumerate(('n01440764', 'n02102040', 'n02979186')):
            (images / split / f'class_{label}').rename(images / split / name)
    ((name, text),) = examples_in(PAGE).items()
    (ideas / name).write_text(text)
    create, tiny = timm.create_model, 'test_efficientnet'  # in place of a network of six million weights
    weights = create(tiny).state_dict()
    torch.save({f'_{key}': value for key, value in weights.items()}, ideas / 'efficientnet-lite2-9656183e.pth')
    (command,) = [command for command in commands(PAGE) if '~/ideas/' in command]
    arguments = [str(ideas / x.removeprefix('~/ideas/')) if x.startswith('~') else x for x in words(command)[1:]]
    arguments = [{'placeholder': images}.get(x, TINY if x.startswith('configs/') else x) for x in arguments]
    options = ('TRAIN.EPOCHS', '1', 'TRAIN.WARMUP_EPOCHS', '0', 'MODEL.NUM_CLASSES', '3')
    with forgotten_modules(), mock.patch.object(timm, 'create_model', return_value=create(tiny)):
        done = run_here(*arguments, '--output', tmp_path / 'output', '--opts', *options)
        assert done.returncode == 0, done.stderr
        assert 'teacher lite2: ' in done.stdout
        assert "soft distillation of 3 of the teacher's 1000 classes" in done.stdout
        origin = load_checkpoint(next(tmp_path.glob('output/tiny/*/ckpt_best.pth')))['origin']
        assert origin['teacher']['sha256'] == hash_weights(weights, hashlib.sha256())


def test_the_teacher_of_the_model_card(build, tmp_path):
    ((name, text),) = examples_in((ROOT / 'models' / 'weights' / 'README.md').read_text()).items()
    (tmp_path / name).write_text(text)
    network = timm.create_model('test_efficientnet')  # in place of a network of six million weights
    weights = {f'_{key}': value for key, value in network.state_dict().items()}
    torch.save(weights, tmp_path / 'efficientnet-lite2-9656183e.pth')
    with forgotten_modules(), mock.patch.object(timm, 'create_model', return_value=network):
        import_modules([str(tmp_path / name)])
        teacher = build(DISTILL__TEACHER='lite2_192').teacher
    images = torch.randn(4, 3, 28, 28)
    logits = teacher(images)
    expected = network(teacher.prepare(images))
    assert (teacher.size, logits.dtype) == ((192, 192), torch.float32)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * expected.std().item())
    assert torch.equal(logits, teacher(images))


def test_names_belong_to_one_teacher():
    with mock.patch.dict(TEACHERS):
        register_teacher('channels')(Channels)
        with pytest.raises(ValueError, match=f"the teacher 'channels' is already {__name__}.Channels"):
            register_teacher('channels')(nn.Linear)
