"""Batch normalisation whose statistics are those of the batch of all ranks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from utils.distributed import gather_alike, sum_over_ranks, world_size


class SyncedBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` of (B, C), over the joined batch of all ranks while they train together, B samples on each.

    One collective in the forward pass and one in the backward pass, without waiting for the device; on the CPU and on
    CUDA alike, which torch's SyncBatchNorm is not.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and world_size() > 1:
            return self._over_ranks(x)
        return super().forward(x)

    @torch.compiler.disable
    def _over_ranks(self, x: Tensor) -> Tensor:
        normalised, mean, var = _NormOverRanks.apply(x, self.weight, self.bias, self.eps)
        count = len(x) * world_size()
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return normalised


class _NormOverRanks(torch.autograd.Function):
    """x (B, C), weight (C,), bias (C,) -> the normalised batch (B, C); mean and biased variance (C,) of all rows.

    Gradients of weight and bias are of the rank's own rows. In float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, dim=0, correction=0)
        means, variances = gather_alike(torch.stack([mean, var])).unbind(1)  # (R, C) each
        mean, var = means.mean(0), variances.mean(0) + means.var(0, correction=0)  # batches of one size
        rstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)  # of which there are none
        return torch.addcmul(bias, wide - mean, weight * rstd).to(x.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        normalised, gradient = (x - mean) * rstd, gradient.to(mean.dtype)
        own = torch.stack([gradient.sum(0), (gradient * normalised).sum(0)])
        of_bias, of_weight = sum_over_ranks(own)
        along = torch.addcmul(of_bias, normalised, of_weight)  # what moves with the batch's mean and deviation
        grad_x = torch.sub(gradient, along, alpha=1 / (len(x) * world_size())) * (weight * rstd)
        return grad_x.to(x.dtype), own[1], own[0], None
