"""A dataset whose images show several of three classes: a square of a colour for each.

As a file of `--import`, it registers the dataset; as a module of the tests, it does not.
"""

import numpy as np
from torch.utils.data import Dataset

from data.python_dataset import register_dataset


class SeveralLabels(Dataset):
    def __init__(self, config, split):
        self.count = 24 if split == 'train' else 11
        self.names = [f'{split} {i}' for i in range(self.count)]
        self.classes = ['red', 'green', 'blue']

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        labels = [label for label in range(3) if (index + 1) >> label & 1]
        image = np.random.default_rng(index).integers(0, 100, (32, 32, 3), dtype=np.uint8)
        for label in labels:
            image[10 * label : 10 * label + 10, 10 * label : 10 * label + 10, label] += 150
        return image, labels if index % 2 else np.isin(np.arange(3), labels)


if __name__ == 'several_labels':
    register_dataset(__name__)(SeveralLabels)
