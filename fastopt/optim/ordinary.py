"""Checks that an optimizer and its tensors are ordinary: nothing that Python can override changes what a step does.

Others go to torch's own step, which calls whatever was overridden. ``csrc/torch/ordinary.h`` asks the same
before the kernels run.
"""

import sys
from collections import OrderedDict, defaultdict

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .._ops import KERNEL_DTYPES

TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
_DICT_TYPES = (dict, defaultdict, OrderedDict)


def is_free_of_modes():
    """No mode or transform must see each operation; the default device concerns new tensors only."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and (
            not torch._C._is_torch_function_mode_enabled()
            or all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())
        )
    )


def is_ordinary_class(cls, init_group):
    """True if a class leaves it to ``init_group``, the function of torch's class, to collect a step's tensors.

    Then groups and states are what an optimizer's dict holds under these names.
    """
    return (
        _enabled(cls._init_group) is _enabled(init_group)
        and cls.__getattribute__ is object.__getattribute__
        and not any(name in vars(base) for base in cls.__mro__ for name in ("param_groups", "state"))
    )


def has_torchs_init_group(optimizer, init_group):
    """True if neither the optimizer nor its class replaces ``init_group``, which collects its tensors."""
    return "_init_group" not in vars(optimizer) and is_ordinary_class(type(optimizer), init_group)


def has_ordinary_containers(optimizer):
    """True if groups and states are in lists and dicts, which look up items in no way of their own."""
    groups, states = optimizer.param_groups, optimizer.state
    return (
        type(groups) is list
        and type(states) in _DICT_TYPES
        and all(type(group) in _DICT_TYPES and type(group["params"]) is list for group in groups)
        and all(type(state) in _DICT_TYPES for state in states.values())
    )


def _enabled(function):
    """The function in the wrapper that torch.compile puts around torch's functions when it is first used."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    while dynamo is not None and getattr(getattr(function, "__code__", None), "co_filename", None) == dynamo.__file__:
        function = function._torchdynamo_orig_callable
    return function


def is_ordinary_tensor(value):
    return type(value) in TENSOR_TYPES


def check_backed(tensor):
    """Raise if a strided tensor's storage does not hold its elements, which torch's own step would not notice.

    Raises:
        RuntimeError: the storage was freed or made smaller, as by ``untyped_storage().resize_(0)``.
    """
    if tensor.numel() == 0 or tensor.layout != torch.strided or tensor.is_meta:
        return
    last = tensor.storage_offset() + sum((n - 1) * step for n, step in zip(tensor.size(), tensor.stride(), strict=True))
    n_bytes = tensor.untyped_storage().nbytes()
    if n_bytes < (last + 1) * tensor.element_size():
        raise RuntimeError(
            "The tensor has a non-zero number of elements, but its data is not allocated yet: a tensor of shape "
            f"{list(tensor.shape)} has a storage of {n_bytes} bytes."
        )


def is_like(tensor, param):
    """True if a parameter's own tensor, gradient or state can be computed with, element by element."""
    if not (
        is_ordinary_tensor(tensor)
        and tensor.shape == param.shape
        and tensor.dtype == param.dtype
        and (tensor.dtype in KERNEL_DTYPES or (tensor.is_complex() and not tensor.is_conj()))
        and tensor.device == param.device
        and tensor.layout == torch.strided
        and torch._debug_has_internal_overlap(tensor) != 1
        and _may_be_written(tensor)
    ):
        return False
    check_backed(tensor)
    return True


def is_scalar_state(tensor):
    """True for a count of steps, or another number that a parameter's state keeps: none of them is negative."""
    return (
        is_ordinary_tensor(tensor)
        and tensor.is_cpu
        and tensor.layout == torch.strided
        and tensor.numel() == 1
        and tensor.is_floating_point()
        and tensor.item() >= 0
        and _may_be_written(tensor)
    )


def _may_be_written(tensor):
    return torch.is_inference_mode_enabled() or not tensor.is_inference()
