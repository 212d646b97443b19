"""Pack an image dataset into tar shards with an index, for DATA.DATASET shards.

    python -m tools.pack_dataset <imagenet> <shards>

SOURCE may have any format of docs/data.md: class folders, a CSV or Parquet file of labels, WebDataset tars, Swin's zip
layout, a saved Hugging Face DatasetDict.
Run the same command again to resume an interrupted run; on complete shards, it verifies their checksums.
"""

if __name__ == '__main__':
    import startup

    startup.before_imports()

import argparse
import fcntl
import hashlib
import io
import json
import os
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from data.formats import FORMATS, find_format, open_samples
from data.images import IMAGE_FORMATS, DataError, is_image_file, read_error
from data.samples import Samples
from data.shards import FORMAT, INDEX, NAMES, SAMPLE, SAMPLES, Shards, read_index, sha256_of, shard_name
from text_files import read_json
from utils import (
    atomic_write,
    exit_on_user_error,
    first_line,
    home_path,
    positive_int,
    printable,
    remove_dead_temporaries,
    report_write_errors,
)


class PackedShard(NamedTuple):
    """A finished shard.

    Attributes:
        sha256, bytes: of the tar.
        fingerprint: of the split and the number of samples per shard, see `fingerprint_of`.
        table: (offset, bytes) of each image in the tar.
    """

    sha256: str
    bytes: int
    fingerprint: str
    table: list[tuple[int, int]]


class _HashingWriter:
    """A file opened for writing that hashes what goes through it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def pack_split(samples: Samples, root: Path, samples_per_shard: int = 10_000, name: str = '') -> int:
    """Write the shards of a split and their index; finished shards of an interrupted run are verified and kept.

    Args:
        samples: the split.
        root: folder to write.
        samples_per_shard: the last shard may have fewer.
        name: of the split, for the progress bar.

    Returns:
        Number of shards.

    Raises:
        DataError: an image cannot be read, the folder holds shards of something else, a checksum differs, or another
            process packs into it.
        OutputError: the folder cannot be written.
    """
    fingerprint = fingerprint_of(samples, samples_per_shard)
    starts = range(0, len(samples), samples_per_shard)
    with (
        report_write_errors(root),
        _locked(root),
        tqdm(total=len(samples), desc=f'pack {name}', unit='image', disable=None) as bar,
    ):
        index = read_index(root)
        if index is not None:
            if index['fingerprint'] != fingerprint or len(index['shards']) != len(starts):
                raise _other_shards(root)
            Shards(root.parent, root.name)  # checks its tables
        remove_dead_temporaries(root)
        shards = []
        for number, start in enumerate(starts):
            indices = range(start, min(start + samples_per_shard, len(samples)))
            path = root / shard_name(number)
            if index is not None:
                verify(path, index['shards'][number])
            else:
                shards.append(_finished_shard(path, fingerprint) or _write_shard(samples, indices, path, fingerprint))
            bar.update(len(indices))
        if index is None:
            _write_index(samples, root, shards, starts, fingerprint)
            for number in range(len(starts)):
                _receipt_of(root / shard_name(number)).unlink(missing_ok=True)
    return len(starts)


def fingerprint_of(samples: Samples, samples_per_shard: int) -> str:
    """A hash of what decides which sample lies where: names, targets, classes, samples per shard."""
    digest = hashlib.sha256(json.dumps([samples.classes, samples_per_shard]).encode())
    digest.update(np.ascontiguousarray(samples.targets, np.int32).tobytes())
    digest.update(np.ascontiguousarray(samples.names.content).tobytes())
    digest.update(np.ascontiguousarray(samples.names.ends, np.int64).tobytes())
    return digest.hexdigest()


def verify(path: Path, recorded: dict[str, Any]) -> None:
    """Check that a shard is what was written.

    Raises:
        DataError: it is missing or has changed.
    """
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise read_error(f'shard {path}', error, 'remove its folder and pack again') from error
    if actual != recorded['sha256']:
        raise DataError(f'shard {path} has changed since it was written: remove its folder and pack again')


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    """Make a folder, and keep other processes from packing into it."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / '.lock').open('w', encoding='utf-8') as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise DataError(f'another process packs into {root}: wait for it, or give another TARGET') from error
        yield


def _receipt_of(path: Path) -> Path:
    """The file that says that a shard is complete, until all of them are."""
    return path.with_suffix('.json')


def _finished_shard(path: Path, fingerprint: str) -> PackedShard | None:
    """The shard, if an earlier run has finished it."""
    if not (path.exists() and _receipt_of(path).exists()):
        return None
    receipt = read_json(_receipt_of(path), str(_receipt_of(path)), DataError, 'remove it')
    try:
        shard = PackedShard(**receipt)
        np.array(shard.table, np.int64).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f'{_receipt_of(path)} is damaged ({first_line(error)}): remove it') from error
    if shard.fingerprint != fingerprint:
        raise _other_shards(path.parent)
    verify(path, shard._asdict())
    return shard


def _other_shards(root: Path) -> DataError:
    return DataError(
        f'{root} holds shards of another dataset, or with another --samples-per-shard: '
        f'give another TARGET, or remove that folder'
    )


def _write_shard(samples: Samples, indices: range, path: Path, fingerprint: str) -> PackedShard:
    table = []

    def write(file: BinaryIO) -> None:
        nonlocal written
        written = _HashingWriter(file)
        with tarfile.open(fileobj=written, mode='w', format=tarfile.USTAR_FORMAT) as tar:
            for index in indices:
                data, suffix = samples.read(index), _member_suffix(samples.names[index])
                table.append((tar.offset + tarfile.BLOCKSIZE, len(data)))
                for name, content in ((suffix, data), ('.cls', str(samples.targets[index]).encode())):
                    info = tarfile.TarInfo(f'{index:09d}{name}')
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))

    written = None
    atomic_write(path, write)
    shard = PackedShard(written.digest.hexdigest(), written.size, fingerprint, table)
    verify(path, shard._asdict())
    atomic_write(_receipt_of(path), lambda file: file.write(json.dumps(shard._asdict()).encode()))
    return shard


def _member_suffix(name: str) -> str:
    """The suffix of a sample's image in a shard: that of its file if it is one of an image, else `.img`.

    All suffixes of JPEG files become `.jpg`: other readers of WebDataset, such as timm's, look for that one.
    """
    suffix = Path(name).suffix.lower()
    if suffix in IMAGE_FORMATS['JPEG']:
        return '.jpg'
    return suffix if is_image_file(suffix) else '.img'


def _write_index(samples: Samples, root: Path, shards: list[PackedShard], starts: range, fingerprint: str) -> None:
    table = np.zeros(len(samples), SAMPLE)
    places = [place for shard in shards for place in shard.table]
    table['offset'], table['bytes'] = np.array(places, np.int64).T
    table['target'], table['name_end'] = samples.targets, samples.names.ends
    atomic_write(root / SAMPLES, lambda file: np.save(file, table))
    atomic_write(root / NAMES, lambda file: np.save(file, samples.names.content))
    index = {
        'format': FORMAT,
        'samples': len(samples),
        'classes': samples.classes,
        'fingerprint': fingerprint,
        'tables': {name: sha256_of(root / name) for name in (SAMPLES, NAMES)},
        'shards': [
            {'first_sample': start, 'bytes': shard.bytes, 'sha256': shard.sha256}
            for start, shard in zip(starts, shards, strict=True)
        ],
    }
    atomic_write(root / INDEX, lambda file: file.write(json.dumps(index, indent=1).encode()))


def main() -> None:
    """Read the command line and pack `train` and `val`."""
    parser = argparse.ArgumentParser(
        'python -m tools.pack_dataset',
        description=__doc__.splitlines()[0],
        epilog=__doc__.split('\n\n', 2)[2],
        allow_abbrev=False,
    )
    parser.add_argument('source', type=home_path, metavar='SOURCE', help='folder of the dataset')
    parser.add_argument('target', type=home_path, metavar='TARGET', help='folder to write train/ and val/ in')
    parser.add_argument(
        '--format', choices=sorted(FORMATS), help='format of SOURCE (default: recognised from its files)'
    )
    parser.add_argument(
        '--samples-per-shard',
        type=positive_int,
        default=10_000,
        metavar='N',
        help='images per shard (10000, about 1.1 GB of ImageNet)',
    )
    args = parser.parse_args()
    with exit_on_user_error():
        if not os.path.isdir(args.source):
            raise DataError(f'{args.source} does not exist: give the folder of a dataset')
        name = args.format or find_format(args.source)
        splits = [split for split in ('train', 'val') if FORMATS[name].find_classes(args.source, split)]
        if not splits:
            raise DataError(f'{args.source} holds neither train nor val of the format {name}')
        if args.target.resolve() == args.source.resolve():
            raise DataError(f'{args.target} is the source: give another TARGET')
        for split in splits:
            samples = open_samples(name, args.source, split)
            if samples.is_multi_label:
                raise DataError(
                    f'{samples.where} has images of several classes, and a shard has one for each: train on it directly'
                )
            for note in samples.notes:
                print(printable(f'{split}: {note}'), file=sys.stderr)
            shards = pack_split(samples, args.target / split, args.samples_per_shard, split)
            print(printable(f'{args.target / split}: {len(samples):,} images in {shards} shard(s), verified'))


if __name__ == '__main__':
    main()
