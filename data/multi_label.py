"""Labels of images that may show several classes at once."""

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.images import PartError, kind_of_value
from utils import shortened


def multi_hot(label: Any, classes: int, name: str) -> Tensor:
    """The target of an image with several classes: 1 for each of its classes and 0 for the others, (classes,) float32.

    Args:
        label: an array or tensor (classes,) of 0 and 1; or the list of the class indices, which may be empty; or the
            index of a single class.
        classes: number of classes.
        name: of the image, for errors.

    Raises:
        PartError: the label is something else.
    """
    if isinstance(label, np.ndarray | Tensor) and label.ndim:
        vector = torch.as_tensor(label)
        if vector.shape != (classes,) or not ((vector == 0) | (vector == 1)).all():
            raise PartError(
                f'the label of {name} is {kind_of_value(label)}: return ({classes},) values of 0 and 1, or a list of '
                f'class indices'
            )
        return vector.float()
    try:
        indices = [operator.index(x) for x in (label if isinstance(label, list | tuple | set) else [label])]
    except (TypeError, ValueError) as error:
        raise PartError(
            f'the label of {name} is {kind_of_value(label)}: return a list of class indices, or an array of '
            f'({classes},) values of 0 and 1'
        ) from error
    if any(not 0 <= index < classes for index in indices) or len(set(indices)) < len(indices):
        raise PartError(
            f'the label of {name} is {shortened(str(indices))}: return each class index once, from 0 to {classes - 1}; '
            f'or an array of ({classes},) values of 0 and 1'
        )
    vector = torch.zeros(classes)
    vector[indices] = 1
    return vector


def class_probabilities(logits: Tensor, config: CfgNode) -> Tensor:
    """Class probabilities from logits: a sigmoid for each class with `DATA.MULTI_LABEL`, otherwise a softmax.

    Args:
        logits: (..., classes).
        config: the config tree.

    Returns:
        Sigmoid or softmax of the logits, (..., classes).
    """
    return logits.sigmoid() if config.DATA.MULTI_LABEL else logits.softmax(dim=-1)
