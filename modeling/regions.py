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


def compile_regions(*owners: Any, enable: bool = True) -> None:
    """Switches the regions of models, with all their parts, and of other objects; a copy takes the switch along."""
    for owner in owners:
        for part in owner.modules() if isinstance(owner, nn.Module) else (owner,):
            part.compiled = enable


def is_compiled(owner: object) -> bool:
    """Whether the regions of an object are switched on."""
    return getattr(owner, "compiled", False)


@contextmanager
def uncompiled(*owners: Any) -> Iterator[None]:
    """Within it, the regions run as they are written: for calls with batches of another size."""
    enabled = [is_compiled(owner) for owner in owners]
    compile_regions(*owners, enable=False)
    try:
        yield
    finally:
        for owner, before in zip(owners, enabled, strict=True):
            compile_regions(owner, enable=before)


@functools.cache
def _compiled(method: Callable) -> Callable:
    return torch.compile(method, dynamic=False)
