"""Benchmark cases: a network under one setting, its memory and its multiply-adds."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import set_fused_attn, use_fused_attn
from torch import Tensor, nn

from config import load_config
from engine.config_tree import ConfigError
from engine.memory import peak_allocation, resident_bytes
from engine.precision import Precision
from engine.timing import synchronize
from models import build_model
from tools.flops import count_multiply_adds

MODES = ('inference', 'train')
PRECISIONS = {
    'fp32': torch.float32,
    'tf32': torch.float32,
    'bf16': torch.bfloat16,
    'bf16-weights': torch.bfloat16,
    'fp16': torch.float16,
}
COMPILE_MODES = ('eager', 'compiled', 'graphs', 'freezing')

# After the name of a timm network: with fused attention, also where timm's default is not to use it
FUSED = '+fused'


class Setting(NamedTuple):
    """How a network is run.

    Attributes:
        mode: 'inference', or 'train': forward, loss, backward, clipping and AdamW.
        precision: 'fp32', 'tf32', autocast to 'bf16' or 'fp16'; 'bf16-weights', with weights and images in bfloat16
            (inference).
        compile_mode: 'eager'; 'compiled' by torch.compile; 'graphs', which adds CUDA graphs; 'freezing', compiled with
            weights as constants (inference).
        batch: images.
        size: image size, in pixels.
        threads: of the CPU; 0 leaves their number as it is.
    """

    mode: str = 'inference'
    precision: str = 'fp32'
    compile_mode: str = 'eager'
    batch: int = 8
    size: int = 224
    threads: int = 0

    def __str__(self) -> str:
        threads = f', {self.threads} thread(s)' if self.threads else ''
        return f'{self.mode}, {self.precision}, {self.compile_mode}, batch {self.batch}, {self.size} px{threads}'


def unavailable(setting: Setting, device: torch.device) -> str:
    """Why the device cannot run a setting; '' if it can."""
    if setting.mode == 'train' and (setting.compile_mode == 'freezing' or setting.precision == 'bf16-weights'):
        return f'{setting.precision}, {setting.compile_mode}: for inference'
    base = setting.precision.removesuffix('-weights')
    if device.type == 'cuda':
        if base in ('tf32', 'bf16') and torch.cuda.get_device_capability(device) < (8, 0):
            return f'this GPU has no {base}'
        return ''
    if setting.precision == 'tf32' or setting.compile_mode == 'graphs':
        return f'{setting.precision}, {setting.compile_mode}: for NVIDIA GPUs only'
    if device.type == 'cpu' and base in ('bf16', 'fp16'):
        capabilities = torch.cpu.get_capabilities()
        if not any(capabilities.get(f'{unit}_{base}') for unit in ('avx512', 'amx')):
            return f'this processor has no {base} instructions'
    return ''


def build_network(name: str, size: int) -> nn.Module:
    """Build a network with random weights, from a config file or by timm's or torchvision's name.

    Args:
        name: a config file, `NAME`, `timm:NAME` or `torchvision:NAME`; after one of timm's, `+fused`.
        size: image size, in pixels.

    Raises:
        ConfigError: the name is unknown.
    """
    if name.endswith(('.yaml', '.yml')):
        return build_model(load_config(name, ['DATA.IMG_SIZE', str(size)]))
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


def with_fused_attention(names: Sequence[str]) -> list[str]:
    """The names, each of a timm network whose fused attention is off by default followed by that with `+fused`."""
    result = []
    for name in names:
        result.append(name)
        if name.endswith(('.yaml', '.yml', FUSED)) or not timm.is_model(name.removeprefix('timm:')):
            continue
        with torch.device('meta'):
            network = build_network(name, 224)
        if any(getattr(module, 'fused_attn', True) is False for module in network.modules()):
            result.append(name + FUSED)
    return result


def short_name(name: str) -> str:
    """A network's name in tables."""
    return Path(name).stem if name.endswith(('.yaml', '.yml')) else name


def image_channels(network: nn.Module) -> int:
    """Channels of a network's images: those of its first convolution."""
    return next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))


class BenchmarkCase:
    """One network under one setting: a call runs a batch, or an update, of random images.

    Args:
        network: a classifier of images (B, channels, size, size) whose first layer is a convolution; moved to the
            device.
        setting: how it is run.
        device: device to run on.
    """

    def __init__(self, network: nn.Module, setting: Setting, device: torch.device):
        self.network, self.setting, self.device = network.to(device), setting, device
        dtype = PRECISIONS[setting.precision]
        level = 'O1' if setting.precision in ('bf16', 'fp16') else 'O0'
        self.precision = Precision(level, dtype, device)
        self.images = torch.randn(setting.batch, image_channels(network), setting.size, setting.size, device=device)
        if setting.precision == 'bf16-weights':
            network.to(dtype)
            self.images = self.images.to(dtype)
        with torch.no_grad(), self.precision.autocast():
            classes = network.eval()(self.images[:1]).shape[1]
        self.targets = torch.randint(classes, (setting.batch,), device=device)
        self.optimizer = None
        if setting.mode == 'train':
            fused = device.type in ('cuda', 'cpu')
            self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=fused)
        network.train(setting.mode == 'train')
        self.compiled = network
        if setting.compile_mode != 'eager':
            # As options: networks of one class with the same options share what PyTorch has compiled.
            options = {
                'freezing': setting.compile_mode == 'freezing',
                'triton.cudagraphs': setting.compile_mode == 'graphs',
            }
            self.compiled = torch.compile(network, options=options, dynamic=False)

    def __call__(self) -> Tensor:
        """Run once; logits (B, classes), or the loss of an update. With batch 1, it waits, for the latency."""
        with tf32(self.setting.precision == 'tf32'):
            result = self._infer() if self.optimizer is None else self._update()
        if self.setting.batch == 1:
            synchronize(self.device)
        return result

    @torch.inference_mode()
    def _infer(self) -> Tensor:
        with self.precision.autocast():
            return self.compiled(self.images)

    def _update(self) -> Tensor:
        with self.precision.autocast():
            loss = F.cross_entropy(self.compiled(self.images), self.targets)
        self.precision.backward(loss, self.optimizer)
        self.precision.step(self.optimizer, self.network, 5.0, skip_update=torch.zeros_like(loss, dtype=torch.bool))
        return loss.detach()

    def warm_up(self) -> None:
        """Compile, and let libraries choose algorithms and allocators their blocks."""
        if self.setting.compile_mode != 'eager':
            import torch._dynamo.config as dynamo  # seconds to import
            import torch._inductor.config as inductor

            # Networks of one class count together, and PyTorch would run those after the eighth eagerly.
            limits = {'recompile_limit': 1000, 'accumulated_recompile_limit': 1000, 'fail_on_recompile_limit_hit': True}
            with dynamo.patch(limits), inductor.patch(freezing=self.setting.compile_mode == 'freezing'):
                self()
        for _ in range(2):
            self()

    def resident_bytes(self) -> int:
        """Bytes kept from run to run: weights, buffers, the optimizer's moments and the images."""
        return resident_bytes(self.network, self.optimizer, self.images, self.targets)

    def peak_memory(self) -> int:
        """Peak bytes of a run after `warm_up`: resident ones, and what the run allocates.

        It does not include workspace that libraries allocate themselves, nor the memory pools of CUDA graphs.
        """
        return self.resident_bytes() + peak_allocation(self, self.device)

    def multiply_adds(self) -> int:
        """Multiply-adds of a run, over the real operators."""
        with torch.device('meta'):
            network, images = copy.deepcopy(self.network).to('meta'), torch.empty_like(self.images, device='meta')

        def run() -> None:
            logits = network(images)
            if self.optimizer is not None:
                logits.sum().backward()

        with torch.set_grad_enabled(self.optimizer is not None):
            return count_multiply_adds(run)


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Context in which GPUs round fp32 matmuls and convolutions to TensorFloat-32, or do not."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
