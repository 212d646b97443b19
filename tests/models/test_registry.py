"""The networks by name: timm's public functions create, train, adapt, save and load them."""

import json
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3

from config import load_config
from models import MSGTransformer, registry
from models.layers import EMBED_TYPES
from tests.helpers.golden import GOLDEN, fill_, images, normal

NARROW = {'embed_dim': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 2, 4, 8)}
# 16 sizes (height, width), none of which windows tile.
SIZES = [(33, 57), (57, 33), (61, 90), (97, 130), (100, 100), (127, 255), (131, 64), (200, 333)]
SIZES += [(223, 225), (225, 223), (301, 77), (375, 500), (427, 640), (513, 257), (800, 1333), (1333, 800)]


def create(name='msg_transformer_tiny', **options):
    """A narrow network by name."""
    return timm.create_model(name, **NARROW | options)


def batch_of(height, width, n=1):
    return normal(f'images-{height}-{width}', (n, 3, height, width))


def test_seven_names_one_with_weights():
    assert set(timm.list_models('msg_transformer*')) == set(registry.NAMES)
    assert len(registry.NAMES) == 7
    assert timm.list_models('msg_transformer*', pretrained=True) == ['msg_transformer_nano.imagenette']
    with pytest.raises(RuntimeError, match='No pretrained weights exist for msg_transformer_tiny'):
        create(pretrained=True)


@pytest.mark.parametrize('name', registry.PUBLISHED)
def test_a_name_builds_the_published_network(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    assert type(model) is MSGTransformer
    record = GOLDEN['v2' if '_v2_' in name else 'v1', name.rpartition('_')[2]]
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert shapes == record['state_dict']
    assert model.flops() == record['flops']
    cfg = model.default_cfg
    assert (cfg['architecture'], cfg['input_size'], cfg['num_classes']) == (name, (3, 224, 224), 1000)
    assert isinstance(model.get_submodule(cfg['classifier']), torch.nn.Linear)
    assert isinstance(model.get_submodule(cfg['first_conv']), torch.nn.Conv2d)
    assert cfg['pool_size'] == model.pool_size


@pytest.mark.parametrize('kind', EMBED_TYPES)
def test_the_first_convolution_is_named_whatever_the_embedding(kind):
    model = create(embed_type=kind, in_chans=2)
    assert model.get_submodule(model.pretrained_cfg['first_conv']).in_channels == 2


def test_preprocessing_is_that_of_the_config():
    data, config = resolve_data_config(model=create()), load_config('configs/msg_tiny_p4_win7_224.yaml')
    assert data['interpolation'] == config.DATA.INTERPOLATION == 'bicubic'
    assert data['crop_pct'] == 224 / 256
    assert data['mean'] == (0.485, 0.456, 0.406)


@torch.no_grad()
def test_at_224_it_is_the_network_to_the_bit():
    model, same = fill_(create()).eval(), fill_(MSGTransformer(**NARROW)).eval()
    assert torch.equal(model(images(2, 224)), same(images(2, 224)))
    maps = fill_features(create(features_only=True)).eval()(images(2, 224))
    assert all(map(torch.equal, maps, same.forward_intermediates(images(2, 224), intermediates_only=True)))


def test_options_of_timm():
    model = create(num_classes=3, img_size=(96, 128), drop_path_rate=0.4, in_chans=1, drop_rate=0.1, global_pool='avg')
    assert (model.num_classes, model.in_chans, model.img_size) == (3, 1, (96, 128))
    assert model.layers[-1].blocks[-1].drop_path.rate == pytest.approx(0.4)
    assert model(torch.randn(2, 1, 96, 128)).shape == (2, 3)
    half = create(device='meta', dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in half.parameters()} == {('meta', torch.bfloat16)}
    with pytest.raises(TypeError, match='window'):
        create(window=7)


@torch.no_grad()
def test_features_only_gives_the_stages_asked_for():
    batch = batch_of(100, 130)
    model = create(features_only=True)
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([16, 32, 64, 128], [4, 8, 16, 32])
    expected = fill_(MSGTransformer(**NARROW)).eval().forward_intermediates(batch, intermediates_only=True)
    for indices in ((0, 1, 2, 3), (0, 2), (1,), (-1,)):
        model = fill_features(create(features_only=True, out_indices=indices)).eval()
        maps = model(batch)
        stages = [i % 4 for i in indices]
        assert model.feature_info.channels() == [16 * 2**i for i in stages]
        assert all(torch.equal(x, expected[i]) for i, x in zip(stages, maps, strict=True))
    assert not [name for name, _ in model.named_parameters() if name.startswith(('model.head', 'model.norm'))]


@pytest.mark.parametrize(('i', 'size'), list(enumerate(SIZES)), ids=str)
def test_odd_sizes_run_forward_and_backward(i, size):
    name = ('msg_transformer_tiny', 'msg_transformer_v2_tiny')[i % 2]  # the slow test runs the other
    check_size(fill_(create(name, num_classes=5)), fill_features(create(name, features_only=True)), size)


@pytest.mark.slow
@pytest.mark.parametrize('first', [0, 1])
def test_odd_sizes_run_at_full_width(first):
    name = ('msg_transformer_v2_tiny', 'msg_transformer_tiny')[first]
    model, features = timm.create_model(name, num_classes=5), timm.create_model(name, features_only=True)
    for size in SIZES[first:12:3]:
        check_size(model, features, size)


def fill_features(features):
    fill_(features.model)
    return features


def check_size(model, features, size):
    """Run both networks forward and backward on an image of this size."""
    batch = batch_of(*size).requires_grad_()
    logits = model.train()(batch)
    assert logits.shape == (1, 5)
    logits.square().sum().backward()
    maps = features.train()(batch)
    for reduction, x in zip(features.feature_info.reduction(), maps, strict=True):
        assert x.shape[2:] == tuple(-(-side // reduction) for side in size)
        assert x.isfinite().all()
    sum(x.square().mean() for x in maps).backward()
    for network in (model, features):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
        network.zero_grad()
    assert batch.grad.abs().sum(dim=(0, 1)).gt(0).all()  # every pixel has an influence


def write_dataset(folder):
    """Two classes, dark and light images."""
    rng = np.random.default_rng(0)
    for label, level in enumerate((40, 200)):
        (folder / 'train' / f'class_{label}').mkdir(parents=True)
        for i in range(8):
            pixels = (rng.normal(level, 20, (40, 40, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / 'train' / f'class_{label}' / f'{i}.png')


def test_timm_trains_it(tmp_path):
    """Timm's loader, optimizer with layer-wise learning rates, EMA and scheduler, with checkpointing."""
    write_dataset(tmp_path)
    torch.manual_seed(0)
    model = create(num_classes=2, img_size=32, drop_path_rate=0.1)
    model.set_grad_checkpointing()
    data = resolve_data_config({'input_size': (3, 32, 32)}, model=model)
    loader = create_loader(
        create_dataset('folder', tmp_path, split='train'),
        data['input_size'],
        batch_size=8,
        is_training=True,
        no_aug=True,
        mean=data['mean'],
        std=data['std'],
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device('cpu'),
    )
    optimizer = create_optimizer_v2(model, opt='adamw', lr=3e-3, weight_decay=0.05, layer_decay=0.8)
    scales = sorted({group['lr_scale'] for group in optimizer.param_groups})
    assert len(scales) == 1 + 5 + 1  # stem, blocks, head
    ema = ModelEmaV3(model, decay=0.5)
    scheduler, epochs = create_scheduler_v2(optimizer, sched='cosine', num_epochs=6, warmup_epochs=1)
    losses = []
    for epoch in range(6):
        for x, target in loader:
            loss = torch.nn.functional.cross_entropy(model.train()(x), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.append(loss.item())
        scheduler.step(epoch + 1)
    assert epochs >= 6
    assert sum(losses[-2:]) < 0.5 * sum(losses[:2])
    assert ema.module.eval()(x).argmax(dim=1).eq(target).float().mean() > 0.8


@torch.no_grad()
def test_saved_for_the_hub_it_loads_from_the_folder(tmp_path):
    model = fill_(create(num_classes=3, img_size=64, in_chans=1)).eval()
    arguments = NARROW | {'img_size': 64, 'in_chans': 1}  # which timm >= 1.0.31 knows itself
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    saved = json.loads((tmp_path / 'config.json').read_text())
    assert (saved['architecture'], saved['num_classes']) == ('msg_transformer_tiny', 3)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    batch = images(2, 64, 1)
    assert torch.equal(loaded(batch), model(batch))
    other = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, num_classes=7).eval()
    assert other(batch).shape == (2, 7)


def test_pushed_to_the_hub_it_is_a_repository_of_timm():
    pushed = {}

    def upload_folder(self, repo_id, folder_path, **options):
        pushed[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    with (
        mock.patch.object(huggingface_hub.HfApi, 'create_repo', return_value=mock.Mock(repo_id='someone/msg')),
        mock.patch.object(huggingface_hub.HfApi, 'file_exists', return_value=False),
        mock.patch.object(huggingface_hub.HfApi, 'upload_folder', upload_folder),
    ):
        timm.models.push_to_hf_hub(create(num_classes=3), 'msg', model_args=NARROW)
    files = pushed['someone/msg']
    assert set(files) >= {'config.json', 'model.safetensors', 'README.md'}
    assert json.loads(files['config.json'])['architecture'] == 'msg_transformer_tiny'


@torch.no_grad()
def test_a_checkpoint_is_fitted_to_another_window_and_head(tmp_path):
    """As in timm: weights of a file, for other classes and another window."""
    source = fill_(create(num_classes=3))
    torch.save({'model': source.state_dict()}, tmp_path / 'ckpt.pth')
    overlay = {'file': str(tmp_path / 'ckpt.pth'), 'num_classes': 3}
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), source.parameters(), strict=True))
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, img_size=384, window_size=12)
    source.set_input_size(384, window_size=12)
    for (name, a), b in zip(model.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(a, b) or name.startswith('head'), name
    assert model(batch_of(384, 384)).shape == (1, 7)


@pytest.mark.parametrize('classes', [3, 5])
@pytest.mark.parametrize('name', ['msg_transformer_tiny', 'msg_transformer_nano'])
def test_the_head_of_a_file_is_kept_for_its_number_of_classes(tmp_path, name, classes):
    options = NARROW if name == 'msg_transformer_tiny' else {}
    trained = fill_(timm.create_model(name, num_classes=3, **options))
    torch.save({'model': trained.state_dict()}, tmp_path / 'ckpt_best.pth')
    file = {'file': str(tmp_path / 'ckpt_best.pth')}
    options = options | {'num_classes': classes}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, **options)
    assert torch.equal(model.msg_tokens, trained.msg_tokens)
    assert model.num_classes == len(model.head.weight) == classes
    if classes == 3:
        assert torch.equal(model.head.weight, trained.head.weight)
