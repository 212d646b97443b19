"""A short description of a dataset, for the record of a run."""

import hashlib
from collections.abc import Iterable


def describe_samples(names: Iterable[str]) -> dict[str, int | str]:
    """Number of samples and a hash of their names, in order: equal where the samples are.

    Args:
        names: a name per sample, the same wherever and in whatever format the dataset is stored.

    Returns:
        The number as `images` and a hexadecimal SHA-256 hash as `sha256`.
    """
    digest, count = hashlib.sha256(), 0
    for name in names:
        digest.update(name.encode(errors='surrogateescape') + b'\0')  # names of files need not be Unicode
        count += 1
    return {'images': count, 'sha256': digest.hexdigest()}
