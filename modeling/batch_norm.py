"""Batch normalisation whose statistics are those of the batch of all ranks."""

import torch
from torch import Tensor, nn

from utils.distributed import SumOverRanks, world_size


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of (B, C), over the joined batch of all ranks while they train together.

    One collective in the forward pass and one in the backward pass; sums are kept in float64, so that the variance may
    be taken from the sum of squares. On the CPU and on CUDA alike, which torch's SyncBatchNorm is not.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and world_size() > 1:
            return self._over_ranks(x)
        return super().forward(x)

    @torch.compiler.disable
    def _over_ranks(self, x: Tensor) -> Tensor:
        wide = x.double()
        sums = torch.stack([wide, wide.square(), torch.ones_like(wide)]).sum(dim=1)
        total, squares, count = SumOverRanks.apply(sums)
        mean = total / count
        var = (squares / count - mean.square()).clamp_min(0)
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * count / (count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        with torch.autocast(x.device.type, enabled=False):
            normalised = (wide - mean) * (var + self.eps).rsqrt()
            return (normalised * self.weight + self.bias).to(x.dtype)
