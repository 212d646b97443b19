import pytest
from timm.data import ImageNetInfo
from torchvision.models import ResNet18_Weights

from engine.class_names import same_classes

IDS = ['n01440764', 'n01443537', 'n03000684']
WORDS = ['tench', 'goldfish', 'chain saw']
DESCRIPTIONS = ['tench, Tinca tinca', 'goldfish, Carassius auratus', 'chain saw, chainsaw']


@pytest.mark.parametrize('theirs', [None, []])
def test_names_that_are_missing_are_unknown(theirs):
    assert same_classes(['a', 'b'], theirs) is None


@pytest.mark.parametrize(
    ('ours', 'theirs', 'expected'),
    [
        (['a', 'b'], ['a', 'b'], True),
        (['a', 'b'], ('a', 'b'), True),
        (['Red_Fox', 'dog'], ['red fox', 'DOG'], True),
        (['a', 'b'], ['b', 'a'], False),
        (['a', 'b'], ['a', 'b', 'c'], False),
        (['a', 'b'], ['a', 'c'], False),
        (['cat'], ['cat, domestic'], False),
        (['cat'], ['cat food'], False),
        (IDS, IDS, True),
        (IDS, DESCRIPTIONS, True),
        (IDS, ['Tench', 'GOLDFISH', 'chain_saw'], True),
        (DESCRIPTIONS, WORDS, True),
        (IDS, [*DESCRIPTIONS[:2], 'chainsaw'], False),
        (IDS, WORDS[::-1], False),
        (IDS, IDS[::-1], False),
        (IDS, ['cat', 'dog', 'bird'], False),
        (['n99999999'], ['tench'], False),
        (['n01440764'], ['tenches'], False),
    ],
)
def test_names_are_compared_by_position(ours, theirs, expected):
    assert same_classes(ours, theirs) is expected
    assert same_classes(theirs, ours) is expected


def test_all_names_of_imagenet():
    info = ImageNetInfo('imagenet-1k')
    ids, descriptions = info.label_names(), info.label_descriptions()
    words = ResNet18_Weights.DEFAULT.meta['categories']
    for names in (descriptions, words):
        assert same_classes(ids, names)
        assert not same_classes(ids, [*names[1:], names[0]])
    assert same_classes(descriptions, words)
