"""Mixed precision behind one small interface, so that the training loop never branches on it."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from yacs.config import CfgNode

from config import ConfigError


class Precision:
    """PyTorch's own mixed precision: O0 is fp32, O1 autocast to float16 (with a loss scaler) or bfloat16.

    Args:
        level: O0 or O1.
        dtype: half-precision type of O1.
        device: where the network is.
    """

    def __init__(self, level: str, dtype: torch.dtype, device: torch.device):
        if level not in ('O0', 'O1'):
            raise ConfigError(f'AMP_OPT_LEVEL is {level!r}: write O0 or O1')
        self.enabled = level == 'O1'
        self.dtype = dtype
        self.device_type = device.type
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.enabled and dtype is torch.float16)

    def __str__(self) -> str:
        return str(self.dtype).removeprefix('torch.') + ' autocast' if self.enabled else 'float32'

    def autocast(self) -> AbstractContextManager:
        """Context for the forward pass and the loss."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.enabled)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, scaled where that is needed."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Optimizer, model: nn.Module, max_norm: float) -> Tensor:
        """Unscale and clip the gradients, update the weights, clear the gradients.

        Args:
            optimizer: of the model's parameters.
            model: its gradients are clipped together.
            max_norm: largest norm of all gradients together; 0 leaves them as they are.

        Returns:
            The norm before clipping, a scalar on the device: nothing waits for it.
        """
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm > 0:
            nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and what it adapts by; empty without a scaler."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; a state saved without a scaler leaves this one as it starts."""
        if state:
            self.scaler.load_state_dict(state)


def build_precision(config: CfgNode, device: torch.device) -> Precision:
    """The precision of `AMP_OPT_LEVEL` and `AMP_DTYPE`: by default the published O1 on a GPU, fp32 on a CPU."""
    level = config.AMP_OPT_LEVEL or ('O1' if device.type == 'cuda' else 'O0')
    return Precision(level, getattr(torch, config.AMP_DTYPE), device)
