"""The number a loss is multiplied by: its gradient costs no second sweep, and does not depend on what came before."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastopt
from common import DTYPES, assert_no_worse, error, forget_factors, kernel_calls
from loss_cases import make_values

pytestmark = pytest.mark.native

cross_entropy = fastopt.functional.cross_entropy
FACTORS = (1.0, 0.25, 1 / 3, 7.0, 2.0**-60, 0.0, -2.0, math.inf, math.nan)
SHAPES = ((64, 10), (16, 5000), (4, 30, 9))


def logits_and_target(shape, dtype):
    x = make_values(shape, dtype, scale=2.0).requires_grad_()
    return x, torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=torch.Generator().manual_seed(1))


def gradient(function, x, target, factor, reduction="mean", **options):
    loss = function(x, target, reduction=reduction)
    return torch.autograd.grad((loss.sum() if reduction == "none" else loss) * factor, x, **options)[0]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_gradient_is_the_same_after_any_other_factor(shape, dtype, reduction):
    x, target = logits_and_target(shape, dtype)
    first = {}
    for factors in itertools.permutations(FACTORS[:4]):
        for factor in (*factors, *FACTORS[4:], *factors[:2]):
            found = gradient(cross_entropy, x, target, factor, reduction)
            expected = first.setdefault(factor, found)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_factor_costs_no_exactness(shape, dtype):
    x, target = logits_and_target(shape, dtype)
    wide = x.detach().double().requires_grad_()
    for factor in (1.0, 0.25, 0.25, 1 / 3, 1 / 3, 1000.0, 2.0**-20):
        truth = gradient(F.cross_entropy, wide, target, factor)
        assert_no_worse(gradient(cross_entropy, x, target, factor), gradient(F.cross_entropy, x, target, factor), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_of_each_position_are_the_same_after_any_number(dtype):
    x, target = logits_and_target((16, 5000), dtype)
    factors = torch.linspace(0.5, 2, 16, dtype=dtype)

    def of_positions():
        return torch.autograd.grad(cross_entropy(x, target, reduction="none"), x, factors)[0]

    expected = of_positions()
    for factor in FACTORS:
        gradient(cross_entropy, x, target, factor, "none")
        torch.testing.assert_close(of_positions(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeated_factor_costs_no_kernel(dtype):
    x, target = logits_and_target((64, 1000), dtype)
    gradient(cross_entropy, x, target, 0.125)
    for _ in range(3):
        before = kernel_calls("cross_entropy")
        gradient(cross_entropy, x, target, 0.125)
        assert kernel_calls("cross_entropy") == before + 1


def test_forgotten_factors_cost_no_kernel():
    """Tests that count kernels rely on it: each begins with ``forget_factors``."""
    kinds = [
        (*logits_and_target((4, n_classes), dtype), reduction)
        for n_classes, dtype, reduction in itertools.product((*range(2, 70), 1000), DTYPES, ("mean", "sum"))
    ]
    for x, target, reduction in kinds:
        gradient(cross_entropy, x, target, 3.0, reduction)
    forget_factors()
    before = kernel_calls("cross_entropy")
    for x, target, reduction in reversed(kinds):  # from those that were remembered last
        gradient(cross_entropy, x, target, 1.0, reduction)
    assert kernel_calls("cross_entropy") == before + len(kinds)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_divided_by_its_count_costs_no_kernel(dtype):
    """Though the count, of the targets that are not ignored, changes with each batch."""
    x, target = logits_and_target((64, 1000), dtype)
    wide = x.detach().double().requires_grad_()
    for i, n_ignored in enumerate((5, 11, 0, 23, 1)):
        some = target.clone()
        some[:n_ignored] = -100
        n_kept = int((some != -100).sum())
        before = kernel_calls("cross_entropy")
        (found,) = torch.autograd.grad(cross_entropy(x, some, reduction="sum") / n_kept, x)
        assert kernel_calls("cross_entropy") == before + (2 if i == 0 else 1)
        (theirs,) = torch.autograd.grad(F.cross_entropy(x, some, reduction="sum") / n_kept, x)
        (truth,) = torch.autograd.grad(F.cross_entropy(wide, some, reduction="sum") / n_kept, wide)
        assert_no_worse(found, theirs, truth)
    everything_ignored = torch.full_like(target, -100)
    (found,) = torch.autograd.grad(cross_entropy(x, everything_ignored, reduction="sum"), x)
    assert not found.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_retained_graph_takes_another_factor_each_time(dtype):
    x, target = logits_and_target((64, 100), dtype)
    truth = gradient(F.cross_entropy, x.detach().double().requires_grad_(), target, 1.0)
    loss = cross_entropy(x, target)
    for factor in (0.5, 3.0, 1.0, 3.0):
        (found,) = torch.autograd.grad(loss, x, torch.tensor(factor, dtype=dtype), retain_graph=True)
        assert error(found, truth * factor) <= 2 * torch.finfo(dtype).eps * factor


@pytest.mark.parametrize("dtype", DTYPES)
def test_overwritten_logits_do_not_change_the_gradient(dtype):
    """As with torch, which keeps the probabilities."""
    x, target = logits_and_target((64, 100), dtype)
    for before, factor in ((1.0, 0.5), (0.5, 4.0), (4.0, 4.0)):
        gradient(cross_entropy, x, target, before)
        expected = gradient(cross_entropy, x, target, factor)
        gradient(cross_entropy, x, target, before)
        logits = x.clone()
        loss = cross_entropy(logits, target)
        logits.detach().zero_()
        loss.data.zero_()
        with torch.no_grad():
            logits.add_(1)
        (found,) = torch.autograd.grad(loss, logits, torch.tensor(factor, dtype=dtype))
        assert error(found, expected) <= 2 * torch.finfo(dtype).eps * factor


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("retains", [False, True])
def test_logits_overwritten_through_data_give_the_same_gradient_or_raise(retains, factor, dtype):
    """Through .data, or as NumPy's array: the gradient is right, or there is an error."""
    x, target = logits_and_target((64, 100), dtype)
    gradient(cross_entropy, x, target, 1.0)
    expected = gradient(F.cross_entropy, x, target, factor)
    logits = x.clone()
    loss = cross_entropy(logits, target)
    logits.data.mul_(0.9)

    def backward():
        return torch.autograd.grad(loss * factor, logits, retain_graph=retains)[0]

    if factor == 1.0 or retains:
        assert error(backward(), expected) <= 4 * torch.finfo(dtype).eps
    else:
        with pytest.raises(RuntimeError, match="changed between a cross-entropy and its backward"):
            backward()


# --- float16, whose gradient is rounded with the factor that is foreseen ----------------------------------------------

F16 = torch.float16


def forget_factor(x, target, reduction="mean"):
    """No factor is foreseen from one of 0."""
    gradient(cross_entropy, x, target, 0.0, reduction)


def backward_after_overwriting(x, target, factor):
    logits = x.clone()
    loss = cross_entropy(logits, target).float()
    logits.detach().zero_()
    return torch.autograd.grad(loss * factor, logits)[0]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rounded_gradient_keeps_what_is_small_beside_another_factor(shape, reduction):
    x, target = logits_and_target(shape, F16)
    with torch.no_grad():
        x.mul_(4)
    for before in (1.0, 2.0**-10, 0.0):
        for factor in (2.0**10, 60000.0):
            gradient(cross_entropy, x, target, before, reduction)
            before_calls = kernel_calls("cross_entropy")
            found = gradient(cross_entropy, x, target, factor, reduction)
            assert kernel_calls("cross_entropy") == before_calls + 2
            truth = gradient(F.cross_entropy, x.detach().double().requires_grad_(), target, factor, reduction)
            torch.testing.assert_close(found, truth.to(F16), rtol=2e-3, atol=2e-7)


def test_a_rounded_gradient_of_overwritten_logits_takes_a_factor_near_its_own():
    x, target = logits_and_target((64, 100), F16)
    for factor in (1.0, 0.25, 16.0, 2.0**-12):
        for _ in range(2):
            gradient(cross_entropy, x, target, 1.0)
        expected = gradient(cross_entropy, x, target, factor)
        gradient(cross_entropy, x, target, 1.0)
        found = backward_after_overwriting(x, target, factor)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6)
    gradient(cross_entropy, x, target, 1.0)
    assert not backward_after_overwriting(x, target, math.inf).isfinite().all()
    gradient(cross_entropy, x, target, 1.0)
    with pytest.raises(RuntimeError, match="changed before its backward.* a factor of 1, .* far from 1024"):
        backward_after_overwriting(x, target, 1024.0)


def test_any_factors_work_where_the_logits_of_each_loss_are_overwritten():
    """The next backward is expected to find the logits as the last one did."""
    x, target = logits_and_target((64, 100), F16)
    factors = (1.0, 1024.0, 1.0, 30000.0, 30000.0)
    expected = [gradient(cross_entropy, x, target, factor) for factor in factors]
    forget_factor(x, target)
    for factor, grad in zip(factors, expected, strict=True):
        torch.testing.assert_close(backward_after_overwriting(x, target, factor), grad, rtol=2e-3, atol=1e-6)


def test_a_rounded_gradient_is_computed_again_for_what_is_no_number():
    x, target = logits_and_target((64, 100), F16)
    wanted = torch.tensor([0.5, 1024.0], dtype=F16)
    for _ in range(2):
        gradient(cross_entropy, x, target, 2.0**-8)
    loss = cross_entropy(x, target)
    (batch,) = torch.autograd.grad(loss, x, wanted, is_grads_batched=True)
    for found, factor in zip(batch, wanted.tolist(), strict=True):
        torch.testing.assert_close(found, gradient(cross_entropy, x, target, factor), rtol=2e-3, atol=1e-6)
    for _ in range(2):
        gradient(cross_entropy, x, target, 2.0**-8, "none")
    rows = torch.linspace(1, 1024, 64, dtype=F16)
    (found,) = torch.autograd.grad(cross_entropy(x, target, reduction="none"), x, rows)
    wide = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(F.cross_entropy(wide, target, reduction="none"), wide, rows.double())
    torch.testing.assert_close(found, truth.to(F16), rtol=2e-3, atol=1e-6)


# --- What is saved, and what numbers are ------------------------------------------------------------------------------


def test_hooks_for_saved_tensors_are_called_once():
    x, target = logits_and_target((64, 100), torch.float32)
    for factor in (1.0, 0.5, 0.25):
        unpacked = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t, seen=unpacked: seen.append(t) or t):
            loss = cross_entropy(x, target)
        found = torch.autograd.grad(loss * factor, x)[0]
        assert len(unpacked) == 1
        torch.testing.assert_close(found, gradient(F.cross_entropy, x, target, factor))


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": np.float64(0.1)},
        {"label_smoothing": np.float32(0.25)},
        {"ignore_index": np.int64(-100)},
        {"ignore_index": np.int32(3), "label_smoothing": np.float64(0.1)},
        {"label_smoothing": type("Number", (float,), {})(0.1)},
    ],
)
def test_numbers_of_numpy_are_numbers(options):
    x, target = logits_and_target((64, 10), torch.float32)
    before = kernel_calls("cross_entropy")
    found = cross_entropy(x, target, **options)
    assert kernel_calls("cross_entropy") == before + 1
    torch.testing.assert_close(found, F.cross_entropy(x, target, **options))
