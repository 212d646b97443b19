"""Out-of-distribution detection: images that probably show none of a classifier's classes, by a score of the logits.

The score and its threshold are config keys, so they are stored with the weights. `tools.unknown_threshold` chooses
both.
"""

import torch
from torch import Tensor
from yacs.config import CfgNode

UNKNOWN = 'probably none of the known classes'


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)


# Scores of logits (..., K), by value of TEST.UNKNOWN_SCORE. The higher, the less an image looks like a known class.
SCORES = {
    'max_softmax': lambda logits: 1 - logits.softmax(dim=-1).amax(dim=-1),  # arXiv:1610.02136
    'entropy': _entropy,  # of the softmax, in nats
    'energy': lambda logits: -logits.logsumexp(dim=-1),  # arXiv:2010.03759
}


def flag_unknown(logits: Tensor, config: CfgNode) -> list[bool] | None:
    """Tell which images probably show none of the classes.

    Args:
        logits: (B, K).
        config: the config tree; `TEST` has the score and the threshold.

    Returns:
        A flag per image; None if `TEST.UNKNOWN_SCORE` is ''.
    """
    if not config.TEST.UNKNOWN_SCORE:
        return None
    scores = SCORES[config.TEST.UNKNOWN_SCORE](logits.float())
    return (scores > config.TEST.UNKNOWN_THRESHOLD).tolist()
