"""Shared by the tests of cross-entropy's modes: small cases, and a call with torch's function and with ours."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import fastopt
from common import assert_no_worse, is_native
from fastopt._build import native
from loss_cases import KINDS, Logits, Options, make_values

cross_entropy = fastopt.functional.cross_entropy
EVERY_SIZE, NONE = 0, 2**62  # bytes of a gradient from which it is streamed
SHAPES = [
    Logits((5,), "contiguous", "no batch"),
    Logits((3, 4), "contiguous", "narrow rows"),
    Logits((2, 67), "contiguous", "wide rows"),
    Logits((2, 3, 2, 2), "contiguous", "columns"),
    Logits((2, 3, 2, 2), "channels_last", "rows of an image"),
]
OPTIONS = [Options(k.kind, k.has_weight, k.smoothing, k.ignored, r) for k in KINDS for r in ("mean", "none")]
shapes = pytest.mark.parametrize("logits", SHAPES, ids=str)
options_table = pytest.mark.parametrize("options", OPTIONS, ids=str)
CHANGED = "has been modified by an inplace operation"  # of a tensor that a backward has saved


class Produce(torch.autograd.Function):
    """Output of a layer: memory of its own, no view, no leaf."""

    @staticmethod
    def forward(ctx, values):
        return torch.empty(0, dtype=values.dtype).set_(values.detach())

    @staticmethod
    def backward(ctx, grad):
        ctx.set_materialize_grads(False)
        Produce.grad = grad
        return grad.clone()


def make_case(logits, options, dtype=torch.float64):
    target, arguments = options.make(logits, dtype)
    return logits.lay(make_values(logits.sizes, dtype, scale=1.0)), target, arguments


def both(call):
    """The results of a call with torch's function and with ours."""
    return call(F.cross_entropy), call(cross_entropy)


def nested_in_another(*args, **kwargs):
    """A function of somebody else's, itself put in torch's place, that ends in ours."""
    return cross_entropy(*args, **kwargs)


def assert_both_same(call):
    theirs, ours = both(call)
    torch.testing.assert_close(ours, theirs)


@contextlib.contextmanager
def streaming_beyond(n_bytes):
    before = native.module().set_streaming_threshold(n_bytes)
    try:
        yield
    finally:
        native.module().set_streaming_threshold(before)


def peak(call):
    """The largest number of bytes that were allocated and not freed while a call ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        largest = max(largest, held)
    return largest


X = make_values((6, 10), scale=1.0)
T = torch.tensor([0, 9, 3, -100, 5, 5])


# float16 gradients are kept in float32, wide rows and columns are other kernels, probabilities another problem.
PROBLEMS = {
    "indices": dict(),
    "indices, each row": dict(reduction="none"),
    "smoothed": dict(label_smoothing=0.1),
    "probabilities": dict(probabilities=True),
    "wide": dict(sizes=(2, 70)),
    "columns": dict(sizes=(2, 5, 3)),
    "weights": dict(weighted=True),
    "float16": dict(dtype=torch.float16),
}
problems = pytest.mark.parametrize("problem", PROBLEMS)


def make_problem(sizes=(3, 5), dtype=torch.float64, probabilities=False, weighted=False, **options):
    """Logits, and the loss of a function's as a function of logits alone: one number."""
    x = make_values(sizes, dtype, scale=1.0)
    target = torch.softmax(make_values(sizes, dtype, seed=3), 1) if probabilities else x.argmin(1)
    weight = torch.linspace(0.5, 1.5, sizes[1], dtype=dtype) if weighted else None
    return x, lambda function, logits: function(logits, target, weight, **options).sum()


def assert_as_exact(own, other, truth, slack_in_float64=32):
    """No worse than torch's own by more than rounding; where torch overflows, truth is the measure.

    The reference path is torch's own loss, at least in float32: it may overflow with it.
    """
    expected = truth.to(own.dtype)
    if not is_native():
        own = torch.where(other.isfinite() | (own != other), own, expected)
    other = torch.where(other.isfinite(), other, expected)
    one = own.new_ones(1)
    slack = slack_in_float64 if own.dtype == torch.float64 else 4
    assert_no_worse(*(torch.cat([v.flatten().to(own.dtype), one]) for v in (own, other, expected)), slack=slack)


def assert_as_torch(call, x):
    theirs, ours = both(call)
    torch.testing.assert_close(ours, theirs, **(dict(rtol=2e-2, atol=2e-3) if x.dtype == torch.float16 else {}))
