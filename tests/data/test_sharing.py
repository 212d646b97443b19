"""Lists of samples are in memory once, however many ranks and workers of a node read them."""

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from data import DataError, build_loaders
from data import build as build_module
from data import sharing as sharing_module
from data.packed_lists import NameList, PackedList
from data.workers import worker_context
from engine.distributed import once_per_node
from tests.helpers.processes import run_ranks

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='memory is shared on Linux')

COUNT = 200_000
SIZE = COUNT * (8 + 8)  # of the names and of their ends, in bytes


def make_names():
    return NameList.of(f'{i:08d}' for i in range(COUNT))


def shared_memory(field):
    """Bytes that this process has mapped of shared lists: all of them (Rss), or divided by those who map them (Pss)."""
    total, is_shared = 0, False
    for line in Path('/proc/self/smaps').read_text().splitlines():
        first, *words = line.split()
        if not first.endswith(':'):
            is_shared = '/memfd:samples' in line
        elif is_shared and first == f'{field}:':
            total += int(words[0]) * 1024
    return total


def read_all(names, barrier, results):
    """Read all names; report what of them is mapped once all processes have."""
    length = sum(map(len, names))
    barrier.wait()
    results.put((length, shared_memory('Rss'), shared_memory('Pss')))
    barrier.wait()


def read_in_processes(names, barrier, results, count):
    context = worker_context()
    processes = [context.Process(target=read_all, args=(names, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    return processes


def test_workers_map_one_list():
    names, context = make_names().share(), worker_context()
    assert len(pickle.dumps(names)) < 500
    barrier, results = context.Barrier(3), context.Queue()
    processes = read_in_processes(names, barrier, results, 3)
    lengths, mapped, proportions = zip(*(results.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    assert set(lengths) == {COUNT * 8}
    assert min(mapped) > 0.9 * SIZE
    assert sum(proportions) + shared_memory('Pss') < 1.1 * SIZE


@pytest.mark.parametrize('items', [[], [{'a': 1}, [2, 'three'], None]])
def test_a_shared_list_has_its_items(items):
    shared = PackedList.of(items).share()
    copy = pickle.loads(pickle.dumps(shared))
    copy_of_copy = pickle.loads(pickle.dumps(copy))
    assert [list(x) for x in (shared, copy, copy_of_copy)] == [items] * 3
    with pytest.raises(ValueError, match='read-only'):
        copy.ends[:] = 0
    assert shared.share() is shared
    assert list(PackedList.of(items)) == items  # not shared


def test_nothing_stays_open():
    before = len(os.listdir('/proc/self/fd'))
    shared = make_names().share()
    copy = pickle.loads(pickle.dumps(shared))
    assert len(os.listdir('/proc/self/fd')) > before
    del shared, copy
    assert len(os.listdir('/proc/self/fd')) == before


def test_too_little_memory_is_reported(monkeypatch):
    """A file of /dev/full is as full as memory can be."""
    monkeypatch.setattr(sharing_module.os, 'memfd_create', lambda name: os.open('/dev/full', os.O_RDWR))
    with pytest.raises(DataError, match=r'cannot be shared \(No space left on device\): make room'):
        make_names().share()


# Ranks


def share_names(rank, folder):

    def build():
        (folder / f'built_{rank}').touch()
        return make_names().share()

    names = once_per_node(build)
    (folder / f'read_{rank}').write_text(f'{sum(map(len, names))} {names[rank]}')
    dist.barrier()
    (folder / f'mapped_{rank}').write_text(f'{shared_memory("Pss")}')
    dist.barrier()  # the list lives until here


def files(folder, pattern):
    return {path.name: path.read_text() for path in folder.glob(pattern)}


@pytest.mark.parametrize(('nodes', 'builders'), [('aaa', {'built_0'}), ('aba', {'built_0', 'built_1'})])
def test_ranks_of_a_node_map_the_list_that_one_of_them_has_built(tmp_path, nodes, builders):
    run_ranks(share_names, tmp_path, nodes=nodes)
    assert files(tmp_path, 'built_*').keys() == builders
    assert files(tmp_path, 'read_*') == {f'read_{i}': f'{COUNT * 8} 0000000{i}' for i in range(3)}
    mapped = sum(map(int, files(tmp_path, 'mapped_*').values()))
    assert 0.9 * SIZE * len(builders) < mapped < 1.1 * SIZE * len(builders)


def fail_on_one_node(rank, folder):

    def build():
        if rank == 1:
            raise DataError('node b has no data')
        return make_names().share()

    with pytest.raises(DataError, match='node b has no data'):
        once_per_node(build)
    (folder / f'failed_{rank}').touch()


def test_an_error_on_one_node_is_raised_by_all_ranks(tmp_path):
    run_ranks(fail_on_one_node, tmp_path, nodes='abb')
    assert len(files(tmp_path, 'failed_*')) == 3


def build_and_read(rank, folder, config):
    """Build the loaders and read all of them; note who lists the samples."""
    open_samples = build_module.open_samples

    def note(name, path, split):
        (folder / f'listed_{rank}_{split}').touch()
        return open_samples(name, path, split)

    build_module.open_samples = note
    loaders = build_loaders(config, rank, 2, once_per_node)
    assert [sum(len(batch.image) for batch in loader) for loader in loaders] == [12, 6]


def test_loaders_list_their_samples_once(tiny_config, image_tree, tmp_path):
    run_ranks(build_and_read, tmp_path, tiny_config(DATA__DATA_PATH=str(image_tree)), nodes='aa')
    assert files(tmp_path, 'listed_*').keys() == {'listed_0_train', 'listed_0_val'}


def test_a_worker_of_an_ended_program_ends_without_a_traceback():
    with pytest.raises(SystemExit, match='the process that shares /proc/0/fd/3 has ended'):
        sharing_module._attach('/proc/0/fd/3', ())
