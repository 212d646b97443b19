"""Whether two lists of class names mean the same classes. ImageNet's are known as WordNet ids and as words."""

from collections.abc import Sequence
from functools import cache

from timm.data import ImageNetInfo


def same_classes(ours: Sequence[str], theirs: Sequence[str] | None) -> bool | None:
    """Compare two lists of class names, position by position, without case and with underscores as spaces.

    Args:
        ours: names of the data's classes.
        theirs: names of a checkpoint's classes, if it has any.

    Returns:
        None if theirs are unknown. Otherwise whether all names agree: they are equal, or one is ImageNet's WordNet id
        (n01440764) or full description (tench, Tinca tinca), and the other its description or the first name in that.
    """
    if not theirs:
        return None
    if len(ours) != len(theirs):
        return False
    pairs = zip(map(_normalised, ours), map(_normalised, theirs), strict=True)
    return all(a == b or _describes(a, b) or _describes(b, a) for a, b in pairs)


def with_words(names: Sequence[str]) -> list[str]:
    """Class names, those that are WordNet ids of ImageNet with the first name they stand for: n01440764 tench."""
    words = ImageNetInfo('imagenet-1k').label_descriptions(as_dict=True)
    return [f'{name} {words[name].split(",")[0]}' if name in words else name for name in names]


def _normalised(name: str) -> str:
    return ' '.join(str(name).casefold().replace('_', ' ').split())


def _describes(name: str, words: str) -> bool:
    """Whether words describe an ImageNet class."""
    description = _descriptions().get(name)
    if description is None:
        return False
    first = description.split(',')[0]
    # torchvision adds a word to two names that ImageNet has twice, such as "crane bird"
    return words in (description, first) or words.startswith(f'{first} ')


@cache
def _descriptions() -> dict[str, str]:
    """Descriptions of ImageNet's 1000 classes by WordNet id and by themselves, normalised."""
    by_id = ImageNetInfo('imagenet-1k').label_descriptions(as_dict=True)
    by_id = {label: _normalised(text) for label, text in by_id.items()}
    return by_id | {text: text for text in by_id.values()}
