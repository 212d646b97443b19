"""The demos' data: scikit-learn's 1,797 handwritten digits, with a fixed split.

They are the test set of UCI's "Optical Recognition of Handwritten Digits". scikit-learn ships them, so nothing is
downloaded.
"""

from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Digits(NamedTuple):
    """Real handwritten digits.

    Attributes:
        images: grey values (1797, 8, 8), 0 to 16.
        labels: the digits, (1797,).
        splits: indices of `train` (80 %) and `val`, stratified, always the same.
    """

    images: np.ndarray
    labels: np.ndarray
    splits: dict[str, np.ndarray]


def load_split_digits() -> Digits:
    """Load the digits."""
    digits = load_digits()
    indices = np.arange(len(digits.target))
    train, val = train_test_split(indices, test_size=0.2, stratify=digits.target, random_state=0)
    return Digits(digits.images, digits.target, {'train': train, 'val': val})
