"""Launchers, devices, the process group, collectives."""

import os
import socket
import warnings

import pytest
import torch
from torch import nn

from engine.config_tree import ConfigError
from engine.distributed import (
    SLURM_VARIABLES,
    TIMEOUT,
    TORCHRUN_VARIABLES,
    all_reduce_sum,
    average_over_processes,
    choose_device,
    distribute,
    first_host,
    gather_on_main_process,
    local_world_size,
    on_main_process,
    read_launcher,
    share_cores,
    start_process,
    synchronize_gradients,
)
from engine.signals import Stopped
from tests.helpers.paths import ROOT
from tests.helpers.processes import TORCHRUN as TORCHRUN_COMMAND
from tests.helpers.processes import main_error, start
from utils import UserError

TORCHRUN = {'RANK': '3', 'WORLD_SIZE': '8', 'LOCAL_RANK': '1', 'MASTER_ADDR': 'n1', 'MASTER_PORT': '29500'}
# As srun of SLURM 22.05 sets them.
SRUN = {
    'SLURM_PROCID': '3', 'SLURM_NTASKS': '8', 'SLURM_LOCALID': '1', 'SLURM_JOB_NODELIST': 'gpu[07-08]',
    'SLURM_JOB_ID': '123', 'SLURM_STEP_ID': '0', 'SLURM_STEP_NUM_TASKS': '8', 'SLURM_STEP_NODELIST': 'gpu[07-08]',
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in os.environ:
        if name in TORCHRUN_VARIABLES or name.startswith('SLURM_'):
            monkeypatch.delenv(name)


def test_torchrun_overrides_slurm_and_nothing_is_no_launcher():
    assert read_launcher({}) is None
    assert read_launcher({'LOCAL_RANK': '0', 'MASTER_ADDR': 'stale'}) is None
    assert read_launcher(SRUN | TORCHRUN) == ('torchrun', 3, 8, 1, 'n1', 29500)


def test_slurm():
    assert read_launcher(SRUN) == ('srun', 3, 8, 1, 'gpu07', 20123)
    assert read_launcher(SRUN | {'MASTER_ADDR': 'n1', 'MASTER_PORT': '1234'})[4:] == ('n1', 1234)
    few = {'SLURM_PROCID': '0', 'SLURM_NTASKS': '2', 'SLURM_LOCALID': '0'}
    assert read_launcher(few | {'MASTER_ADDR': 'n1', 'MASTER_PORT': '1234'}) == ('srun', 0, 2, 0, 'n1', 1234)
    assert read_launcher(few | {'SLURM_NODELIST': 'a[1-2]', 'SLURM_JOB_ID': '7'}) == ('srun', 0, 2, 0, 'a1', 20007)
    subset = {'SLURM_STEP_NUM_TASKS': '4', 'SLURM_STEP_NODELIST': 'gpu08'}  # a step on some nodes of the job
    assert read_launcher(SRUN | subset) == ('srun', 3, 4, 1, 'gpu08', 20123)
    step = {name: SRUN[name] for name in SRUN if not name.startswith('SLURM_STEP')}
    assert read_launcher(step) == ('srun', 3, 8, 1, 'gpu07', 20123)
    assert read_launcher(step | {'ENVIRONMENT': 'BATCH'}) is None  # python in a batch script, without srun
    assert read_launcher(SRUN | {'ENVIRONMENT': 'BATCH'}) is not None
    assert read_launcher({'SLURM_NTASKS': '8', 'SLURM_JOB_ID': '123'}) is None  # a shell of salloc


@pytest.mark.parametrize(
    'variables',
    [
        {'RANK': '', 'WORLD_SIZE': '', 'LOCAL_RANK': '', 'MASTER_ADDR': '', 'MASTER_PORT': ''},
        SRUN | {'SLURM_STEP_ID': str(0xFFFFFFFA)},  # the shell of salloc, where it is a step of its own
        SRUN | {'SLURM_STEP_ID': str(0xFFFFFFFB), 'ENVIRONMENT': 'BATCH'},
        {'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '4', 'SLURM_JOB_NODELIST': 'a[1-2]', 'SLURM_NTASKS_PER_NODE': '2'},
    ],
)
def test_processes_without_a_launcher(variables):
    assert read_launcher(variables) is None


@pytest.mark.parametrize('name', [*TORCHRUN, *SRUN, 'SLURM_TASKS_PER_NODE', 'SLURM_CPUS_PER_TASK', 'LOCAL_WORLD_SIZE'])
@pytest.mark.parametrize('value', ['', 'x', '-1', '2(x2)', '1.5', '9' * 30, '0', '[', 'a[', '\u0663', '70000'])
def test_odd_values_work_or_are_reported(monkeypatch, name, value):
    monkeypatch.setattr(torch, 'set_num_threads', lambda count: 0 < count < 2**31 or pytest.fail(str(count)))
    for variables in (TORCHRUN | {name: value}, SRUN | {name: value}):
        try:
            launch = read_launcher(variables)
            share_cores(variables)
        except ConfigError:
            continue
        assert launch is None or (0 <= launch.rank < launch.world_size and launch.local_rank >= 0)
        assert local_world_size(launch, variables) >= 0


def test_steps_of_a_job_have_ports_of_their_own():
    ports = {read_launcher(SRUN | {'SLURM_STEP_ID': str(step)}).master_port for step in range(50)}
    assert len(ports) == 50
    assert all(1024 < port < 65536 for port in ports)


@pytest.mark.parametrize(
    ('variables', 'processes', 'threads'),
    [
        ({}, 1, None),  # PyTorch's own number
        (TORCHRUN, 8, 2),
        (TORCHRUN | {'LOCAL_WORLD_SIZE': '4'}, 4, 4),
        (TORCHRUN | {'OMP_NUM_THREADS': '3'}, 8, None),
        (SRUN | {'SLURM_STEP_TASKS_PER_NODE': '8(x2),4'}, 8, 2),
        (SRUN | {'SLURM_TASKS_PER_NODE': '32'}, 32, 1),
        (SRUN | {'SLURM_STEP_TASKS_PER_NODE': '8', 'SLURM_CPUS_PER_TASK': '5'}, 8, 5),
    ],
)
def test_threads_follow_from_cores_and_local_ranks(monkeypatch, variables, processes, threads):
    chosen = []
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(16)))
    assert local_world_size(read_launcher(variables), variables) == processes
    text = share_cores(variables)
    assert chosen == ([] if threads is None else [threads])
    assert ('OMP_NUM_THREADS' in text) == ('OMP_NUM_THREADS' in variables)


def test_timeout_is_the_documented_one(monkeypatch):
    options = {}
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *_, **x: options.update(x))
    monkeypatch.setattr(torch.distributed, 'destroy_process_group', lambda: None)
    monkeypatch.setattr(torch.distributed, 'barrier', lambda: None)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with start_process('cpu', 0):
        pass
    minutes = options['timeout'].total_seconds() / 60
    assert f'after {minutes:.0f} minutes, with both gloo and NCCL' in (ROOT / 'docs' / 'launching.md').read_text()


@pytest.mark.parametrize(
    ('nodes', 'first'),
    [
        ('n1', 'n1'),
        ('n1,n2', 'n1'),
        ('gpu[003-007,9],x', 'gpu003'),
        ('a[2,5]b', 'a2b'),
        ('a[1-2]b[3-4],c', 'a1b3'),
        ('gpu-a.b', 'gpu-a.b'),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize('name', TORCHRUN_VARIABLES)
def test_incomplete_variables_are_reported(name):
    others = {key: value for key, value in TORCHRUN.items() if key != name}
    present = 'WORLD_SIZE' if name == 'RANK' else 'RANK'
    with pytest.raises(
        ConfigError, match=f'{present} is set but {name} is not: start with torchrun, or unset {present}'
    ):
        read_launcher(others)
    with pytest.raises(ConfigError, match='SLURM_PROCID is set but SLURM_NTASKS, SLURM_LOCALID'):
        read_launcher({'SLURM_PROCID': '0'})


def test_invalid_values_are_reported():
    with pytest.raises(ConfigError, match='not a number'):
        read_launcher(TORCHRUN | {'RANK': 'first'})
    with pytest.raises(ConfigError, match='rank 8 of 8 processes: ranks start at 0'):
        read_launcher(TORCHRUN | {'RANK': '8'})


def test_devices(monkeypatch):
    torchrun, srun = read_launcher(TORCHRUN), read_launcher(SRUN)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert choose_device('auto', None, 0) == torch.device('cpu')
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert choose_device('auto', None, 0) == torch.device('mps')
    assert choose_device('auto', torchrun, 0) == torch.device('cpu')  # several cannot share it
    with pytest.raises(ConfigError, match='several processes cannot share an Apple GPU'):
        choose_device('mps', torchrun, 0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    with pytest.raises(ConfigError, match='no Apple GPU.*--device cpu'):
        choose_device('mps', None, 0)

    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert choose_device('auto', None, 0) == torch.device('cuda', 0)
    assert choose_device('auto', torchrun, 0) == torch.device('cuda', 1)
    assert choose_device('cpu', torchrun, 0) == torch.device('cpu')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert choose_device('cuda', srun, 0) == torch.device('cuda', 0)  # the one that SLURM has bound to the task
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, 'device_count', lambda: 0)
        with pytest.raises(ConfigError, match='DEVICE is cuda, but PyTorch finds no GPU: write --device cpu'):
            choose_device('cuda', None, 0)
    for launch in (torchrun, None):
        with pytest.raises(ConfigError, match='local rank 1 has no GPU: 1 are visible.*--device cpu'):
            choose_device('cuda', launch, 1)


def test_one_process_needs_no_launcher():
    with start_process('cpu', 0) as process:
        assert process == (0, 1, torch.device('cpu'))
        assert not torch.distributed.is_initialized()


def test_gpu_is_chosen_before_joining_the_process_group(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch.distributed, 'barrier', lambda: chosen.append('barrier'))
    monkeypatch.setattr(torch.distributed, 'destroy_process_group', lambda: chosen.append('left'))
    monkeypatch.setattr(
        torch.distributed, 'init_process_group', lambda backend, **options: chosen.append((backend, options))
    )
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with start_process('cuda', 0) as process:
        assert process == (3, 8, torch.device('cuda', 1))
    joined = ('cpu:gloo,cuda:nccl', {'init_method': 'env://', 'rank': 3, 'world_size': 8, 'timeout': TIMEOUT})
    assert chosen == [torch.device('cuda', 1), joined, 'barrier', 'left']
    with pytest.raises(Stopped), start_process('cuda', 0):  # all ranks stop together
        raise Stopped
    with pytest.raises(RuntimeError), start_process('cuda', 0):  # a rank that fails does not wait for the others
        raise RuntimeError
    assert chosen.count('left') == 2


@pytest.mark.parametrize(
    ('variables', 'device'),
    [
        (SRUN | {'SLURM_PROCID': '0', 'SLURM_STEP_NUM_TASKS': '1'}, 'cpu'),
        (TORCHRUN | {'RANK': '0', 'WORLD_SIZE': '1'}, 'mps'),
    ],
    ids=['one task of srun', 'an Apple GPU'],
)
def test_single_processes_that_join_no_group_despite_a_launcher(monkeypatch, variables, device):
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with start_process(device, 0) as process:
        assert process == (0, 1, torch.device(device))
        assert not torch.distributed.is_initialized()


def test_restarted_ranks_do_not_find_earlier_addresses(monkeypatch):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = torch.distributed.TCPStore('127.0.0.1', port, is_master=True)  # torchrun's, shared by its restarts
    variables = TORCHRUN | {'RANK': '0', 'WORLD_SIZE': '1', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port)}
    variables |= {'LOCAL_WORLD_SIZE': '1', 'TORCHELASTIC_USE_AGENT_STORE': 'True', 'LOCAL_RANK': '0'}
    keys = []
    for restart in ('0', '1'):
        for name, value in (variables | {'TORCHELASTIC_RESTART_COUNT': restart}).items():
            monkeypatch.setenv(name, value)
        with start_process('cpu', 0):
            keys.append(
                {key.replace(f'restart_{restart}', '') for key in server.list_keys() if f'restart_{restart}' in key}
            )
    assert keys[0]
    assert keys[0] == keys[1]  # each start writes its own


@pytest.mark.slow
def test_port_in_use_is_reported(tmp_path):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        port = taken.getsockname()[1]
        variables = {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
        variables = {name: str(value) for name, value in variables.items()}
        message = main_error(tmp_path, variables=variables, run=start)
    assert f'the processes cannot connect at 127.0.0.1:{port} (the port is in use): set MASTER_ADDR' in message


def test_incomplete_variables_end_the_program(tmp_path):
    assert 'RANK is set but WORLD_SIZE, LOCAL_RANK' in main_error(tmp_path, variables={'RANK': '0'})
    assert 'SLURM_PROCID is set but' in main_error(tmp_path, variables={'SLURM_PROCID': '0'})
    assert SLURM_VARIABLES[0] == 'SLURM_PROCID'


class StridedGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, weight):
        return weight.clone()

    @staticmethod
    def backward(context, gradient):
        return torch.ones(15).as_strided((3, 1), (1, 5))


def test_ddp_does_not_warn_of_strides(tmp_path):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 1))

        def forward(self):
            return StridedGradient.apply(self.weight).sum()

    torch.distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            network = distribute(Network(), torch.device('cpu'))
            network().backward()
        assert caught == []
    finally:
        torch.distributed.destroy_process_group()


# The network is freed at once after the process group is left. Before Gloo's threads were given time to free their
# tensors, one of about thirty such ends waited for ever.
ENDS = """
import faulthandler
import os

import torch

from engine import distributed, signals

faulthandler.dump_traceback_later(100, exit=True)
for repetition in range(100):
    os.environ['TORCHELASTIC_RESTART_COUNT'] = str(repetition)  # connects by other keys of torchrun's store
    with distributed.start_process('cpu', 0) as process:
        network = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
        for update in range(2):
            network(torch.ones(2, 4)).sum().backward()
            signals.StopRequest().agreed()
    del network
"""


@pytest.mark.slow
def test_a_network_is_freed_after_the_process_group(tmp_path):
    (tmp_path / 'ends.py').write_text(ENDS)
    done = start(*TORCHRUN_COMMAND, '2', tmp_path / 'ends.py', variables={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr


AVERAGES = """
import torch
from torch import nn

from engine import distributed

with distributed.start_process('cpu', 0) as process:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(3), nn.BatchNorm1d(2, track_running_stats=False))
    for norm in network[:2]:
        norm.running_mean.fill_(process.rank)
        norm.running_var.copy_(torch.arange(norm.num_features) * (1 + 2 * process.rank))
    network[1].eval()
    distributed.average_over_processes(distributed.running_statistics(network))
    assert network[0].running_mean.tolist() == [0.5, 0.5]
    assert network[0].running_var.tolist() == [0, 2]
    assert network[1].running_mean.tolist() == [process.rank] * 3
"""


@pytest.mark.slow
def test_running_statistics_of_trained_batch_norms_are_averaged(tmp_path):
    (tmp_path / 'averages.py').write_text(AVERAGES)
    done = start(*TORCHRUN_COMMAND, '2', tmp_path / 'averages.py', variables={'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_collectives_of_one_process():
    average_over_processes([torch.ones(2)])
    assert all_reduce_sum(torch.tensor([2.0])).item() == 2.0
    assert on_main_process(lambda: 'value') == 'value'
    assert gather_on_main_process('value') == ['value']
    with synchronize_gradients(nn.Linear(1, 1), enabled=False):
        pass

    def fail():
        raise UserError('full')

    with pytest.raises(UserError, match='full'):
        on_main_process(fail)


@pytest.mark.parametrize(
    ('message', 'error_class'),
    [
        ('[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1234\nmore', UserError),
        ('shapes differ', RuntimeError),
    ],
)
def test_the_death_of_another_process_is_one_line(monkeypatch, message, error_class):
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        port = server.getsockname()[1]
    variables = {'RANK': 0, 'WORLD_SIZE': 1, 'LOCAL_RANK': 0, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    try:
        with pytest.raises(error_class) as raised, start_process('cpu', 0):
            raise RuntimeError(message)
    finally:
        torch.distributed.destroy_process_group()
    assert '\n' not in str(raised.value)
