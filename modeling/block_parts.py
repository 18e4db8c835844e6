"""Parts that stand in a timm ViT's blocks in the place of timm's own."""

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): a sample skips the branch at a rate, the others are scaled up for it.

    The rate is a tensor: compiled code takes it as an input, where timm's Python number compiles every block anew.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


def use_drop_path(vit: nn.Module) -> None:
    """Puts this file's DropPath into every block of a timm ViT that was made with a rate above 0."""
    places = [(block, name) for block in vit.blocks for name in ("drop_path1", "drop_path2", "drop_path")]
    places = [(block, name) for block, name in places if hasattr(block, name)]
    rates = [getattr(getattr(block, name), "drop_prob", 0.0) for block, name in places]
    if any(rates):
        for (block, name), rate in zip(places, rates, strict=True):
            setattr(block, name, DropPath(rate))


class Recomputed(nn.Module):
    """An activation whose output compiled code makes again in the backward pass, where its input is read anyway.

    It is the largest tensor that a block would keep: a fifth of the memory of training.
    """

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
            return self.act(x)
        return checkpoint(self.act, x, use_reentrant=False, preserve_rng_state=False)


def use_recomputed_activation(vit: nn.Module) -> None:
    """Lets the MLPs of a timm ViT make their activations again; gated MLPs, which have others, stay."""
    for block in vit.blocks:
        if isinstance(getattr(block, "mlp", None), Mlp):
            block.mlp.act = Recomputed(block.mlp.act)
