"""The list of operators: for each its schema, its reference and its fake. C++ adds the kernels when it is loaded.

``torch.ops.fastopt.*`` exists as soon as fastopt is imported. Until the library is loaded, a call looks for it first,
and runs the reference if there is none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import reference
from ._build import native

_REDUCTIONS = ("none", "mean", "sum")

KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Operator:
    schema: str
    reference: Callable
    fake: Callable | None  # None: the reference can be traced, it is composite

    @property
    def name(self):
        return self.schema.split("(")[0]


def _reduction_name(reduction):
    if reduction not in range(len(_REDUCTIONS)):
        raise ValueError(f"reduction must be 0 (none), 1 (mean) or 2 (sum), got {reduction}")
    return _REDUCTIONS[reduction]


def _cross_entropy(input, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0, in_float32=False):
    if in_float32:
        input, target, weight = (_in_float32(tensor) for tensor in (input, target, weight))
    return reference.cross_entropy(input, target, weight, _reduction_name(reduction), ignore_index, label_smoothing)


def _cross_entropy_forward(
    input,
    target,
    weight=None,
    reduction=1,
    ignore_index=-100,
    label_smoothing=0.0,
    wants_grad=False,
    in_float32=False,
):
    loss = _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, in_float32)
    if not wants_grad:
        return loss, input.new_empty(0)
    options = (weight, _reduction_name(reduction), ignore_index, label_smoothing)
    return loss, reference.cross_entropy_gradient(input, target, *options).to(_grad_dtype(input))


def _cross_entropy_forward_fake(
    input,
    target,
    weight=None,
    reduction=1,
    ignore_index=-100,
    label_smoothing=0.0,
    wants_grad=False,
    in_float32=False,
):
    positions = [*input.shape[:1], *input.shape[2:]] if input.dim() > 1 else []
    loss = input.new_empty(positions if reduction == 0 else [], dtype=torch.float32 if in_float32 else input.dtype)
    return loss, torch.empty_like(input, dtype=_grad_dtype(input)) if wants_grad else input.new_empty(0)


def _in_float32(tensor):
    return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor


def _grad_dtype(input):
    # float16 cannot hold a gradient before it is multiplied by a loss scaler's factor.
    return torch.float32 if input.dtype == torch.float16 else input.dtype


def _cross_entropy_backward(grad_output, grad, input):
    if grad_output.layout != torch.strided:  # its product with the gradient would have another shape
        raise NotImplementedError(f"grad_output of cross_entropy must be strided, got {grad_output.layout}")
    if grad_output.dim() > 0:
        grad_output = grad_output.unsqueeze(1)
    return (grad * grad_output.to(grad.dtype)).to(input.dtype)


def _cross_entropy_keep(*args, **kwargs):
    return _cross_entropy(*args, **kwargs), torch.empty(1, dtype=torch.uint8)


def _cross_entropy_keep_fake(
    input, target, weight=None, reduction=1, ignore_index=-100, label_smoothing=0.0, in_float32=False
):
    options = (weight, reduction, ignore_index, label_smoothing, False, in_float32)
    return _cross_entropy_forward_fake(input, target, *options)[0], input.new_empty(1, dtype=torch.uint8)


def _cross_entropy_take(
    grad_output,
    keeper,
    input,
    target,
    weight=None,
    reduction=1,
    ignore_index=-100,
    label_smoothing=0.0,
    in_float32=False,
):
    options = (weight, _reduction_name(reduction), ignore_index, label_smoothing)
    grad = reference.cross_entropy_gradient(input, target, *options).to(_grad_dtype(input))
    return _cross_entropy_backward(grad_output, grad, input)


_CROSS_ENTROPY = (
    "Tensor input, Tensor target, Tensor? weight=None, int reduction=1, SymInt ignore_index=-100, "
    "float label_smoothing=0.0"
)

OPERATORS = [  # and one of each optimizer, see optim/operator.py
    Operator(f"cross_entropy({_CROSS_ENTROPY}, bool in_float32=False) -> Tensor", _cross_entropy, None),
    Operator(
        f"cross_entropy_forward({_CROSS_ENTROPY}, bool wants_grad=False, bool in_float32=False) -> "
        "(Tensor loss, Tensor grad)",
        _cross_entropy_forward,
        _cross_entropy_forward_fake,
    ),
    Operator(
        "cross_entropy_backward(Tensor grad_output, Tensor grad, Tensor input) -> Tensor",
        _cross_entropy_backward,
        lambda grad_output, grad, input: torch.empty_like(grad, dtype=input.dtype),
    ),
    # The two that compiled programs call on the CPU: the gradient, computed with the loss, stays in the library.
    Operator(
        f"cross_entropy_keep({_CROSS_ENTROPY}, bool in_float32=False) -> (Tensor loss, Tensor keeper)",
        _cross_entropy_keep,
        _cross_entropy_keep_fake,
    ),
    Operator(
        f"cross_entropy_take(Tensor grad_output, Tensor keeper, {_CROSS_ENTROPY}, bool in_float32=False) -> Tensor",
        _cross_entropy_take,
        lambda grad_output, keeper, input, *args, **kwargs: torch.empty_like(input),
    ),
]


def define():
    """Define the operators; once a process."""
    library = torch.library.Library("fastopt", "DEF")
    for operator in OPERATORS:
        library.define(operator.schema)
        if operator.fake is None:
            library.impl(operator.name, _until_loaded(operator), "CompositeImplicitAutograd")
        else:
            library.impl(operator.name, _until_loaded(operator), "CompositeExplicitAutograd")
            torch.library.register_fake(f"fastopt::{operator.name}", operator.fake, lib=library)
    define.library = library  # an operator lives as long as its library


def _until_loaded(operator):
    """The implementation while the tensors' device has no kernel: look for the library once, then the reference."""
    looked_for = set()  # device types

    def call(*args, **kwargs):
        device = _device_type(args)
        if device not in looked_for:
            looked_for.add(device)
            if (device == "cpu" and native.module() is not None) or (device == "cuda" and native.cuda()):
                return getattr(torch.ops.fastopt, operator.name)(*args, **kwargs)
        return operator.reference(*args, **kwargs)

    return call


def _device_type(args):
    """Of the first tensor, or of the first in a list."""
    first = args[0] if args else None
    if isinstance(first, (list, tuple)):
        first = first[0] if first else None
    return first.device.type if isinstance(first, torch.Tensor) else "cpu"
