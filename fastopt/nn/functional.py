"""Losses as functions."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _native, reference
from . import vocab_parallel

# Subclasses with a dispatch of their own (DTensor) know torch's operators, not ours.
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NUMBERS = (float, int)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    inplace_backward: bool = False,
    process_group: Any | None = None,
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
        inplace_backward: let the backward write the gradient over ``input``, which then needs no memory of its own;
            ``input`` holds its values until then. A request: where a kernel cannot, under ``torch.compile`` and on the
            reference path, the gradient has its own memory. Default: False
        process_group: processes that share the classes, each with ``input`` and ``weight`` of its own classes and all
            with the same ``target``. See :mod:`fastopt.nn.vocab_parallel`. Default: None

    Returns:
        Scalar, or the shape of the indices if ``reduction="none"``; dtype of ``input``.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or options disagree, as torch.
        IndexError: a target is neither a class nor ``ignore_index``; nothing is read out of bounds. On a GPU, which
            nothing waits for, the loss is NaN instead, and so is that target's row of the gradient.
        RuntimeError: with ``inplace_backward``, what an in-place operation on ``input`` would raise: it is a leaf that
            requires grad, or overlaps itself; and in the backward, if someone else saved the overwritten values.

    Source: online maximum and sum: Milakov & Gimelshein, arXiv:1805.02867, 2018, algorithm 3.
    """
    if not torch.jit.is_scripting() and process_group is None and has_torch_function_variadic(input, target, weight):
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
            inplace_backward=inplace_backward,
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    if torch.jit.is_scripting():
        if process_group is not None:
            raise RuntimeError("process_group is not for TorchScript")
        return torch.ops.fastopt.cross_entropy(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
        )
    if process_group is not None:
        return vocab_parallel.cross_entropy(
            input, target, process_group, weight, reduction, ignore_index, label_smoothing
        )
    return _cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing, inplace_backward)


@torch.jit.unused
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    inplace_backward: bool,
) -> Tensor:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.ops.fastopt.cross_entropy(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
        )
    if (
        type(input) not in _PLAIN_TYPES
        or not (input.is_cpu or (input.is_cuda and _native.cuda()))
        # Else a tensor would lose its fraction or its gradient.
        or type(ignore_index) is not int
        or type(label_smoothing) not in _NUMBERS
    ):
        return vocab_parallel.torch_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
    library = _native.module()
    if library is None:
        if inplace_backward:
            _check_may_overwrite(input)
        return reference.cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
    arguments = (input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing)
    try:
        return library.cross_entropy(*arguments, inplace_backward)
    except TypeError:  # for torch to say what is wrong with which argument
        return vocab_parallel.torch_cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)


def _check_may_overwrite(input):
    """What the kernels refuse to overwrite, though here nothing is overwritten."""
    if torch.is_grad_enabled() and input.requires_grad:
        if input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        if input._base is not None and input._base.is_leaf and input._base.requires_grad:
            raise RuntimeError("a view of a leaf Variable that requires grad is being used in an in-place operation.")
