import json

import pytest
import torch

from tests.helpers.paths import TINY
from tools.benchmark import __main__ as program
from tools.benchmark import runtimes


def call(monkeypatch, folder, *flags):
    arguments = ['runtimes', TINY, 'test_resnet', '--size', 28, '--rounds', 1, '--files', folder / 'files']
    monkeypatch.setattr('sys.argv', ['benchmark', *map(str, [*arguments, *flags, '--output', folder / 'times'])])
    program.main()
    return json.loads((folder / 'times.json').read_text())['results']


def test_every_file_is_timed_with_each_batch_and_number_of_threads(tmp_path, monkeypatch):
    before, seen = torch.get_num_threads(), []

    def load(path):
        threads = torch.get_num_threads()
        return lambda images: seen.append((path.name, threads, tuple(images.shape)))

    monkeypatch.setattr(runtimes, 'RUNTIMES', {'onnxruntime': ('onnx', load)})
    monkeypatch.setattr(runtimes, 'write_file', lambda case, size, folder: folder / f'{case.network}-{case.precision}')
    results = call(monkeypatch, tmp_path, '--runtimes', 'onnxruntime', '--int8', '--threads', 1, 3, '--batches', 1, 2)
    assert [(x['name'], x['setting'], x['images']) for x in results] == [
        (name, f'onnxruntime, {precision}, {threads} thread(s), batch {batch}, 28 px', batch)
        for threads in (1, 3)
        for batch in (1, 2)
        for name in ('tiny', 'test_resnet')
        for precision in ('fp32', 'int8')
    ]
    assert all((x['speedup']['median'] == 1) == (x['name'] == 'test_resnet') for x in results)
    assert {(name, threads, shape[0]) for name, threads, shape in seen if name.startswith('test')} == {
        (f'test_resnet-{precision}', threads, batch)
        for precision in ('fp32', 'int8')
        for threads in (1, 3)
        for batch in (1, 2)
    }
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_files_are_exported_once(tmp_path, monkeypatch):
    results = call(monkeypatch, tmp_path, '--int8', '--batches', 1)
    assert len({(x['name'], x['setting']) for x in results}) == len(results) == 8
    monkeypatch.setattr(runtimes, 'rewrite_for_runtimes', lambda *_, **__: pytest.fail('exports again'))
    monkeypatch.setattr(runtimes, 'quantize', lambda *_: pytest.fail('quantizes again'))
    assert len(call(monkeypatch, tmp_path, '--int8', '--batches', 1)) == 8
