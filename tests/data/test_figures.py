"""The confusion matrix as a picture; sheets of images are in tools/test_predict.py."""

import numpy as np
import pytest

from data.figures import MAX_NAMED, draw_confusion


def test_confusion_has_a_name_for_each_row_and_column():
    counts = np.array([[5, 0, 1], [2, 3, 0], [0, 4, 0]])
    axes = draw_confusion(counts, ['cat', 'dog_$1', 'background'], 'object', 'detected as').axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ['cat', 'dog_$1', 'background']
    assert [text.get_text() for text in axes.texts] == ['5', '1', '2', '3', '4']
    assert (axes.get_ylabel(), axes.get_xlabel()) == ('object', 'detected as')


def test_confusion_grows_with_the_classes_and_has_its_numbers():
    small, large = (
        draw_confusion(7 * np.eye(k, dtype=int), [f'class {i}' for i in range(k)], 'object', 'detected as')
        for k in (3, 30)
    )
    assert small.get_figwidth() < 4
    assert large.get_figwidth() > 10
    assert len(large.axes[0].texts) == 30
    assert large.axes[0].texts[0].get_fontsize() >= 7
    large.canvas.draw()
    box = large.axes[0].get_tightbbox().transformed(large.transFigure.inverted())
    assert box.x0 + box.x1 == pytest.approx(1, abs=0.03)  # centred
    assert box.y0 + box.y1 == pytest.approx(1, abs=0.03)


def test_confusion_of_many_classes_lists_the_most_frequent_ones():
    counts = np.diag(np.full(MAX_NAMED + 1, 9))
    counts[3, 5], counts[100, 0] = 2, 8
    figure = draw_confusion(counts, [f'c{i}' for i in range(MAX_NAMED + 1)], 'class', 'predicted as')
    assert not figure.axes[0].texts
    assert figure.axes[1].texts[0].get_text().splitlines()[2:] == ['c100 → c0: 8 of 17', 'c3 → c5: 2 of 11']
