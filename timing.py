"""How fast and how large: networks run in turns in one process, beside a plain product of matrices.

A machine's speed changes from minute to minute, so two times compare only where they were taken in turns:
`in_turns` runs every task once a round, and figures are medians over rounds, also of the ratio within a round.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from precision import Precision

MODES = ('inference', 'train')
PRECISIONS = {'fp32': torch.float32, 'tf32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}
COMPILES = ('eager', 'compiled', 'graphs', 'frozen')


class Spread(NamedTuple):
    """Median and quartiles of a figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> 'Spread':
        """Of one value a round."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)


class Setting(NamedTuple):
    """How a network is run.

    Attributes:
        mode: 'inference', or 'train': forward, loss, backward, clipping and AdamW.
        precision: 'fp32', 'tf32', or autocast to 'bf16' or 'fp16'.
        compile: 'eager'; 'compiled' by torch.compile; 'graphs', which adds CUDA graphs; 'frozen', compiled with its
            weights as constants (inference).
        batch: images.
        size: their side, in pixels.
    """

    mode: str = 'inference'
    precision: str = 'fp32'
    compile: str = 'eager'
    batch: int = 8
    size: int = 224


def unavailable(setting: Setting, device: torch.device) -> str:
    """Why the device cannot run this, in words; '' if it can."""
    if setting.mode == 'train' and setting.compile == 'frozen':
        return 'frozen weights do not train'
    if device.type == 'cuda':
        if setting.precision in ('tf32', 'bf16') and torch.cuda.get_device_capability(device) < (8, 0):
            return f'this GPU has no {setting.precision}'
        return ''
    if setting.precision == 'tf32' or setting.compile == 'graphs':
        return f'{setting.precision}, {setting.compile}: for GPUs of NVIDIA'
    if device.type != 'cpu':
        return ''
    if setting.precision == 'bf16' and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 'this processor has no bf16 instructions'
    if setting.precision == 'fp16' and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        return 'this processor has no fp16 instructions'
    return ''


def image_channels(network: nn.Module) -> int:
    """Channels of the images that a network takes: its first convolution's."""
    return next(module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d))


class Task:
    """One network under one setting: calling it runs a batch, or an update, of random images.

    Args:
        network: a classifier of images (B, channels, size, size) that begins with a convolution; put on the device.
        setting: how it is run.
        device: where.
    """

    def __init__(self, network: nn.Module, setting: Setting, device: torch.device):
        self.network, self.setting, self.device = network.to(device), setting, device
        low = setting.precision in ('bf16', 'fp16')
        self.precision = Precision('O1' if low else 'O0', PRECISIONS[setting.precision], device)
        self.images = torch.randn(setting.batch, image_channels(network), setting.size, setting.size, device=device)
        with torch.no_grad(), self.precision.autocast():
            classes = network.eval()(self.images[:1]).shape[1]
        self.targets = torch.randint(classes, (setting.batch,), device=device)
        self.optimizer = None
        if setting.mode == 'train':
            fused = device.type in ('cuda', 'cpu')
            self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.05, fused=fused)
        network.train(setting.mode == 'train')
        self.runs = network
        if setting.compile != 'eager':
            # Options, since PyTorch takes what it has compiled for another network of the class with the same ones.
            options = {'freezing': setting.compile == 'frozen', 'triton.cudagraphs': setting.compile == 'graphs'}
            self.runs = torch.compile(network, options=options, dynamic=False)

    def __call__(self) -> Tensor:
        """Run once; logits (B, classes), or the loss of an update. One image is waited for, for its latency."""
        with tf32(self.setting.precision == 'tf32'):
            result = self._infer() if self.optimizer is None else self._update()
        if self.setting.batch == 1:
            synchronize(self.device)
        return result

    @torch.inference_mode()
    def _infer(self) -> Tensor:
        with self.precision.autocast():
            return self.runs(self.images)

    def _update(self) -> Tensor:
        with self.precision.autocast():
            loss = F.cross_entropy(self.runs(self.images), self.targets)
        self.precision.backward(loss, self.optimizer)
        self.precision.step(self.optimizer, self.network, max_norm=5.0, veto=torch.zeros_like(loss, dtype=torch.bool))
        return loss.detach()

    def warm_up(self) -> None:
        """Compile, and let libraries choose their algorithms and allocators their blocks."""
        if self.setting.compile != 'eager':
            import torch._dynamo.config as dynamo  # seconds to import
            import torch._inductor.config as inductor

            # Networks of a class count together, and PyTorch would run those after the eighth eagerly.
            many = {'recompile_limit': 1000, 'accumulated_recompile_limit': 1000, 'fail_on_recompile_limit_hit': True}
            with dynamo.patch(many), inductor.patch(freezing=self.setting.compile == 'frozen'):
                self()
        for _ in range(2):
            self()

    def held(self) -> int:
        """Bytes of weights, buffers, the optimizer's moments and the images, which stay from run to run."""
        kept: list[Tensor] = [*self.network.parameters(), *self.network.buffers(), self.images, self.targets]
        if self.optimizer is not None:
            kept += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.nbytes for tensor in kept)

    def peak_memory(self) -> int:
        """Most bytes at any time of a run after `warm_up`: what is held, and what the run allocates.

        Workspace that libraries take from the system themselves is not in it, nor what CUDA graphs keep for themselves.
        """
        if self.device.type == 'cuda':
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self()
            return self.held() + torch.cuda.max_memory_allocated(self.device) - before
        with profile(profile_memory=True, acc_events=True) as run:
            self()
        events = [e for e in run.profiler.kineto_results.events() if e.name() == '[memory]']
        events.sort(key=lambda event: event.start_ns())
        changes = np.array([event.nbytes() for event in events])
        return self.held() + int(max(0, changes.cumsum().max(initial=0)))

    def multiply_adds(self) -> int:
        """Multiply-adds of a run; see the function."""
        with torch.device('meta'):
            network, images = copy.deepcopy(self.network).to('meta'), torch.empty(self.images.shape)

        def run() -> None:
            logits = network(images)
            if self.optimizer is not None:
                logits.sum().backward()

        with torch.set_grad_enabled(self.optimizer is not None):
            return multiply_adds(run)


def multiply_adds(run: Callable[[], object]) -> int:
    """Multiply-adds of what is called, counted over its real operators: products of matrices and convolutions."""
    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        run()
    return counter.get_total_flops() // 2  # it counts multiplications and additions apart


def _convolution_backward(
    grad: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, **_: Any
) -> int:
    """Multiplications and additions of the gradients of a convolution, from shapes; PyTorch's own overlooks groups."""
    transposed, wanted = arguments[4], arguments[7]  # gradients of the input, of the weight
    return conv_flop_count(x, weight, grad, transposed) * (wanted[0] + wanted[1])


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Context in which GPUs round fp32 products and convolutions to TensorFloat-32, or do not."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = enabled
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


class Product:
    """One plain product of two matrices, as fast as a device multiplies and adds.

    Args:
        precision: of the matrices.
        device: where.
        multiply_adds: about how many; `multiply_adds` tells exactly.
    """

    def __init__(self, precision: str, device: torch.device, multiply_adds: int):
        side = min(4096 if device.type == 'cuda' else 1024, max(1, round(multiply_adds ** (1 / 3))))
        rows = max(1, round(multiply_adds / side**2))
        self.precision, self.multiply_adds = precision, rows * side**2
        self.left = torch.randn(rows, side, device=device, dtype=PRECISIONS[precision])
        self.right = torch.randn(side, side, device=device, dtype=PRECISIONS[precision])

    def __call__(self) -> Tensor:
        """Multiply once."""
        with tf32(self.precision == 'tf32'):
            return self.left @ self.right


def in_turns(
    tasks: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, least: float = 0.05
) -> dict[str, list[float]]:
    """Time tasks, which have run before, in turns.

    Args:
        tasks: by name.
        rounds: how often each is timed. Every round begins with the next one.
        device: that they run on.
        least: seconds; a shorter task is repeated within its turn.

    Returns:
        By name, seconds a run in each round.
    """

    def seconds(task: Callable[[], object], repeats: int) -> float:
        synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            task()
        synchronize(device)
        return (time.perf_counter() - began) / repeats

    repeats = {name: max(1, round(least / seconds(task, 1))) for name, task in tasks.items()}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(tasks[name], repeats[name]))
    return times


def alone(task: Callable[[], object], device: torch.device) -> Spread:
    """Seconds a run of one task, over ten turns of half a second, or of one run that takes longer."""
    return Spread.of(in_turns({'alone': task}, 10, device, least=0.5)['alone'])


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    elif device.type == 'mps':
        torch.mps.synchronize()
