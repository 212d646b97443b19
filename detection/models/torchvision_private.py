"""torchvision's detection helpers that are not public API, imported in this one place."""

from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.ops.poolers import LevelMapper

__all__ = ['BalancedPositiveNegativeSampler', 'BoxCoder', 'LevelMapper', 'Matcher']
