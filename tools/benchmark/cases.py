"""Benchmark cases: a network under one setting, which infers a random batch or makes updates from it."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.precision import Precision
from models.pyramid import Size
from tools.benchmark.memory import peak_allocation, resident_bytes
from tools.benchmark.timing import synchronize
from utils import positive_int

DEVICES = ('auto', 'cuda', 'mps', 'cpu')
MODES = ('inference', 'train')
PRECISIONS = {
    'fp32': torch.float32,
    'tf32': torch.float32,
    'bf16': torch.bfloat16,
    'bf16-weights': torch.bfloat16,
    'fp16': torch.float16,
}
COMPILE_MODES = ('eager', 'compiled', 'graphs', 'freezing')

# So small that random weights stay finite over any number of updates
LEARNING_RATE = 1e-6


class Setting(NamedTuple):
    """How a network is run.

    Attributes:
        mode: 'inference', or 'train': forward, loss, backward, clipping and AdamW.
        precision: 'fp32', 'tf32', autocast to 'bf16' or 'fp16'; 'bf16-weights', with weights and images in bfloat16
            (inference).
        compile_mode: 'eager'; 'compiled' by torch.compile; 'graphs', which adds CUDA graphs; 'freezing', compiled with
            weights as constants (inference).
        batch: images.
        size: image size, in pixels: one number for a square, or height and width.
        threads: of the CPU; 0 leaves their number as it is.
    """

    mode: str = 'inference'
    precision: str = 'fp32'
    compile_mode: str = 'eager'
    batch: int = 8
    size: int | Size = 224
    threads: int = 0

    @property
    def pixels(self) -> int:
        """Pixels of a batch."""
        height, width = Size.of(self.size)
        return self.batch * height * width

    @property
    def variant(self) -> str:
        """All but batch and size, in words."""
        threads = f', {self.threads} thread(s)' if self.threads else ''
        return f'{self.mode}, {self.precision}, {self.compile_mode}{threads}'

    def __str__(self) -> str:
        return f'{self.variant}, batch {self.batch}, {self.size} px'


def add_timing_flags(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add the flags that say how often, with how many threads and on which device networks are timed.

    Args:
        parser: gets the flags.
        rounds: default of `--rounds`.
    """
    add = parser.add_argument
    add('--threads', nargs='+', type=positive_int, default=[0], metavar='N', help="CPU threads (default: PyTorch's)")
    add('--rounds', type=positive_int, default=rounds, metavar='N', help=f'how often each is timed (default: {rounds})')
    add('--device', choices=DEVICES, default='auto', help='auto takes a GPU if there is one (default: auto)')


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


class BenchmarkCase(ABC):
    """One network under one setting: a call infers the batch, or makes an update from it.

    An update is made by the functions that make it in training: see `engine.precision.Precision`.

    Args:
        network: moved to the device.
        setting: how it is run.
        device: device to run on.

    Attributes:
        compiled: the network as the setting compiles it.
        dtype: of the images.
    """

    def __init__(self, network: nn.Module, setting: Setting, device: torch.device):
        self.network, self.setting, self.device = network.to(device), setting, device
        is_training, dtype = setting.mode == 'train', PRECISIONS[setting.precision]
        self.precision = Precision('O1' if setting.precision in ('bf16', 'fp16') else 'O0', dtype, device)
        self.dtype = torch.float32
        if setting.precision == 'bf16-weights':
            network.to(dtype)
            self.dtype = dtype
        self.optimizer = None
        if is_training:
            fused = device.type in ('cuda', 'cpu')
            self.optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=0.05, fused=fused)
        network.train(is_training)
        self.compiled = network
        if setting.compile_mode != 'eager':
            # As options: networks of one class with the same options share what PyTorch has compiled.
            options = {
                'freezing': setting.compile_mode == 'freezing',
                'triton.cudagraphs': setting.compile_mode == 'graphs',
            }
            self.compiled = torch.compile(network, options=options, dynamic=False)

    @abstractmethod
    def infer(self) -> object:
        """Run the compiled network on the batch."""

    @abstractmethod
    def loss(self) -> Tensor:
        """The compiled network's loss on the batch."""

    @abstractmethod
    def batch_tensors(self) -> list[Tensor]:
        """The tensors of the batch."""

    def multiply_adds(self) -> int | None:
        """Multiply-adds of a call, over the real operators; None where they are not counted."""
        return None

    def __call__(self) -> object:
        """Run once; what the network infers, or the loss of an update. With batch 1, it waits, for the latency."""
        with tf32(self.setting.precision == 'tf32'):
            result = self._infer() if self.optimizer is None else self._update()
        if self.setting.batch == 1:
            synchronize(self.device)
        return result

    @torch.inference_mode()
    def _infer(self) -> object:
        with self.precision.autocast():
            return self.infer()

    def _update(self) -> Tensor:
        with self.precision.autocast():
            loss = self.loss()
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
        """Bytes kept from run to run: weights, buffers, the optimizer's moments and the batch."""
        return resident_bytes(self.network, self.optimizer, *self.batch_tensors())

    def peak_memory(self) -> int:
        """Peak bytes of a run after `warm_up`: resident ones, and what the run allocates.

        It does not include workspace that libraries allocate themselves, nor the memory pools of CUDA graphs.
        """
        return self.resident_bytes() + peak_allocation(self, self.device)


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
