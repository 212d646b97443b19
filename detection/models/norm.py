"""Batch norm whose statistics are of all processes."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class SyncBatchNorm(nn.SyncBatchNorm):
    """PyTorch's SyncBatchNorm, which trains on GPUs only, on CPUs too.

    So ranks keep the same running statistics, which one checkpoint can hold, whatever they train on.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (n, C, H, W)."""
        if x.device.type != 'cpu' or not self.training or not dist.is_initialized():
            return super().forward(x)
        mean, variance, count = self._statistics(x.float())
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1).clamp(min=1), self.momentum)
        # F.batch_norm takes no gradient of statistics that it is given.
        scale = self.weight * (variance + self.eps).rsqrt()
        shape = (1, -1, 1, 1)
        return (x * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)

    @staticmethod
    def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (C,) and biased variance (C,) of each channel over all processes, and the number of values, a scalar."""
        count = all_reduce(x.new_tensor(x.numel() / x.shape[1]))
        mean = all_reduce(x.sum(dim=(0, 2, 3))) / count
        variance = all_reduce((x - mean.view(1, -1, 1, 1)).square().sum(dim=(0, 2, 3))) / count
        return mean, variance, count
