"""Every format of DATA.DATASET holds the samples of the folder it came from, and says what is wrong with it."""

import pickle
import re
import shutil
import tarfile
import zipfile
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

import main as program
from data import DataError, build_loaders
from data.build import open_dataset
from data.formats import find_format, open_samples
from data.packed_lists import NameList
from data.workers import worker_context
from data.zip_archive import ZipArchive
from engine.experiment import describe_samples
from tests.helpers.datasets import WRITERS, as_huggingface, as_shards, as_zip, cut, flip_byte, samples_of
from tests.helpers.images import write_images
from tests.helpers.runs import RANDOM, differences, folder_of, last_checkpoint, log_of, one_thread

FORMATS = list(WRITERS)
PACKED = FORMATS[1:]


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('tree') / 'tree')


@pytest.fixture
def folder_in(tree, tmp_path):
    """A function that gives the dataset in a format."""
    return lambda name: WRITERS[name](tree, tmp_path / name)


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('split', ['train', 'val'])
def test_samples_are_those_of_the_folder(tree, folder_in, name, split):
    folder = folder_in(name)
    assert find_format(folder) == ('imagenet' if name == 'table' else name)  # its files are in class folders
    found = samples_of(name, folder, split)
    assert found == samples_of('imagenet', tree, split)
    assert len({data for _, _, data in found}) == len(found) == (24 if split == 'train' else 12)


def test_names_hash_alike(folder_in):
    names = ('imagenet', 'shards', 'zip', 'table', 'webdataset')
    described = [describe_samples(open_samples(name, folder_in(name), 'train').sample_names()) for name in names]
    assert described[0]['images'] == 24
    assert described[1:] == described[:1] * 4


@pytest.mark.parametrize('name', FORMATS)
def test_pickled_samples_read_the_same(folder_in, name):
    """Loader processes that are spawned, and not forked, get them so."""
    samples = open_samples(name, folder_in(name), 'train')
    read = [samples.read(i) for i in range(24)]
    copy = pickle.loads(pickle.dumps(samples))
    assert [copy.read(i) for i in range(24)] == read
    assert (list(copy.names), copy.targets.tolist()) == (list(samples.names), samples.targets.tolist())


@pytest.mark.parametrize('name', [name for name in PACKED if name != 'table'])  # whose images are files, too
def test_ranks_and_loader_processes_read_the_same_batches_as_from_the_folder(tiny_config, tree, folder_in, name):
    def batches(format_name, folder, workers):
        config = tiny_config(DATA__DATASET=format_name, DATA__DATA_PATH=str(folder), DATA__NUM_WORKERS=workers)
        loaders = [loader for rank in (0, 1) for loader in build_loaders(config, rank, world_size=2)]
        return [torch.cat([batch.image for batch in loader]) for loader in loaders]

    expected, found = batches('imagenet', tree, '0'), batches(name, folder_in(name), '2')
    assert [len(images) for images in found] == [12, 6, 12, 6]
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize('begun', ['imagenet', 'shards'])
def test_resumes_inside_an_epoch_on_shards_with_other_loader_processes(tiny_config, folder_in, begun):
    """A run that began on folders is the same experiment."""
    folders = {name: str(folder_in(name)) for name in ('imagenet', 'shards')}
    options = RANDOM | {'SAVE_STEPS': '4', 'SAVE_KEEP': '0', 'TRAIN__EPOCHS': '2'}
    with one_thread():
        whole = tiny_config(TAG='whole', DATA__DATASET=begun, DATA__DATA_PATH=folders[begun], **options)
        program.main(whole)
        start = str(folder_of(whole) / 'ckpt_epoch_0_step_4.pth')
        options |= {'DATA__DATASET': 'shards', 'DATA__DATA_PATH': folders['shards'], 'DATA__NUM_WORKERS': '2'}
        resumed = tiny_config(TAG='resumed', MODEL__RESUME=start, **options)
        program.main(resumed)
    assert differences(last_checkpoint(whole), last_checkpoint(resumed)) == []
    assert 'the run resumes bit for bit, as if it had never stopped' in log_of(resumed)


def test_shards_are_plain_tars(tree, folder_in):
    members = {}
    paths = sorted((folder_in('shards') / 'train').glob('*.tar'))
    for path in paths:
        with tarfile.open(path) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}
    expected = {}
    for i, (_, target, data) in enumerate(samples_of('imagenet', tree)):
        expected |= {f'{i:09d}.png': data, f'{i:09d}.cls': str(target).encode()}
    assert [path.name for path in paths] == [f'shard_0000{number}.tar' for number in range(5)]
    assert members == expected


# Zip archives


@pytest.mark.parametrize(
    'options',
    [
        {'force_zip64': True},
        {'compression': zipfile.ZIP_DEFLATED},
        {'compression': zipfile.ZIP_DEFLATED, 'force_zip64': True, 'comment': b'made by hand ' * 1000},
        {'slash': '/'},  # of maps for train.zip@/
    ],
    ids=['zip64', 'deflated', 'comment', 'slash'],
)
def test_zip_archives_of_every_kind(tree, tmp_path, options):
    folder = as_zip(tree, tmp_path / 'zip', **options)
    assert samples_of('zip', folder) == samples_of('imagenet', tree)


def test_zip_names_may_hold_any_letter(tree, tmp_path):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    for split in ('train', 'val'):
        (tree / split / 'class_2').rename(tree / split / 'größer 猫')
    assert samples_of('zip', as_zip(tree, tmp_path / 'zip')) == samples_of('imagenet', tree)


def write_zip(folder, contents, start=0):
    """An archive that begins at a position of its file, with a map of its one class."""
    with (folder / 'val.zip').open('wb') as file:
        file.seek(start)
        with zipfile.ZipFile(file, 'w') as archive:
            for name, content in contents.items():
                archive.writestr(zipfile.ZipInfo(name), content)
    (folder / 'val_map.txt').write_text(''.join(f'{name}\t0\n' for name in contents))


def test_zip_archives_of_more_than_65535_files(tmp_path):
    write_zip(tmp_path, {f'a/{i}.jpg': str(i) if i > 65_530 else '' for i in range(65_600)})
    samples = ZipArchive(tmp_path, 'val')
    assert len(samples) == 65_600
    assert [samples.read(i) for i in (0, 65_535, 65_599)] == [b'', b'65535', b'65599']


def test_zip_archives_beyond_4_gb(tmp_path):
    contents = {f'a/{i}.jpg': f'content {i}' for i in range(3)}
    write_zip(tmp_path, contents, start=5 << 30)  # the file has a hole
    samples = ZipArchive(tmp_path, 'val')
    assert [samples.read(i).decode() for i in range(3)] == list(contents.values())


def test_zip_without_class_folders_has_the_class_names_of_the_other_split(tree, tmp_path):
    """As Swin's: train.zip has class folders, val.zip has none."""
    folder = as_zip(tree, tmp_path / 'zip')
    val = samples_of('zip', folder, 'val')
    with zipfile.ZipFile(folder / 'val.zip', 'w') as archive:
        for i, (_, _, data) in enumerate(val):
            archive.writestr(f'val_{i}.png', data)
    (folder / 'val_map.txt').write_text(''.join(f'val_{i}.png\t{target}\n' for i, (_, target, _) in enumerate(val)))
    assert samples_of('zip', folder, 'val') == samples_of('imagenet', tree, 'val')
    for path in folder.glob('train*'):
        path.unlink()
    assert open_samples('zip', folder, 'val').classes == ['0', '1', '2']


# Hugging Face


def test_huggingface_rows_may_name_their_files(tree, tmp_path):
    """Recent versions of `save_to_disk` put the files into the rows, older ones did not."""
    import datasets

    samples = open_samples('huggingface', as_huggingface(tree, tmp_path / 'saved'), 'train')
    path = tree / 'train' / 'class_1' / '2.png'
    (tmp_path / 'saved' / 'files').mkdir()
    shutil.copy(path, tmp_path / 'saved' / 'files')
    (tmp_path / 'saved' / 'files' / 'link.png').symlink_to(path)
    outside = [str(path), '../images/2.png', 'files/link.png', '/dev/zero']
    inside = [str(tmp_path / 'saved' / 'files' / '2.png'), 'files/2.png']
    rows = [None, *({'bytes': None, 'path': name} for name in inside + outside)]
    samples.rows = datasets.Dataset.from_dict({'image': rows}, datasets.Features({'image': datasets.Image()}))
    for index in (1, 2):
        assert samples.read(index) == path.read_bytes()
    for index in (3, 4, 5, 6):
        with pytest.raises(DataError, match='is a file outside the folder of the dataset, which is not read'):
            samples.read(index)
    with pytest.raises(DataError, match=r'image 0/0.png in .*saved \(train\) is missing: leave the row out'):
        samples.read(0)


@pytest.mark.parametrize('label', [None, -1])
def test_huggingface_rows_without_a_class_are_reported(tmp_path, label):
    import datasets

    features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=['a', 'b'])})
    rows = [{'bytes': b'', 'path': None}] * 3
    saved = datasets.Dataset.from_dict({'image': rows, 'label': [0, 1, label]}, features)
    datasets.DatasetDict(test=saved).save_to_disk(tmp_path)
    with pytest.raises(DataError, match=r'\(val\) has rows without a class: leave them out'):
        open_samples('huggingface', tmp_path, 'val')


def test_huggingface_needs_one_column_of_images_and_one_of_classes(tmp_path):
    import datasets

    datasets.DatasetDict(train=datasets.Dataset.from_dict({'label': [0]})).save_to_disk(tmp_path)
    with pytest.raises(DataError, match=r"has 0 columns of type Image, not one: keep one of \['label'\]"):
        open_samples('huggingface', tmp_path, 'train')


# What is wrong with a dataset


@pytest.mark.parametrize('name', [name for name in PACKED if name != 'webdataset'])  # which has one list of them
def test_splits_with_other_classes_are_reported(tree, tmp_path, name):
    tree = shutil.copytree(tree, tmp_path / 'tree')
    (tree / 'val' / 'class_2').rename(tree / 'val' / 'class_3')
    with pytest.raises(DataError, match='have different class.*val/ has no class_2, train/ has no class_3'):
        open_samples(name, WRITERS[name](tree, tmp_path / name), 'train')


def test_splits_that_number_their_classes_differently_are_reported(tree, tmp_path):
    folder = as_zip(tree, tmp_path / 'zip')
    path = folder / 'val_map.txt'
    path.write_text(re.sub('\t[01]', lambda found: {'\t0': '\t1', '\t1': '\t0'}[found[0]], path.read_text()))
    with pytest.raises(DataError, match='train and val in .*zip number the same classes differently'):
        open_samples('zip', folder, 'train')


@pytest.mark.parametrize('name', PACKED)
def test_class_folders_are_named_where_another_format_was_expected(tree, name):
    expected = {'shards': 'has no index.json', 'zip': 'train.zip does not exist', 'huggingface': 'no dataset_dict.json'}
    expected |= {
        'table': 'has no table of train images: write train.csv',
        'webdataset': 'has no tars of train: name them',
    }
    with pytest.raises(DataError, match=expected[name]):
        open_samples(name, tree, 'train')


@pytest.mark.parametrize('name', [name for name in PACKED if name != 'table'])
def test_another_format_is_named_where_class_folders_were_expected(folder_in, name):
    with pytest.raises(DataError, match=f'has the format {name}: write --opts DATA.DATASET {name}'):
        open_samples('imagenet', folder_in(name), 'train')


def test_class_folders_may_have_their_archives_beside_them(tree, tmp_path):
    folder = as_zip(tree, tmp_path / 'zip')
    shutil.copytree(tree, folder, dirs_exist_ok=True)
    assert samples_of('imagenet', folder) == samples_of('imagenet', tree)


def remove(path):
    path.unlink()


def write(text, path):
    path.write_text(text)


def replace(before, after, path):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


NO_ZIP = r'train.zip cannot be read \(.*\): it is no complete zip archive'
REPACK = r': remove .*train and pack it again with python -m tools.pack_dataset'


@pytest.mark.parametrize(
    ('name', 'file', 'damage', 'message'),
    [
        ('shards', 'train/index.json', remove, r'train has no index.json: make shards with python -m tools.pack_da'),
        ('shards', 'train/index.json', partial(cut, size=300), rf'train/index.json is not JSON \(.*\){REPACK}'),
        ('shards', 'train/index.json', partial(write, '[]'), rf'train/index.json cannot be read \(.*\){REPACK}'),
        ('shards', 'train/index.json', partial(replace, 'tables', 'x'), rf"cannot be read \('tables'\){REPACK}"),
        (
            *('shards', 'train/index.json', partial(replace, '"format": 1', '"format": 7')),
            rf'train/index.json cannot be read \(format 7, not 1\){REPACK}',
        ),
        ('shards', 'train/samples.npy', partial(flip_byte, position=300), rf'samples.npy .*has changed.*{REPACK}'),
        ('shards', 'train/names.npy', partial(cut, size=200), rf'names.npy cannot be read \(it has changed.*{REPACK}'),
        ('shards', 'train/names.npy', remove, rf'names.npy cannot be read \(.*No such file.*\){REPACK}'),
        ('shards', 'train/shard_00001.tar', remove, rf'image class_0/5.png in .*shard_00001.tar .*No such.*{REPACK}'),
        (
            *('shards', 'train/shard_00001.tar', partial(cut, size=1000)),
            rf'image class_0/5.png in .*train/shard_00001.tar is cut short \(488 of \d+ bytes\){REPACK}',
        ),
        ('zip', 'train.zip', remove, 'train.zip does not exist: a zip dataset has'),
        ('zip', 'train_map.txt', remove, 'train_map.txt does not exist: a zip dataset has'),
        ('zip', 'train.zip', partial(cut, size=0), NO_ZIP),
        ('zip', 'train.zip', partial(cut, size=9000), NO_ZIP),
        ('zip', 'train.zip', lambda path: zipfile.ZipFile(path, 'w').close(), 'train.zip is empty: make the archive'),
        ('zip', 'train.zip', partial(flip_byte, position=2000), 'image class_2/7.png in .*zip .*checksum differs'),
        ('zip', 'train_map.txt', partial(write, ''), 'train_map.txt is empty: give the map'),
        ('zip', 'train_map.txt', partial(replace, '\t2', ' 2'), r'line 17 of .*train_map.txt is not `path<TAB>class'),
        ('zip', 'train_map.txt', partial(replace, '\t2', '\t4444444444'), r'line 17 of .*train_map.txt is not `path'),
        (
            *('zip', 'train_map.txt', partial(replace, '2/5', '2/x')),
            r'train.zip has no class_2/x.png, one of 1 in the map: give the map that was made with the archive',
        ),
        ('huggingface', 'dataset_dict.json', remove, 'no dataset_dict.json: give the folder that DatasetDict.save_to'),
        ('huggingface', 'train', shutil.rmtree, 'has no split train'),
        (
            *('huggingface', 'train/data-00000-of-00001.arrow', partial(cut, size=600)),
            r'train cannot be read \(.*\): save it again',
        ),
        ('huggingface', 'train/state.json', partial(cut, size=9), r'train cannot be read \(.*\): save it again'),
        ('huggingface', 'train/dataset_info.json', partial(write, '[]'), r'train cannot be read \(.*\): save it again'),
    ],
)
def test_damage_is_reported_in_one_line(folder_in, name, file, damage, message):
    folder = folder_in(name)
    damage(folder / file)
    with pytest.raises(DataError) as error:
        samples_of(name, folder)
    assert re.search(message, str(error.value))
    assert str(folder) in str(error.value)
    assert '\n' not in str(error.value)


# Memory


def private_memory():
    """Bytes that this process alone holds and has written."""
    lines = Path('/proc/self/smaps_rollup').read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith('Private_Dirty:')) * 1024


def read_often(dataset, results):
    """Read 25,000 samples, and report by how much memory has grown over the last 20,000."""
    for number in range(25_000):
        dataset[number % 24]
        if number == 5000:
            before = private_memory()
    results.put(private_memory() - before)


needs_proc = pytest.mark.skipif(not Path('/proc/self/smaps_rollup').exists(), reason='needs /proc/<pid>/smaps_rollup')


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize('pipeline', ['fast', 'published'])
def test_memory_of_a_loader_process_is_flat(tiny_config, tree, tmp_path, pipeline):
    """It grows by less than 8 MB over 20,000 samples: 400 bytes a sample."""
    config = tiny_config(
        DATA__DATASET='shards', DATA__DATA_PATH=str(as_shards(tree, tmp_path / 'shards')), DATA__PIPELINE=pipeline
    )
    context = worker_context()
    results = context.Queue()
    dataset = open_dataset(config, 'train')
    worker = context.Process(target=read_often, args=(dataset, results))
    worker.start()
    growth = results.get()
    worker.join()
    assert growth < 8e6


def test_a_list_of_names_is_a_sequence():
    names = NameList.of(['a', '', 'größer', '\udcff'])
    assert list(names) == ['a', '', 'größer', '\udcff']
    assert [names[i] for i in range(4)] == list(names)
    assert (names[-1], len(names), list(islice(names, 1))) == ('\udcff', 4, ['a'])
    assert list(NameList.of(map(str, range(2500)))) == list(map(str, range(2500)))  # in several parts
    with pytest.raises(IndexError):
        names[4]
