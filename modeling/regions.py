"""Methods that torch.compile may take one by one: a ViT of equal blocks takes minutes as a whole, a block seconds."""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def region(method: Callable) -> Callable:
    """Marks a method of a module as a region that is compiled while `compile_regions` has switched its module on.

    Modules that come as arguments are inputs of the compiled code like any tensor, so that equal blocks share it.
    A region that is called by another is compiled with it.
    Every shape is compiled for itself: calls with other ones belong under `uncompiled`.
    """

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any) -> Any:
        alone = is_compiled(self) and not torch.compiler.is_compiling()
        return (_compiled(method) if alone else method)(self, *args)

    return call


def compile_regions(*owners: Any, enable: bool = True) -> None:
    """Switches the regions of models, with all their parts, and of other objects; a copy takes the switches along."""
    for part in _parts(owners):
        part.compiled = enable


def is_compiled(owner: object) -> bool:
    """Whether an object's own regions are switched on."""
    return getattr(owner, "compiled", False)


def any_compiled(owner: Any) -> bool:
    """Whether regions of an object or of a part of it are switched on."""
    return any(map(is_compiled, _parts((owner,))))


def compile_like(twin: nn.Module, model: nn.Module) -> None:
    """Switches the regions of a model's copy as those of the model."""
    for part, original in zip(twin.modules(), model.modules(), strict=True):
        part.compiled = is_compiled(original)


@contextmanager
def uncompiled(*owners: Any) -> Iterator[None]:
    """Within it, the regions run as they are written: for calls with batches of another size."""
    enabled = [part for part in _parts(owners) if is_compiled(part)]
    compile_regions(*owners, enable=False)
    try:
        yield
    finally:
        for part in enabled:
            part.compiled = True


def _parts(owners: Iterable[Any]) -> Iterator[Any]:
    for owner in owners:
        yield from owner.modules() if isinstance(owner, nn.Module) else (owner,)


@functools.cache
def _compiled(method: Callable) -> Callable:
    return torch.compile(method, dynamic=False)
