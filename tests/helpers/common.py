"""Shared by all tests: the path that runs, outcomes of calls, and the rule by which a result is accepted."""

import contextlib

import torch

from fastopt import _ops
from fastopt._build import native
from fastopt.nn.functional import cross_entropy

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_native():
    """True if the compiled kernels are used; builds them if need be."""
    return native.module() is not None


def kernel_calls(name):
    """Number of calls of a kernel in this process: "update", "threaded_gather" (of them), "cross_entropy",
    "cuda" (of both); 0 on the reference path."""
    module = native.module()
    return module.kernel_calls()[name] if module is not None else 0


def forget_factors():
    """From now on a loss on the CPU expects the same factor of its gradient as the first of a process.

    Factors are kept in 61 places, each for the last kind of losses that has it (csrc/torch/losses/loss_factor.cpp).
    The losses here take all of them, with numbers of classes that no test has.
    """
    target = torch.zeros(1, dtype=torch.int64, device="cpu")
    for n_classes in range(3101, 3162):
        logits = torch.zeros(1, n_classes, dtype=torch.float64, device="cpu", requires_grad=True)
        cross_entropy(logits, target).backward()


def reference_of(op):
    """The reference of an operator."""
    return next(operator.reference for operator in _ops.OPERATORS if operator.name == op)


def to_device(tensor):
    """The tensor where tests run; made on the CPU, so that it is the same everywhere."""
    return tensor.to(torch.get_default_device())


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def outcome(call):
    """The value that a call returns, or the exception that it raises."""
    try:
        return call()
    except Exception as failure:
        return failure


def attempt(call):
    """An outcome in a form that can be compared: what is returned, or type and message of the exception."""
    found = outcome(call)
    return (type(found).__name__, str(found)) if isinstance(found, Exception) else found


def error(value, truth):
    """Largest absolute difference; infinities and NaN in the same places are equal, other NaN infinitely wrong."""
    value, truth = value.detach().double(), truth.detach().double()
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    same = (value == truth) | (value.isnan() & truth.isnan())
    difference = torch.where(same, 0.0, (value - truth).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    return difference.max().item() if value.numel() else 0.0


def assert_no_worse(ours, reference, truth, slack=2.0):
    """Our error against float64 is at most torch's own, plus ``slack`` units in the last place of the largest value."""
    unit = torch.finfo(ours.dtype).eps
    finite = truth.detach().double()
    finite = finite[finite.isfinite()]
    largest = finite.abs().max().item() if finite.numel() else 0.0
    allowed = error(reference, truth) + slack * unit * largest
    found = error(ours, truth)
    assert found <= allowed, f"error {found:.3e}; torch's own {error(reference, truth):.3e}, allowed {allowed:.3e}"
