"""Pointwise losses as functions. What no kernel takes goes to torch's own functions, with their results and errors."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function_variadic

from .. import _calls
from .._build import native
from .overrides import PLAIN_TYPES, is_overridden

__all__ = ["l1_loss", "mse_loss"]
_calls.register(*__all__)

# Kept here, for programs may put ours in their place.
_torch_l1_loss = F.l1_loss
_torch_mse_loss = F.mse_loss


def l1_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean absolute error; loss and gradients in one sweep.

        loss_i = |input_i - target_i|

    Arguments and result as :func:`mse_loss`; values, gradients, warnings and errors of
    :func:`torch.nn.functional.l1_loss`.
    """
    if torch.jit.is_scripting():
        return _torch_l1_loss(input, target, size_average, reduce, reduction, weight)
    for_kernel = (reduction,) if size_average is None and reduce is None and weight is None else None
    return _loss(_torch_l1_loss, (input, target), for_kernel, (size_average, reduce, reduction, weight))


def mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    r"""Mean squared error; loss and gradients in one sweep.

        loss_i = (input_i - target_i)^2

    Values, gradients, warnings and errors of :func:`torch.nn.functional.mse_loss`. The kernels take ``input`` and
    ``target`` of the same shape, dtype and layout, without ``weight``; 16-bit numbers compute in float32.

    Args:
        input, target: any shape; floating point.
        size_average, reduce: deprecated, see ``reduction``.
        reduction: "none", "mean" or "sum". Default: "mean"
        weight: weight of each element, shape of ``input``, or None for all ones. Default: None

    Returns:
        Scalar, or the shape of ``input`` if ``reduction="none"``; dtype of ``input``.
    """
    if torch.jit.is_scripting():
        return _torch_mse_loss(input, target, size_average, reduce, reduction, weight)
    for_kernel = (reduction,) if size_average is None and reduce is None and weight is None else None
    return _loss(_torch_mse_loss, (input, target), for_kernel, (size_average, reduce, reduction, weight))


def _loss(torch_loss, inputs, for_kernel, for_torch):
    """The loss of tensors, by the kernel of the same name or by torch's own function.

    ``for_kernel``: further arguments of the kernel, or None if torch's function must be called; ``for_torch``: those of
    that function.
    """
    if torch.compiler.is_compiling():
        return torch_loss(*inputs, *for_torch)
    name, path = torch_loss.__name__, "torch"
    overridden = has_torch_function_variadic(*inputs) and is_overridden(inputs)
    if for_kernel is not None and not overridden and type(inputs[0]) in PLAIN_TYPES and inputs[0].is_cpu:
        library = native.module()
        loss = NotImplemented if library is None else getattr(library, name)(*inputs, *for_kernel)
        if loss is not NotImplemented:
            return loss
        path = "reference" if library is None else "torch"
    loss = torch_loss(*inputs, *for_torch)
    if not overridden or getattr(F, name) is torch_loss:  # otherwise an override has called ours, which counts
        _calls.note(name, path)
    return loss
