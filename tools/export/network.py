"""The network that is exported, as it runs eagerly, and what its input is."""

import argparse
from typing import Any, NamedTuple

import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from yacs.config import CfgNode

import detection.main
from data.transforms import image_mode, mean_and_std, resized_side
from engine.checkpoint import load_checkpoint
from engine.predictor import load_predictor
from engine.task import Task
from models import MSGTransformer
from models.pyramid import Size
from tools.msg_network import build_msg_network
from tools.tasks import TASKS
from utils import UserError


class ExportError(UserError):
    """A network or format that cannot be exported as asked; the message says what can."""


class Network(NamedTuple):
    """A trained network on the CPU, in evaluation mode.

    Attributes:
        task: its task.
        config: the config tree.
        graph: what is exported as a graph: the classifier itself, or the detector's backbone.
        outputs: names of the graph's outputs.
        class_names: of the checkpoint.
    """

    task: Task
    config: CfgNode
    graph: nn.Module
    outputs: list[str]
    class_names: list[str]

    @property
    def is_detector(self) -> bool:
        """Whether the network is a detector, of which the backbone is exported."""
        return self.task is detection.main.TASK

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.graph.in_chans

    @property
    def patch_size(self) -> int:
        """Patch size, in pixels: the smallest side of an image."""
        return self.graph.patch_embed.patch_size

    @property
    def default_size(self) -> Size | None:
        """The classifier's image size, in pixels; a detector has none."""
        return self.graph.img_size

    @property
    def normalization(self) -> tuple[str, tuple[float, ...], tuple[float, ...]]:
        """PIL mode of the images, and mean and standard deviation per channel of pixels in [0, 1]."""
        if self.is_detector:
            return 'RGB', IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        return image_mode(self.config), *mean_and_std(self.config)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """From an image to the input, as in evaluation, as plain data."""
        mode, mean, std = self.normalization
        if self.is_detector:
            resize = {'shorter_side': self.config.INPUT.TEST_SHORT, 'max_longer_side': self.config.INPUT.MAX_LONG}
            resize |= {'interpolation': 'bilinear', 'pad_to_multiple': self.patch_size * 2 ** (len(self.outputs) - 1)}
        else:
            size, crop = self.config.DATA.IMG_SIZE, self.config.TEST.CROP
            resize = {'shorter_side': resized_side(self.config), 'center_crop': size} if crop else {'size': size}
            resize['interpolation'] = self.config.DATA.INTERPOLATION
        return {
            'exif_transpose': self.config.DATA.EXIF,
            'mode': mode,
            'resize': resize,
            'scale': 1 / 255,
            'mean': list(mean),
            'std': list(std),
        }

    @property
    def plain_config(self) -> dict[str, Any]:
        """The config as plain data."""
        return yaml.safe_load(self.config.dump())

    def run(self, images: Tensor) -> list[Tensor]:
        """Outputs for images (B, channels, height, width), computed eagerly."""
        return as_list(self.graph(images))


def load_network(args: argparse.Namespace) -> Network:
    """Load the network that the command line names, of either task.

    Raises:
        UserError: a config or checkpoint that cannot be used.
    """
    checkpoint = load_checkpoint(args.resume)
    task = TASKS[checkpoint['task']]
    is_detector = task is detection.main.TASK
    predictor = load_predictor(args, task, None if is_detector else build_msg_network, checkpoint)
    graph = task.backbone(predictor.model).cpu().requires_grad_(False)
    if is_detector and not isinstance(graph, MSGTransformer):
        raise ExportError(
            f'the backbone of {args.resume} is {predictor.config.MODEL.BACKBONE}, which is not exported by itself: '
            f'write --format onnx --detector for the whole detector'
        )
    if is_detector:
        outputs = [str(i) for i in range(len(graph.out_channels))]
    else:
        outputs = ['logits' if graph.num_classes else 'features']
    return Network(task, predictor.config, graph, outputs, predictor.class_names)


def as_list(outputs: Tensor | dict[str, Tensor]) -> list[Tensor]:
    """Outputs of a network in their order."""
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs.values())
