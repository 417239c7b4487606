"""Losses as functions."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _native, reference

# Subclasses with a dispatch of their own (DTensor) know torch's operators, not ours.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Cross-entropy of logits against class indices or class probabilities; loss and gradient in one sweep.

        loss_i = sum_c q_ic (logsumexp_c(input_i) - input_ic)
        q_ic   = (1 - label_smoothing) weight_t [c = t] + label_smoothing / C weight_c        t = target_i
        q_ic   = weight_c ((1 - label_smoothing) target_ic + label_smoothing / C)             probabilities

    Values, gradients and errors of :func:`torch.nn.functional.cross_entropy`; 16-bit logits are summed in float32. The
    mean divides by the summed weights of the targets that are not ignored, or by the number of positions for
    probabilities. The gradient is computed with the loss, where autograd will ask for it.

    Args:
        input: logits, shape (C,), (N, C) or (N, C, d1, ...); floating point.
        target: class indices, shape of ``input`` without C; int64, in [0, C) or ``ignore_index``. Or class
            probabilities: shape and dtype of ``input``.
        weight: weight of each class, shape (C,), dtype of ``input``, or None for all ones. Default: None
        size_average, reduce: deprecated, see ``reduction``.
        ignore_index: class index of targets that count for nothing. Default: -100
        reduction: "none", "mean" or "sum". Default: "mean"
        label_smoothing: in [0, 1]. Default: 0.0

    Returns:
        Scalar, or the shape of the indices if ``reduction="none"``; dtype of ``input``.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or options disagree, as torch.
        IndexError: a target is neither a class nor ``ignore_index``; nothing is read out of bounds. On a GPU, which
            nothing waits for, the loss is NaN instead, and so is that target's row of the gradient.

    Source: online maximum and sum: Milakov & Gimelshein, arXiv:1805.02867, 2018, algorithm 3.
    """
    if torch.jit.is_scripting():
        if size_average is not None or reduce is not None:
            reduction = _reduction.legacy_get_string(size_average, reduce)
        return torch.ops.fastopt.cross_entropy(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
        )
    if has_torch_function_variadic(input, target, weight):
        return handle_torch_function(
            cross_entropy,
            (input, target, weight),
            input,
            target,
            weight=weight,
            size_average=size_average,
            ignore_index=ignore_index,
            reduce=reduce,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    return _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)


@torch.jit.unused
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.ops.fastopt.cross_entropy(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
        )
    if type(input) not in _PLAIN_TYPES or not (input.is_cpu or (input.is_cuda and _native.cuda())):
        return F.cross_entropy(
            input, target, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    library = _native.module()
    if library is None:
        return reference.cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
    return library.cross_entropy(input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing)
