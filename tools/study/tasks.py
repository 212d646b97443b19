"""What a study needs to know of a task: its program, its keys, how networks are counted, and the metric."""

from collections.abc import Callable
from dataclasses import dataclass

from yacs.config import CfgNode

import config as classification
import detection.config
from engine.config_tree import ConfigTree
from tools.complexity import Complexity, classifier_complexity, detector_complexity


@dataclass(frozen=True, eq=False)
class Task:
    """A task.

    Attributes:
        module: its program.
        tree: its keys.
        count: parameters and multiply-adds of a config's network.
        metric: its name in metrics.jsonl, in percent.
        metric_name: its name in tables.
    """

    module: str
    tree: ConfigTree
    count: Callable[[CfgNode], Complexity]
    metric: str
    metric_name: str


def _count_detector(config: CfgNode) -> Complexity:
    """Count a detector for an image of its evaluation, 4 : 3, with all its proposals and detections."""
    height = config.INPUT.TEST_SHORT
    proposals, detections = config.MODEL.RPN.POST_NMS_TEST, config.MODEL.BOX.DETECTIONS
    return detector_complexity(config, height, round(height * 4 / 3), proposals, detections)


TASKS = {
    'classification': Task('main', classification.TREE, classifier_complexity, 'acc1', 'top-1'),
    'detection': Task('detection.main', detection.config.TREE, _count_detector, 'box_AP', 'box AP'),
}
