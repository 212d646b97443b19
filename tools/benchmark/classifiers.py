"""Classifiers with random weights, from config files and by timm's or torchvision's names, as benchmark cases."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn

from config import load_config
from engine.config_tree import ConfigError, task_of_file
from models import MSGTransformer, build_model, linear
from models.pyramid import Size
from tools.benchmark.cases import BenchmarkCase, Setting
from tools.benchmark.comparison import FORMS, FUSED, ONEDNN_LINEAR, is_config
from tools.flops import count_multiply_adds


class ClassifierCase(BenchmarkCase):
    """A classifier, on random images with random labels.

    Args:
        network: takes images (B, channels, height, width); its first layer is a convolution.
        setting, device: see `BenchmarkCase`.
    """

    def __init__(self, network: nn.Module, setting: Setting, device: torch.device):
        super().__init__(network, setting, device)
        shape = (setting.batch, image_channels(network), *Size.of(setting.size))
        self.images = torch.randn(shape, device=device).to(self.dtype)
        with torch.no_grad(), self.precision.autocast():
            classes = network.eval()(self.images[:1]).shape[1]
        network.train(setting.mode == 'train')
        self.targets = torch.randint(classes, (setting.batch,), device=device)

    def infer(self) -> Tensor:
        """Logits (B, classes)."""
        return self.compiled(self.images)

    def loss(self) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.compiled(self.images), self.targets)

    def batch_tensors(self) -> list[Tensor]:
        """Images and targets."""
        return [self.images, self.targets]

    def multiply_adds(self) -> int:
        """Multiply-adds of a call, over the real operators."""
        with torch.device('meta'):
            network, images = copy.deepcopy(self.network).to('meta'), torch.empty_like(self.images, device='meta')

        def run() -> None:
            logits = network(images)
            if self.optimizer is not None:
                logits.sum().backward()

        with torch.set_grad_enabled(self.optimizer is not None):
            return count_multiply_adds(run)


def build_network(name: str, size: int) -> nn.Module:
    """Build a network with random weights, from a config file or by timm's or torchvision's name.

    Args:
        name: a config file, `NAME`, `timm:NAME` or `torchvision:NAME`; after the latter three, `+onednn` for linear
            layers by oneDNN; after one of timm's, `+fused` before that, for fused attention.
        size: image size, in pixels.

    Raises:
        ConfigError: the name is unknown, or of another kind of network.
    """
    if is_config(name):
        if task_of_file(name) != 'classification':
            raise ConfigError(f'{name} is not a classifier: time it with python -m tools.benchmark detectors')
        return build_model(load_config(name, ['DATA.IMG_SIZE', str(size)]))
    if name.endswith(ONEDNN_LINEAR):
        return WithOneDNNLinear(build_network(name.removesuffix(ONEDNN_LINEAR), size))
    library, _, plain = name.removesuffix(FUSED).rpartition(':')
    if library in ('', 'timm') and timm.is_model(plain):
        with fused_attention(name.endswith(FUSED)):
            try:
                return timm.create_model(plain, img_size=size)
            except TypeError:  # a convolutional network, which takes any size
                return timm.create_model(plain)
    if library in ('', 'torchvision') and plain in torchvision.models.list_models(torchvision.models):
        return torchvision.models.get_model(plain)
    raise ConfigError(f'no network {name!r}: give a config file, or a name that timm or torchvision lists')


@contextmanager
def fused_attention(everywhere: bool) -> Iterator[None]:
    """Context in which timm's networks are made with fused attention: everywhere, or where timm does so by default."""
    before = use_fused_attn(), use_fused_attn(experimental=True)
    set_fused_attn(True, everywhere)
    try:
        yield
    finally:
        set_fused_attn(*before)


def with_other_forms(names: Sequence[str]) -> list[str]:
    """The names, each followed by the other forms that its network can have, so that peers lack no setting of ours.

    A network of timm whose fused attention is off by default has a form with fused attention. Where the layers of this
    project's networks are computed by oneDNN, every other network has each of its forms with such layers too.
    """
    result = []
    for name in names:
        forms = [name]
        if not is_config(name) and not name.endswith(FORMS):
            with torch.device('meta'):
                network = build_network(name, 224)
            if any(getattr(module, 'fused_attn', True) is False for module in network.modules()):
                forms.append(name + FUSED)
            if linear.LIBRARY == 'onednn' and not isinstance(network, MSGTransformer):
                forms += [form + ONEDNN_LINEAR for form in forms]
        result += forms
    return result


class WithOneDNNLinear(nn.Module):
    """A network whose fp32 linear layers are computed by oneDNN, as those of this project on some processors.

    Args:
        network: any network.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Run the network."""
        with linear.OneDNNLinear():
            return self.network(images)


def image_channels(network: nn.Module) -> int:
    """Channels of a network's images: those of its first convolution."""
    return next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))
