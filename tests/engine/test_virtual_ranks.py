"""Virtual ranks: the bits of a run do not depend on how many processes compute it."""

import copy
import json
import math
import random
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import main as program
from data import build_loaders
from engine import virtual_ranks
from engine.checkpoint import CheckpointError, load_checkpoint
from engine.config_tree import ConfigError
from engine.distributed import Process
from engine.virtual_ranks import (
    TreeSum,
    VirtualRanks,
    add_over_processes,
    broadcast_weights,
    check_network,
    check_processes,
)
from models import build_model
from tests.helpers import virtual_ranks as runs
from tests.helpers.coco_data import write_coco
from tests.helpers.golden import fill_
from tests.helpers.processes import TORCHRUN, start
from tests.helpers.runs import (
    CPU,
    PLAIN,
    build_trainer,
    differences,
    folder_of,
    last_checkpoint,
    log_of,
    one_thread,
    records,
)
from utils import set_seed

# In fp32, 1e8 + 3 is 1e8: the sum is 0 along the tree, 3 from left to right, and 8 if processes pair up the other way
VALUES = [1e8, 1.0, -1e8, 1.0, 1e8, 3.0, -1e8, 3.0]


def tree_sum(values):
    """The sum of 2^n vectors along a binary tree, as a recursion."""
    half = len(values) // 2
    return values[0] if not half else tree_sum(values[:half]) + tree_sum(values[half:])


def call_in_threads(monkeypatch, function, world_size):
    """Results of `function(process)` in threads that stand for processes; point-to-point messages go through memory."""
    messages, barrier, results = {}, threading.Barrier(world_size), [None] * world_size
    names = threading.local()

    class Done:
        def wait(self):
            pass

    def exchange(operations):
        for kind, tensor, partner in operations:
            if kind == 'send':
                messages[names.rank, partner] = tensor.clone()
        barrier.wait(20)
        for kind, tensor, partner in operations:
            if kind == 'receive':
                tensor.copy_(messages[partner, names.rank])
        barrier.wait(20)
        return [Done()] * len(operations)

    def call(rank):
        names.rank = rank
        results[rank] = function(Process(rank, world_size, CPU))

    monkeypatch.setattr(virtual_ranks.dist, 'isend', 'send')
    monkeypatch.setattr(virtual_ranks.dist, 'irecv', 'receive')
    monkeypatch.setattr(virtual_ranks.dist, 'P2POp', lambda *operation: operation)
    monkeypatch.setattr(virtual_ranks.dist, 'batch_isend_irecv', exchange)
    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def local_sum(vectors):
    tree = TreeSum()
    for vector in vectors:
        tree.add(vector.clone())
    return tree.total()


def test_sums_go_along_one_tree_on_any_number_of_processes(monkeypatch):
    vectors = [torch.tensor([value, 0.1 * number], dtype=torch.float32) for number, value in enumerate(VALUES)]
    expected = tree_sum(vectors)
    assert expected[0] == 0
    assert sum(vectors)[0] == 3
    assert torch.equal(local_sum(vectors), expected)
    for world_size in (1, 2, 4, 8):
        count = len(vectors) // world_size

        def share(process, count=count):
            own = vectors[process.rank * count : (process.rank + 1) * count]
            return add_over_processes(local_sum(own), process)

        for total in call_in_threads(monkeypatch, share, world_size):
            assert torch.equal(total, expected), world_size


def test_a_tree_keeps_one_sum_per_level():
    tree = TreeSum()
    most = 0
    for _ in range(64):
        tree.add(torch.ones(1))
        most = max(most, len(tree._partial))
    assert most == 6
    assert tree.total() == 64


class TwoLayers(nn.Module):
    """A network with a weight that is not trained, and one that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.used, self.frozen, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)


def test_gradient_is_the_mean_of_all_ranks_by_the_tree():
    network = TwoLayers()
    inputs = [torch.randn(5, 3) for _ in range(8)]  # two batches for each of four ranks

    def accumulate(batches):
        loss = sum(network.frozen(network.used(batch)).square().mean() for batch in batches) / len(batches)
        loss.backward()
        return loss.detach(), {'square': loss.detach(), 'twice': 2 * loss.detach()}

    leaves = []
    for rank in range(4):
        loss, _ = accumulate(inputs[2 * rank : 2 * rank + 2])
        leaves.append((network.used.weight.grad, network.used.bias.grad, loss))
        network.zero_grad()
    weight, bias, mean_loss = (tree_sum(tensors) / 4 for tensors in zip(*leaves, strict=True))
    ranks = VirtualRanks(4, Process(0, 1, CPU), seed=0)
    loss, losses, nonfinite = ranks.mean_gradient(network, accumulate, inputs)
    assert torch.equal(network.used.weight.grad, weight)
    assert torch.equal(network.used.bias.grad, bias)
    assert network.unused.weight.grad is None
    assert network.frozen.weight.grad is None
    assert torch.equal(loss, mean_loss)
    assert losses == {'square': mean_loss, 'twice': 2 * mean_loss}
    assert nonfinite == 0
    assert loss.untyped_storage().nbytes() < weight.nbytes  # does not keep the gradients


def test_a_gradient_of_one_rank_alone_counts_for_all():
    network = TwoLayers()

    def accumulate(batches):
        layer = network.unused if batches == [2] else network.used
        loss = layer.weight.sum()
        loss.backward()
        return loss.detach(), {'loss': loss.detach()}

    ranks = VirtualRanks(4, Process(0, 1, CPU), seed=0)
    ranks.mean_gradient(network, accumulate, [0, 1, 2, 3])
    assert network.unused.weight.grad.unique().tolist() == [0.25]
    assert network.used.weight.grad.unique().tolist() == [0.75]


def test_a_gradient_of_another_process_counts_here(monkeypatch):
    """Weight decay would change a weight whose gradient is zero, but not one whose gradient is None."""
    monkeypatch.setattr(virtual_ranks, 'add_over_processes', lambda vector, process: vector)
    monkeypatch.setattr(virtual_ranks, 'all_reduce_sum', lambda counts: counts.add_(1))
    network = TwoLayers()

    def accumulate(batches):
        loss = network.used.weight.sum()
        loss.backward()
        return loss.detach(), {'loss': loss.detach()}

    VirtualRanks(4, Process(1, 2, CPU), seed=0).mean_gradient(network, accumulate, [0, 1])
    assert network.unused.weight.grad.unique().tolist() == [0]


@pytest.mark.parametrize('optimizer', [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_update_of_weights_that_are_not_contiguous(optimizer):
    plain = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    network, inputs = copy.deepcopy(plain), torch.randn(2, 2, 3, 5, 5)

    def accumulate_in(module):
        def accumulate(batches):
            loss = sum(module(batch).square().mean() for batch in batches)
            loss.backward()
            return loss.detach(), {}

        return accumulate

    accumulate_in(plain)(inputs)
    for parameter in plain.parameters():
        parameter.grad /= 2
    VirtualRanks(2, Process(0, 1, CPU), seed=0).mean_gradient(network, accumulate_in(network), list(inputs))
    for module in (plain, network):
        optimizer(module.parameters(), lr=0.1, fused=True).step()
    torch.testing.assert_close(network.state_dict(), plain.state_dict())


def test_buffers_that_training_changes_are_refused():
    network = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).train()
    check_network(network)

    def accumulate(batches):
        loss = network(torch.randn(2, 3)).sum()
        loss.backward()
        return loss.detach(), {}

    ranks = VirtualRanks(2, Process(0, 1, CPU), seed=0)
    optimizer = torch.optim.SGD(network.parameters(), lr=1)

    def update(number):
        ranks.mean_gradient(network, accumulate, [0, 1])
        optimizer.step()

    with pytest.raises(ConfigError, match='training changes its buffer parametrizations.weight.0._[uv], whose'):
        list(map(update, range(3)))


def test_losses_are_added_by_name():
    ranks, losses = VirtualRanks(2, Process(0, 1, CPU), seed=0), [{'a': 1.0, 'b': 10.0}, {'b': 30.0, 'a': 3.0}]

    def accumulate(batches):
        return torch.zeros(()), {name: torch.tensor(value) for name, value in losses[batches[0]].items()}

    assert ranks.mean_gradient(nn.Module(), accumulate, [0, 1])[1] == {'a': 2, 'b': 20}
    losses[1] = {'a': 1.0}
    with pytest.raises(ConfigError, match=r"the losses of one batch are \['a', 'b'\], and of another \['a'\]"):
        ranks.mean_gradient(nn.Module(), accumulate, [0, 1])


def test_sums_of_an_epoch_that_ddp_began_are_those_of_all_ranks(tiny_config):
    trainer = trainer_of(tiny_config(TRAIN__VIRTUAL_RANKS='2'))
    checkpoint = trainer.state.state_dict()
    for rank, value in enumerate((1.0, 3.0)):
        checkpoint['ranks'][rank]['sums'] = torch.full((3,), value)
    trainer.state.load_state_dict(checkpoint, 0, 2)
    assert trainer.state.sums.tolist() == [2, 2, 2]
    assert trainer.state.sums.dtype == torch.float32


def test_a_task_whose_batches_are_of_processes_is_refused(tiny_config, image_tree, monkeypatch):
    config = tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__VIRTUAL_RANKS='2')
    without = tiny_config(DATA__DATA_PATH=str(image_tree))
    monkeypatch.setattr(program.Classification, 'build_loaders', lambda *args: build_loaders(without))
    with pytest.raises(ConfigError, match="needs batches by virtual rank, and this task's loader has none"):
        program.main(config)


def test_damaged_random_states_are_an_error_of_the_checkpoint(tiny_config):
    trainer = trainer_of(tiny_config(TRAIN__VIRTUAL_RANKS='2'))
    checkpoint = trainer.state.state_dict()
    checkpoint['ranks'][1]['random']['torch'] = 'damaged'
    with pytest.raises(CheckpointError, match='training state is not what a run writes'):
        trainer.state.load_state_dict(checkpoint, 0, 2)


def test_draws_are_those_of_the_rank_on_any_number_of_processes(monkeypatch):
    """Two updates of four virtual ranks, of which each draws from every generator."""
    monkeypatch.setattr(virtual_ranks, 'add_over_processes', lambda vector, process: vector)
    results = []
    for world_size in (1, 2, 4):
        draws = {}

        def accumulate(batches, draws=draws):
            ((update, rank),) = batches
            draws[update, rank] = random.random(), np.random.rand(), torch.rand(()).item()
            return torch.zeros(()), {}

        for process in (Process(rank, world_size, CPU) for rank in range(world_size)):
            ranks, count = VirtualRanks(4, process, seed=7), 4 // world_size
            for update in (0, 1):
                random.seed(update), np.random.seed(update), torch.manual_seed(update)  # as an evaluation may do
                own = range(process.rank * count, (process.rank + 1) * count)
                ranks.mean_gradient(nn.Module(), accumulate, [(update, rank) for rank in own])
        results.append(draws)
    assert results[0] == results[1] == results[2]
    assert len(set(results[0].values())) == 8
    set_seed(7 + 2)
    assert results[0][0, 2] == (random.random(), np.random.rand(), torch.rand(()).item())  # as rank 2 without them


def trainer_of(config):
    trainer = build_trainer(config, fill_(build_model(config)).train())
    trainer.state.virtual_ranks = VirtualRanks(config.TRAIN.VIRTUAL_RANKS, Process(0, 1, CPU), config.SEED)
    return trainer


def random_batches(count):
    return [(torch.randn(4, 3, 28, 28), torch.arange(4) % 3) for _ in range(count)]


def test_nonfinite_loss_of_one_rank_skips_the_update_of_all(tiny_config):
    trainer = trainer_of(tiny_config(TRAIN__VIRTUAL_RANKS='4', TRAIN__NONFINITE='skip', **PLAIN))
    before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
    batches = random_batches(4)
    batches[2][0][0, 0, 0, 0] = math.nan
    update = trainer.train_step(batches)
    assert update.skipped
    trainer.step_schedule_and_ema(update)
    assert trainer.state.skipped == 1
    assert all(torch.equal(value, before[name]) for name, value in trainer.state.model.state_dict().items())
    assert trainer.state.sums.tolist() == [0, 0, 0]
    assert not trainer.train_step(random_batches(4)).skipped


def test_nonfinite_ranks_are_counted(tiny_config):
    trainer = trainer_of(tiny_config(TRAIN__VIRTUAL_RANKS='4', **PLAIN))
    batches = random_batches(4)
    for batch in batches[1:]:
        batch[0][0, 0, 0, 0] = math.nan
    assert trainer.compute_gradient(batches)[2] == 3


def test_learning_rate_and_updates_are_those_of_as_many_processes(tiny_config, image_tree):
    """24 images: three batches of two for each of four ranks, two of them per update."""
    options = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__VIRTUAL_RANKS': '4', 'DATA__BATCH_SIZE': '2'}
    config = tiny_config(TRAIN__ACCUMULATION_STEPS='2', **options)
    program.main(config)
    steps = records(config, 'train')
    assert [(record['epoch'], record['step']) for record in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    scale = 16 / 512
    assert steps[2]['lr'] == pytest.approx((5e-7 + (0.1 - 5e-7) / 2) * scale)
    checkpoint = last_checkpoint(config)
    assert checkpoint['progress']['images'] == 0
    assert len(checkpoint['ranks']) == 4
    assert '4 virtual ranks, of which this process computes 0, 1, 2, 3' in log_of(config)
    losses = [record['loss'] for record in steps[2:]]
    assert records(config, 'epoch')[1]['train_loss'] == pytest.approx(sum(losses) / 2)


def test_another_number_of_processes_resumes_bit_for_bit(tiny_config, image_tree, tmp_path):
    """The number of processes is only recorded; see the slow test for runs of several."""
    options = {'DATA__DATA_PATH': str(image_tree), 'TRAIN__VIRTUAL_RANKS': '2', 'MODEL__DROP_RATE': '0.1'}
    path = tmp_path / 'checkpoint.pth'
    with one_thread():
        config = tiny_config(**options, SAVE_STEPS='1', SAVE_KEEP='0')
        program.main(config)
        checkpoint = load_checkpoint(folder_of(config) / 'ckpt_epoch_1_step_1.pth')
        for world_size, threads, text in (
            ('2', '1', 'the run resumes bit for bit, as if it had never stopped'),
            ('2', '3', 'not bit for bit: threads was 3 and is 1'),
        ):
            checkpoint['environment'] |= {'world_size': world_size, 'threads': threads}
            torch.save(checkpoint, path)
            resumed = tiny_config(**options, TAG=f'resumed_{threads}', MODEL__RESUME=str(path))
            program.main(resumed)
            assert text in log_of(resumed)
            assert differences(last_checkpoint(config), last_checkpoint(resumed)) == []
        plain = tiny_config(**options | {'TRAIN__VIRTUAL_RANKS': '0'}, TAG='plain', MODEL__RESUME=str(path))
        program.main(plain)
        assert 'random numbers are not restored; TRAIN.VIRTUAL_RANKS has changed; threads' in log_of(plain)
        assert 'world_size was 2 and is 1' in log_of(plain)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'TRAIN__VIRTUAL_RANKS': '6'}, 'is 6: write a power of two, such as 4 or 8, or 0 for none'),
        ({'TRAIN__VIRTUAL_RANKS': '3'}, 'is 3: write a power of two, such as 2 or 4, or 0 for none'),
        ({'TRAIN__VIRTUAL_RANKS': '4', 'AMP_OPT_LEVEL': 'O2'}, 'does not work with Apex: write AMP_BACKEND native'),
        ({'TRAIN__VIRTUAL_RANKS': '4', 'AMP_BACKEND': 'apex'}, 'does not work with Apex: write AMP_BACKEND native'),
        ({'TRAIN__VIRTUAL_RANKS': '4', 'THROUGHPUT_MODE': 'True'}, 'write TRAIN.VIRTUAL_RANKS 0'),
        (
            {'TRAIN__VIRTUAL_RANKS': '4', 'TRAIN__COMPILE': 'True', 'COMPILE_MODE': 'max-autotune'},
            'gradients may be wrong with TRAIN.VIRTUAL_RANKS',
        ),
    ],
)
def test_settings_that_do_not_go_together(tiny_config, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**options)


@pytest.mark.parametrize('world_size', [3, 8])
def test_processes_must_divide_the_virtual_ranks(world_size):
    message = f'TRAIN.VIRTUAL_RANKS is 4, which {world_size} processes cannot share equally: start 1, 2, 4 processes'
    with pytest.raises(ConfigError, match=message):
        check_processes(4, Process(0, world_size, CPU))


@pytest.mark.parametrize('number', range(5))
def test_processes_must_compute_alike(monkeypatch, number):
    monkeypatch.setattr(virtual_ranks, 'gather_on_main_process', lambda ours: [ours, ours])
    check_processes(4, Process(0, 2, CPU))
    other = lambda ours: ['other' if i == number else value for i, value in enumerate(ours)]  # noqa: E731
    monkeypatch.setattr(virtual_ranks, 'gather_on_main_process', lambda ours: [ours, other(ours)])
    key = ('threads', 'cpu', 'device', 'variables', 'torch')[number]
    with pytest.raises(ConfigError, match=f'the processes differ in {key} .*other.* all must be equal'):
        check_processes(4, Process(0, 2, CPU))


def test_batch_norms_are_refused_where_they_are_trained(tiny_config, image_tree):
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    check_network(network.eval())
    check_network(nn.Sequential(nn.LayerNorm(2), FrozenBatchNorm2d(2)).train())
    with pytest.raises(ConfigError, match='does not work with batch norms that are trained, .*such as 1: their'):
        check_network(network.train())
    with pytest.raises(ConfigError, match='the batch norms of MODEL.MSG.EMBED_TYPE conv: write another EMBED_TYPE'):
        tiny_config(MODEL__MSG__EMBED_TYPE='conv', TRAIN__VIRTUAL_RANKS='2')
    tiny_config(MODEL__MSG__EMBED_TYPE='conv', TRAIN__VIRTUAL_RANKS='2', TRAIN__FROZEN_STAGES='0')
    options = {'MODEL__TYPE': 'timm:resnet18', 'TRAIN__VIRTUAL_RANKS': '2', 'DATA__DATA_PATH': str(image_tree)}
    with pytest.raises(ConfigError, match='such as bn1'):
        program.main(tiny_config(**options))


def test_too_few_images_for_the_virtual_ranks(tiny_config, image_tree):
    with pytest.raises(ValueError, match='--batch-size|BATCH_SIZE 4 on 8 virtual ranks needs 32'):
        program.main(tiny_config(DATA__DATA_PATH=str(image_tree), TRAIN__VIRTUAL_RANKS='8'))


def test_weights_are_those_of_rank_0(tmp_path):
    network = nn.Linear(2, 2)
    broadcast_weights(network)  # without a process group
    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        network.weight.data = torch.arange(4.0).view(2, 2).t()  # not contiguous
        broadcast_weights(network)
        assert network.weight.tolist() == [[0, 2], [1, 3]]
    finally:
        torch.distributed.destroy_process_group()


def losses_of(folder):
    """Records of a run, without what tells of its speed or of its evaluation."""
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    names = ('data_s', 'images_per_s', 'memory_mb', 'seconds', 'val_loss', 'ema_val_loss')
    return [{name: str(value) for name, value in line.items() if name not in names} for line in lines]


@pytest.mark.slow
def test_one_two_and_four_processes_compute_the_same_bits(image_tree, tmp_path):
    """Each number of processes also resumes within an epoch of the one before."""
    coco, output, previous = write_coco(tmp_path / 'coco', train=12), tmp_path / 'output', []
    for processes in (4, 2, 1):
        tag = f'on_{processes}'
        command = ['-m', 'tests.helpers.virtual_ranks', image_tree, coco, output, tag, *previous]
        done = start(*TORCHRUN, processes, *command, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        previous = [tag]
    for name in runs.RUNS:
        folders = [output / name / tag for tag in ('on_1', 'on_2', 'on_4', 'on_1_resumed', 'on_2_resumed')]
        whole, *others = [load_checkpoint(folder / 'ckpt_epoch_1.pth') for folder in folders]
        for folder, other in zip(folders[1:], others, strict=True):
            # The images of an evaluation's batches, and so the last digits of its loss, depend on the processes
            ours, theirs = whole['scores'].pop('loss', 0), other['scores'].pop('loss', 0)
            assert ours == pytest.approx(theirs, rel=1e-6)
            whole['scores'] |= {'loss': ours}
            other['scores'] |= {'loss': ours}
            changed = differences(whole, other)
            assert changed in ([], ['environment']), (folder, changed)
        assert len(whole['ranks']) == 4
        first = losses_of(folders[0])
        for folder in folders[1:]:
            lines = losses_of(folder)
            assert lines == first[-len(lines) :], folder
        for folder in folders[3:]:
            assert 'the run resumes bit for bit, as if it had never stopped' in (folder / 'log_rank0.txt').read_text()
    assert whole['environment']['world_size'] == '1'
    skipped = load_checkpoint(output / 'skipped' / 'on_2' / 'ckpt_epoch_1.pth')
    assert skipped['progress']['skipped'] == 1
