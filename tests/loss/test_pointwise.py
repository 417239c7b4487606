"""Pointwise losses: values, gradients and layouts, and what goes to torch's own functions."""

import copy
import math
import os
import pickle
import warnings

import pytest
import torch

import fastopt
from common import DTYPES, assert_no_worse, attempt, error, is_native, kernel_calls, threads
from loss_helpers import EVERY_SIZE, streaming_beyond
from pointwise_losses import LOSSES

all_losses = pytest.mark.parametrize("loss", LOSSES, ids=str)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
all_reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

# One element, a block and its neighbours, a partial sum and a task of the loop with theirs, several tasks.
SIZES = [(), (1,), (63,), (64,), (65,), (3, 5), (1024,), (1025,), (8191,), (8192,), (8193,), (3, 10000)]


def results(function, tensors, reduction, wanted=(True, True), factor=1.0):
    """The loss and the gradients of those tensors that are wanted."""
    leaves = [t.detach().requires_grad_(is_wanted) for t, is_wanted in zip(tensors, wanted, strict=True)]
    loss = function(*leaves, reduction=reduction)
    grad_output = torch.linspace(1, 2, loss.numel(), dtype=torch.float64).reshape(loss.shape) * factor
    if any(wanted):
        loss.backward(grad_output.to(loss.dtype))
    return [loss.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)]


def n_kernels(loss, call):
    """How often the loss's kernel ran in a call."""
    before = kernel_calls(loss.name)
    call()
    return kernel_calls(loss.name) - before


def assert_as_good_as_torchs(loss, tensors, reduction, **options):
    ours, theirs = (results(f, tensors, reduction, **options) for f in (loss.ours, loss.torchs))
    truths = results(loss.torchs, [t.double() for t in tensors], reduction, **options)
    for found, expected, truth in zip(ours, theirs, truths, strict=True):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert_no_worse(found, expected, truth, slack=4 if found.dtype == torch.float64 else 1)


@all_losses
@all_dtypes
@all_reductions
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_loss_and_gradients_are_no_further_from_float64_than_torchs(loss, dtype, reduction, shape):
    tensors = loss.make(shape, dtype)
    for factor in (1.0, 3.0):
        assert_as_good_as_torchs(loss, tensors, reduction, factor=factor)


@pytest.mark.native
@all_losses
@all_dtypes
@all_reductions
def test_the_kernel_ran(loss, dtype, reduction):
    """Once; and in the backward where the factor must come first."""
    tensors = loss.make((100,), dtype)
    in_backward = (reduction == "none" or dtype == torch.float16) and not loss.saves_derivatives
    assert n_kernels(loss, lambda: loss.ours(*tensors, reduction=reduction)) == 1
    assert n_kernels(loss, lambda: results(loss.ours, tensors, reduction)) == 1 + in_backward
    if dtype == torch.bfloat16 and reduction != "none":
        assert n_kernels(loss, lambda: results(loss.ours, tensors, reduction, factor=0.3)) == 2


@all_losses
@all_dtypes
@all_reductions
@pytest.mark.parametrize("wanted", [(False, False), (True, False), (False, True)], ids=["none", "input", "target"])
def test_only_the_gradients_that_are_wanted_are_computed(loss, dtype, reduction, wanted):
    assert_as_good_as_torchs(loss, loss.make((9, 130), dtype), reduction, wanted=wanted)


@pytest.mark.native
@all_losses
@all_dtypes
@all_reductions
def test_a_large_gradient_that_is_streamed_is_the_same(loss, dtype, reduction):
    tensors = loss.make((20001,), dtype)
    expected = results(loss.ours, tensors, reduction)
    with streaming_beyond(EVERY_SIZE):
        found = results(loss.ours, tensors, reduction)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.native
@all_losses
@all_dtypes
@all_reductions
def test_any_number_of_threads_gives_the_same_bits(loss, dtype, reduction):
    tensors = loss.make((100_003,), dtype)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(results(loss.ours, tensors, reduction))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.native
@all_losses
def test_any_number_of_threads_gives_the_same_sum(loss):
    """Of many draws, for another order of additions gives the same sum of most."""
    for seed in range(20):
        tensors = loss.make((60_001,), seed=seed)
        found = set()
        for count in (1, 2, 3):
            with threads(count):
                found.add(loss.ours(*tensors, reduction="sum").item())
        assert len(found) == 1


@all_losses
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [100, 1_000_003])
def test_a_sum_is_as_exact_as_torchs(loss, dtype, n):
    tensors = loss.make((n,), dtype)
    exact = math.fsum(loss.torchs(*[t.double() for t in tensors], reduction="none").tolist())
    ours, theirs = (abs(f(*tensors, reduction="sum").item() - exact) for f in (loss.ours, loss.torchs))
    assert ours <= theirs + torch.finfo(dtype).eps * exact


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every other": lambda t: torch.stack([t, torch.full_like(t, float("nan"))], -1)[..., 0],
    "expanded": lambda t: t[:1].expand_as(t),
}


@all_losses
@all_dtypes
@all_reductions
@pytest.mark.parametrize("input_layout", LAYOUTS)
@pytest.mark.parametrize("target_layout", LAYOUTS)
def test_layouts(loss, dtype, reduction, input_layout, target_layout):
    input, target = loss.make((2, 3, 4, 5), dtype)
    tensors = [LAYOUTS[input_layout](input), LAYOUTS[target_layout](target)]
    assert_as_good_as_torchs(loss, tensors, reduction)
    if is_native():
        is_taken = input_layout == target_layout and input_layout not in ("every other", "expanded")
        assert n_kernels(loss, lambda: loss.ours(*tensors, reduction=reduction)) == is_taken


@all_losses
@all_reductions
def test_a_grad_output_of_another_layout(loss, reduction):
    def gradients(function):
        leaves = [t.transpose(0, 1).requires_grad_() for t in loss.make((3, 4))]
        value = function(*leaves, reduction=reduction)
        return torch.autograd.grad(value, leaves, torch.linspace(1, 2, value.numel()).double().reshape(value.shape))

    torch.testing.assert_close(gradients(loss.ours), gradients(loss.torchs))


@all_losses
@all_reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_numbers_that_are_not_finite(loss, reduction, dtype):
    odd = torch.tensor([0.0, -0.0, 1.0, float("inf"), float("-inf"), float("nan")], dtype=dtype)
    pairs = torch.cartesian_prod(odd, odd)
    for n in (1, 36):  # each pair alone, and all of them in one block
        for input, target in zip(pairs[:, 0].split(n), pairs[:, 1].split(n), strict=True):
            tensors = [input.contiguous(), target.contiguous()]
            ours, theirs = (results(f, tensors, reduction) for f in (loss.ours, loss.torchs))
            for found, expected in zip(ours, theirs, strict=True):
                torch.testing.assert_close(found, expected, rtol=0.02, atol=0, equal_nan=True)
                assert torch.equal(found.signbit()[~found.isnan()], expected.signbit()[~expected.isnan()])


@pytest.mark.native
@all_losses
def test_a_mean_of_float16_whose_sum_is_too_large_has_a_gradient(loss):
    """The loss scaler's factor comes before the rounding."""
    input, target = (t.half() for t in loss.make((300_000,)))
    input.requires_grad_()
    (loss.ours(input, target) * 2**14).backward()
    leaf = input.detach().double().requires_grad_()
    (loss.torchs(leaf, target.double()) * 2**14).backward()
    assert error(input.grad, leaf.grad) <= 2**-11 * leaf.grad.abs().max()


# --- What goes to torch -----------------------------------------------------------------------------------------------


def ones(*sizes, **options):
    return torch.ones(*sizes, **options)


CALLS = {  # of a function f; the kernel takes none
    "no elements": lambda f: f(ones(0), ones(0)),
    "no elements, none": lambda f: f(ones(0, 3), ones(0, 3), reduction="none"),
    "broadcast target": lambda f: f(ones(2, 3), ones(3) * 2),
    "broadcast input": lambda f: f(ones(3), ones(2, 3) * 2, reduction="none"),
    "sizes that do not fit": lambda f: f(ones(2), ones(3)),
    "mixed dtypes": lambda f: f(ones(3), ones(3, dtype=torch.float64) * 2),
    "float and half": lambda f: f(ones(3), ones(3, dtype=torch.float16) * 2),
    "integers": lambda f: f(ones(3, dtype=torch.int64), ones(3, dtype=torch.int64) * 2),
    "integer target": lambda f: f(ones(3), ones(3, dtype=torch.int64) * 2),
    "booleans": lambda f: f(ones(3, dtype=torch.bool), ones(3, dtype=torch.bool)),
    "complex": lambda f: f(ones(3, dtype=torch.complex64), ones(3, dtype=torch.complex64) * 2j),
    "weight": lambda f: f(ones(3), ones(3) * 2, weight=torch.tensor([1.0, 2.0, 3.0])),
    "weight, sum": lambda f: f(ones(3), ones(3) * 2, weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum"),
    "weight of another size": lambda f: f(ones(3), ones(3), weight=ones(2)),
    "size_average": lambda f: f(ones(3), ones(3) * 2, size_average=False),
    "reduce": lambda f: f(ones(3), ones(3) * 2, None, False),
    "unknown reduction": lambda f: f(ones(3), ones(3), reduction="max"),
    "no reduction": lambda f: f(ones(3), ones(3), reduction=None),
    "a list as reduction": lambda f: f(ones(3), ones(3), reduction=[]),
    "another device": lambda f: f(ones(3, device="meta"), ones(3, device="meta")),
    "two devices": lambda f: f(ones(3), ones(3, device="meta")),
    "sparse": lambda f: f(ones(3).to_sparse(), ones(3)),
    "a lazy negation": lambda f: f(torch._neg_view(ones(3)), ones(3)),
    "a number": lambda f: f(ones(3), 1.0),
    "None": lambda f: f(None, ones(3)),
    "one argument": lambda f: f(ones(3)),
}


@all_losses
@pytest.mark.parametrize("call", CALLS)
def test_other_calls_give_torchs_results_errors_and_warnings(loss, call):
    def outcome(function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = attempt(lambda: CALLS[call](function))
        return found, [(w.category, str(w.message)) for w in caught]

    before = kernel_calls(loss.name)
    (found, our_warnings), (expected, their_warnings) = outcome(loss.ours), outcome(loss.torchs)
    assert our_warnings == their_warnings
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape, found.device) == (expected.dtype, expected.shape, expected.device)
        if found.device.type == "cpu":
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert found == expected
    assert kernel_calls(loss.name) == before


@pytest.mark.native
@all_losses
@pytest.mark.parametrize("place", [0, 1])
def test_freed_memory_raises(loss, place):
    tensors = [torch.ones(3), torch.ones(3)]
    tensors[place].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated yet"):
        loss.ours(*tensors)


# --- The module -------------------------------------------------------------------------------------------------------


@all_losses
@all_reductions
def test_modules_are_copied_pickled_and_scripted(loss, reduction):
    module = getattr(fastopt, loss.module_name)(reduction=reduction)
    theirs = getattr(torch.nn, loss.module_name)(reduction=reduction)
    assert isinstance(module, type(theirs))
    assert repr(module) == repr(theirs)
    assert module.state_dict() == theirs.state_dict() == {}
    tensors = loss.make((3, 4), torch.float32)
    scripted = torch.jit.script(module)
    for copied in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), scripted):
        torch.testing.assert_close(copied(*tensors), theirs(*tensors))
    assert getattr(fastopt, loss.module_name)(size_average=False).reduction == "sum"


@pytest.mark.native
@all_losses
def test_the_module_reaches_the_kernel(loss):
    module = getattr(fastopt, loss.module_name)()
    assert n_kernels(loss, lambda: module(*loss.make((3, 4)))) == 1


@all_losses
def test_calls_are_counted_on_the_path_they_take(loss):
    tensors = loss.make((3, 4))
    with fastopt.count_calls() as calls:
        loss.ours(*tensors)
        loss.ours(*tensors, weight=torch.ones(3, 4))
        with pytest.raises(ValueError, match="max"):
            loss.ours(*tensors, reduction="max")
    kernel, reference = (1, 0) if is_native() else (0, 1)
    assert calls[loss.name] == {"kernel": kernel, "reference": reference, "torch": 1}


@all_losses
def test_a_forked_child_computes_the_same(loss):
    tensors = loss.make((32768,), torch.float32)  # threads for ours, none yet for torch's, which would hang
    expected = results(loss.ours, tensors, "mean")
    child = os.fork()
    if child == 0:
        is_same = False
        try:
            found = results(loss.ours, tensors, "mean")
            is_same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        finally:
            os._exit(0 if is_same else 1)
    assert os.waitpid(child, 0)[1] == 0
