"""Methods that torch.compile may take one by one: a ViT of equal blocks takes minutes as a whole, a block seconds."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def region(method: Callable) -> Callable:
    """Marks a method of a module as a region that is compiled while `compile_regions` has switched its module on.

    Modules that come as arguments are inputs of the compiled code like any tensor, so that equal blocks share it.
    Every shape is compiled for itself: calls with other ones belong under `uncompiled`.
    """

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any) -> Any:
        return (_compiled(method) if is_compiled(self) else method)(self, *args)

    return call


def compile_regions(model: nn.Module, enable: bool = True) -> None:
    """Switches the regions of a model and of its parts on or off; a copy of the model takes the switch along."""
    for module in model.modules():
        module.compiled = enable


def is_compiled(module: object) -> bool:
    """Whether the regions of a module are switched on."""
    return getattr(module, "compiled", False)


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within it, the regions run as they are written: for calls with batches of another size."""
    enabled = is_compiled(model)
    compile_regions(model, False)
    try:
        yield
    finally:
        compile_regions(model, enabled)


@functools.cache
def _compiled(method: Callable) -> Callable:
    return torch.compile(method, dynamic=False)
