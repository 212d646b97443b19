"""Batch norm with statistics over all processes."""

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm with statistics over all processes, on CPUs; PyTorch's own is for GPUs only.

    All ranks keep the same running statistics, so one checkpoint can hold them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (n, C, H, W)."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        mean, variance, count = self._statistics(x.float())
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        shape = (1, -1, 1, 1)
        return (x * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)

    @staticmethod
    def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,), biased variance (C,) and number of values per channel, over all processes."""
        count = all_reduce(x.new_tensor(x.numel() / x.shape[1]))
        mean = all_reduce(x.sum(dim=(0, 2, 3))) / count
        variance = all_reduce((x - mean.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))) / count
        return mean, variance, count


def synchronize_norms(model: nn.Module, device: torch.device, world_size: int) -> nn.Module:
    """Convert to PyTorch's SyncBatchNorm, with the same names and parameters, where several GPUs train the network.

    Args:
        model: the network.
        device: this process's device.
        world_size: number of processes.
    """
    if device.type == 'cuda' and world_size > 1:
        return convert_sync_batchnorm(model)  # PyTorch's own would lose the activations within timm's norms
    return model
