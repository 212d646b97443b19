"""Names of classes: the words of ImageNet's WordNet ids, and a dataset's classes among those of a network."""

from collections.abc import Sequence

from timm.data import ImageNetInfo

from data.images import DataError
from data.samples import same_letters


def with_words(names: Sequence[str]) -> list[str]:
    """Class names, those that are WordNet ids of ImageNet with the first name they stand for: n01440764 tench."""
    words = ImageNetInfo('imagenet-1k').label_descriptions(as_dict=True)
    return [f'{name} {words[name].split(",")[0]}' if name in words else name for name in names]


def class_indices(classes: Sequence[str], known: Sequence[str] | None, count: int, where: str, path: str) -> list[int]:
    """Find a dataset's classes among those of a network, by name.

    A network of 1000 classes without names is assumed to have those of ImageNet-1K, in the order of the WordNet ids. If
    the dataset's classes are numbers instead of the network's names, as in ImageNet-V2, they are class indices.

    Args:
        classes: names of the dataset's classes.
        known: names of the network's classes; None or empty if they are unknown.
        count: number of the network's classes.
        where: the dataset, for messages.
        path: the checkpoint, for messages.

    Returns:
        For each class of the dataset, the index of the network's output.

    Raises:
        DataError: the names are unknown, or the network does not have one of them.
    """
    if not known and count == 1000:
        known = ImageNetInfo('imagenet-1k').label_names()
    if not known or len(known) != count:
        raise DataError(
            f'{path} does not record the names of its {count} classes, and TEST.CLASSES subset needs them: give the '
            f'checkpoint as its run wrote it'
        )
    indices = {same_letters(str(name)): index for index, name in enumerate(known)}
    missing = [name for name in classes if same_letters(name) not in indices]
    if len(missing) == len(classes) and all(name.isdecimal() and int(name) < count for name in classes):
        numbers = [int(name) for name in classes]
        if len(set(numbers)) < len(numbers):
            raise DataError(f'{where} has two classes of the same number, such as 7 and 07: rename one')
        return numbers
    if missing:
        more = f' and {len(missing) - 3} more' if len(missing) > 3 else ''
        raise DataError(
            f'{where} has classes that {path} does not know ({", ".join(missing[:3])}{more}): name its class folders '
            f'as in training, such as {", ".join(list(indices)[:2])}'
        )
    return [indices[same_letters(name)] for name in classes]
