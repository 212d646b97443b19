"""Batch norm over all processes."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from detection.main import TASK
from detection.models import build_detector
from detection.models.norm import SyncBatchNorm, synchronize_norms
from engine.distributed import Process
from models.layers import ConvStem
from tests.helpers.detectors import tiny_detector
from tests.helpers.golden import fill_, normal
from tests.helpers.runs import one_thread


def test_several_gpus_train_pytorchs_own_norm_with_the_same_names_and_parameters():
    model = build_detector(tiny_detector())
    names, parameters = list(model.state_dict()), list(model.parameters())
    assert synchronize_norms(model, torch.device('cpu'), 2) is model
    assert synchronize_norms(model, torch.device('cuda'), 1) is model
    model = synchronize_norms(model, torch.device('cuda'), 2)
    assert list(model.state_dict()) == names
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in model.modules()) == 3
    assert not any(isinstance(module, SyncBatchNorm) for module in model.modules())


def test_norms_of_timm_keep_their_activations():
    stem = fill_(ConvStem(4, 3, 8, nn.LayerNorm)).eval()
    images = normal('images', (2, 3, 16, 16))
    before = stem(images)
    stem = synchronize_norms(stem, torch.device('cuda'), 2)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in stem.modules()) == 2
    torch.testing.assert_close(stem(images), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize('is_pretrained', [False, True])
def test_frozen_batch_norms_stay_frozen_on_several_gpus(is_pretrained):
    config = tiny_detector('MODEL.MSG.EMBED_TYPE', 'conv')
    process = Process(0, 2, torch.device('cuda'))
    run = SimpleNamespace(config=config, process=process, logger=logging.getLogger('test'))
    model = TASK.prepare_training(run, build_detector(config), is_pretrained).train()
    norms = [x for x in model.backbone.body.modules() if isinstance(x, nn.SyncBatchNorm)]
    assert [norm.training for norm in norms] == [not is_pretrained] * 2
    assert [norm.weight.requires_grad for norm in norms] == [not is_pretrained] * 2


def outputs_and_gradients(x):
    """What a norm computes of x, its gradients and its running statistics."""
    module, x = fill_(SyncBatchNorm(4)).train(), x.clone().requires_grad_()
    module.running_mean.zero_()
    module.running_var.fill_(1.0)
    y = module(x)
    y.pow(3).sum().backward()
    return {
        'y': y.detach(),
        'x': x.grad,
        'weight': module.weight.grad,
        'bias': module.bias.grad,
        'mean': module.running_mean,
        'var': module.running_var,
        'count': module.num_batches_tracked,
    }


def normalise_shard(rank, folder):
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    x = normal('x', (5, 4, 3, 3))
    torch.save(outputs_and_gradients(x[:3] if rank == 0 else x[3:]), folder / f'{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_normalise_by_the_statistics_of_all_rois(tmp_path):
    """Outputs, statistics and gradients, with shards of different sizes."""
    with one_thread():
        mp.spawn(normalise_shard, (tmp_path,), nprocs=2)
        whole = outputs_and_gradients(normal('x', (5, 4, 3, 3)))
    one, two = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    for name in ('y', 'x'):
        torch.testing.assert_close(torch.cat((one[name], two[name])), whole[name], rtol=1e-4, atol=1e-5)
    for name in ('weight', 'bias'):
        torch.testing.assert_close(one[name] + two[name], whole[name], rtol=1e-4, atol=1e-4)
    for name in ('mean', 'var', 'count'):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
        torch.testing.assert_close(one[name], whole[name], rtol=1e-5, atol=1e-6)
