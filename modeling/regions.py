"""Methods that torch.compile may take one by one: a ViT of equal blocks takes minutes as a whole, a block seconds."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def region(method: Callable) -> Callable:
    """Marks a method of a module as a region that is compiled while `compile_regions` has switched its module on.

    Modules that come as arguments are inputs of the compiled code like any tensor, so that equal blocks share it.
    Every shape is compiled for itself: calls with many different ones belong under
    `torch.compiler.set_stance("force_eager")`.
    """

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any) -> Any:
        return (_compiled(method) if getattr(self, "compiled", False) else method)(self, *args)

    return call


def compile_regions(model: nn.Module, enable: bool = True) -> None:
    """Switches the regions of a model and of its parts on or off; a copy of the model takes the switch along."""
    for module in model.modules():
        module.compiled = enable


@functools.cache
def _compiled(method: Callable) -> Callable:
    return torch.compile(method, dynamic=False)
