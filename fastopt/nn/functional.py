"""Losses as functions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import _reduction
from torch.overrides import handle_torch_function, has_torch_function_variadic

from .. import _calls, reference
from .._build import native
from . import dtensors, vocab_parallel
from .overrides import PLAIN_TYPES, is_overridden
from .pointwise import *  # noqa: F403

_calls.register("cross_entropy")


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
    probabilities. The gradient is computed with the loss, where autograd will ask for it. Probabilities below the
    smallest normal number of the type that is computed in (1.2e-38, in float64 2.2e-308) count as 0 in it, also where
    the gradient is multiplied by a large factor afterwards.

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
            ``input`` holds its values until then, and the gradient afterwards. Until its backward a loss then holds
            ``input`` alone; otherwise ``input`` and the gradient, two arrays of that size. A request: where a kernel
            cannot (elements of ``input`` that may share memory with each other or with another argument), under
            ``torch.compile`` and on the reference path, the gradient has its own memory. Default: False
        process_group: processes that share the classes, each with ``input`` and ``weight`` of its own classes and all
            with the same ``target``; without ``inplace_backward``. See :mod:`fastopt.nn.vocab_parallel`. Default: None

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
    if (
        not torch.jit.is_scripting()
        and process_group is None
        and has_torch_function_variadic(input, target, weight)
        and _is_overridden(input, target, weight)
    ):
        options = (size_average, ignore_index, reduce, reduction, label_smoothing)
        return _overridden(input, target, weight, options, inplace_backward)
    if size_average is not None or reduce is not None:
        if not torch.jit.is_scripting() and torch.compiler.is_compiling():
            reduction = _legacy_reduction(size_average, reduce)
        else:
            reduction = _reduction.legacy_get_string(size_average, reduce)
    if torch.jit.is_scripting():
        if process_group is not None:
            raise RuntimeError("process_group is not for TorchScript")
        if inplace_backward and torch.is_grad_enabled() and input.requires_grad and input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        return torch.ops.fastopt.cross_entropy(
            input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing
        )
    if process_group is not None:
        if inplace_backward:
            raise ValueError("inplace_backward must be False with process_group, got True")
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
    arguments = (input, target, weight, _reduction.get_enum(reduction), ignore_index, label_smoothing)
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        # Saved programs must load without fastopt, and other formats support torch's operators only.
        return _torch_cross_entropy(arguments)
    if torch.compiler.is_compiling():
        # Programs compiled with and without kernels must differ, or torch's caches would confuse them.
        if not _has_kernels(input.device.type):
            return reference.torch_cross_entropy(*arguments)
        return torch.ops.fastopt.cross_entropy(*arguments)
    if type(input) in PLAIN_TYPES and (input.is_cpu or (input.is_cuda and native.cuda())):
        library = native.module()
        if library is None:
            if inplace_backward:
                _check_may_overwrite(input)
            loss = reference.cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
            _calls.note("cross_entropy", "reference")
            return loss
        loss = library.cross_entropy(*arguments, inplace_backward)
        if loss is NotImplemented and (numbers := _plain_numbers(ignore_index, label_smoothing)):
            loss = library.cross_entropy(*arguments[:4], *numbers, inplace_backward)
        if loss is not NotImplemented:
            return loss
    loss = dtensors.cross_entropy(input, target, weight, reduction, ignore_index, label_smoothing)
    return _torch_cross_entropy(arguments) if loss is None else loss


def _torch_cross_entropy(arguments):
    loss = reference.torch_cross_entropy(*arguments)
    _calls.note("cross_entropy", "torch")
    return loss


def _has_kernels(device_type: str) -> bool:
    """True if kernels take tensors of a device; the library is loaded while a program is traced, not when it runs."""
    return device_type == "cpu" and native.module() is not None or device_type == "cuda" and native.cuda()


# As torch.compiler.assume_constant_result does, without importing all of Dynamo.
_has_kernels._dynamo_marked_constant = True


def _plain_numbers(ignore_index, label_smoothing):
    """Numbers of NumPy's types and of subclasses of Python's types as Python's own; None if one is not a number."""
    integers = (int, np.integer)
    are_numbers = isinstance(ignore_index, integers) and isinstance(label_smoothing, (float, np.floating, *integers))
    return (int(ignore_index), float(label_smoothing)) if are_numbers and not isinstance(ignore_index, bool) else None


@torch.jit.unused
def _overridden(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: tuple[bool | None, int, bool | None, str, float],
    inplace_backward: bool,
) -> Tensor:
    # Overrides are written for torch's function, which has no inplace_backward, or for its replacement.
    function = cross_entropy if inplace_backward else torch.nn.functional.cross_entropy
    names = ("size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    keywords = {"weight": weight, **dict(zip(names, options, strict=True))}
    if inplace_backward:
        keywords["inplace_backward"] = True
    loss = handle_torch_function(function, (input, target, weight), input, target, **keywords)
    if function is not cross_entropy:  # which counts its own calls
        _calls.note("cross_entropy", "torch")
    return loss


@torch.jit.unused
def _is_overridden(input: Tensor, target: Tensor, weight: Tensor | None) -> bool:
    return is_overridden((input, target, weight))


@torch.jit.unused
def _legacy_reduction(size_average: bool | None, reduce: bool | None) -> str:
    """The result of torch's own function, which Dynamo does not trace; without its warning."""
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"


def _check_may_overwrite(input):
    """Raise for logits that the kernels may not overwrite, though the reference path overwrites none."""
    if torch.is_grad_enabled() and input.requires_grad:
        if input.is_leaf:
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")
        if input._base is not None and input._base.is_leaf and input._base.requires_grad:
            raise RuntimeError("a view of a leaf Variable that requires grad is being used in an in-place operation.")
        if torch._debug_has_internal_overlap(input) == 1:
            raise RuntimeError(
                "unsupported operation: more than one element of the written-to tensor refers to a single memory "
                "location. Please clone() the tensor before performing the operation."
            )
