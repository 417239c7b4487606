"""States in huge pages, where a step waits less for memory: those on the CPU that fill some, of 2 MiB each."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

from .._build import native
from .ordinary import has_ordinary_containers


def large_states_in_huge_pages(optimizer):
    """A context in which torch makes states as ever, but large ones get memory of the library's."""
    library = native.module()
    is_needed = (
        library is not None
        and has_ordinary_containers(optimizer)
        and any(_lacks_large_states(optimizer, group, library.huge_page) for group in optimizer.param_groups)
    )
    if not is_needed:
        return contextlib.nullcontext()
    return _ZerosInHugePages(library.zero_state)


def _lacks_large_states(optimizer, group, min_bytes):
    return any(
        param.grad is not None
        and param.is_cpu
        and param.layout == torch.strided
        and param.nbytes >= min_bytes
        and not optimizer.state.get(param)
        for param in group["params"]
    )


class _ZerosInHugePages(TorchFunctionMode):
    def __init__(self, zero_state):
        self._zero_state = zero_state
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.zeros_like and len(args) == 1 and kwargs == {"memory_format": torch.preserve_format}:
            return self._zero_state(args[0])
        return func(*args, **kwargs)
