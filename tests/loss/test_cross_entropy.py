"""Values and gradients of cross-entropy, with every layout and option, against float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES, assert_no_worse, kernel_calls
from loss_cases import KINDS, LOGITS, LOOPS, OPTIONS, Logits, Options, loss_and_grad, make_values, slack_of, truth_of

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


def check(values, logits, options, grad_output=None):
    """Compares value and gradient with float64, and requires the dtype and shape of torch's."""
    input = logits.lay(values)
    target, arguments = options.make(logits, values.dtype)
    ours = loss_and_grad(cross_entropy, input, target, grad_output, **arguments)
    theirs = loss_and_grad(F.cross_entropy, input, target, grad_output, **arguments)
    truths = truth_of(F.cross_entropy, input, target, grad_output, **arguments)
    # Size of a gradient's terms before they cancel: with one class they leave 0.
    unit = 1 / max(math.prod(logits.positions), 1) if options.reduction == "mean" else 1.0
    unit *= 1.0 if grad_output is None else grad_output.abs().max().item()
    for name, scale, own, other, truth in zip(("loss", "gradient"), (0.0, unit), ours, theirs, truths, strict=True):
        assert (own.dtype, own.shape) == (other.dtype, other.shape), f"{name} of {options}"
        own, other, truth = (torch.cat([v.flatten(), v.new_tensor([scale])]) for v in (own, other, truth))
        try:
            assert_no_worse(own, other, truth, slack=slack_of(logits, values.dtype))
        except AssertionError as error:
            raise AssertionError(f"{name} of {logits} {values.dtype} {options}: {error}") from None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", [LOGITS[0], *LOOPS], ids=str)
def test_every_combination_of_options_is_as_exact_as_torch(logits, dtype):
    values = make_values(logits.sizes, dtype)
    for options in OPTIONS:
        check(values, logits, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", LOGITS, ids=str)
def test_every_layout_is_as_exact_as_torch(logits, dtype):
    values = make_values(logits.sizes, dtype)
    for kind in KINDS:
        for reduction in ("mean", "none"):
            check(values, logits, replace(kind, reduction=reduction))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_class_gives_exactly_zero(dtype):
    for sizes in [(1,), (3, 1), (37, 1), (3, 1, 300)]:
        logits = Logits(sizes, "contiguous", "")
        for reduction in ("mean", "sum", "none"):
            target, arguments = Options("index", False, 0.0, "none", reduction).make(logits, dtype)
            for value in loss_and_grad(cross_entropy, make_values(sizes, dtype), target, **arguments):
                assert (value == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", [LOGITS[0], *LOOPS], ids=str)
def test_the_gradient_is_scaled_by_grad_output(logits, dtype):
    values = make_values(logits.sizes, dtype)
    per_position = make_values(logits.positions, dtype, seed=5)
    for kind in KINDS:
        for reduction in ("mean", "sum"):
            for factor in (1.0, 0.25, 0.3, -1.0, 0.0):
                options = replace(kind, reduction=reduction)
                check(values, logits, options, torch.tensor(factor, dtype=dtype))
        options = replace(kind, reduction="none")
        check(values, logits, options, per_position)
        check(values, logits, options, torch.tensor(0.25, dtype=dtype).expand(logits.positions))
        if len(logits.positions) > 1:
            check(values, logits, options, per_position.transpose(0, -1).contiguous().transpose(0, -1))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "rows_apart", "classes_apart", "expanded"])
@pytest.mark.parametrize("target_layout", ["contiguous", "transposed", "rows_apart", "classes_apart", "expanded"])
@pytest.mark.parametrize("n_classes", [10, 100])
def test_layout_of_probabilities_may_differ_from_that_of_logits(layout, target_layout, n_classes):
    logits = Logits((20, n_classes), layout, "")
    for options in KINDS[-2:]:
        target, arguments = options.make(logits, torch.float32)
        target = Logits(logits.sizes, target_layout, "").lay(target)
        x = logits.lay(make_values(logits.sizes))
        ours = loss_and_grad(cross_entropy, x, target, **arguments)
        theirs = loss_and_grad(F.cross_entropy, x, target, **arguments)
        for own, other, truth in zip(ours, theirs, truth_of(F.cross_entropy, x, target, **arguments), strict=True):
            assert_no_worse(own, other, truth, slack=4)


def test_indices_and_weights_may_be_strided():
    x = make_values((6, 5))
    target, weight = torch.randint(5, (12,))[::2], torch.rand(10)[::2]
    torch.testing.assert_close(cross_entropy(x, target, weight), F.cross_entropy(x, target, weight))
    images = make_values((3, 5, 4, 4))
    target = torch.randint(5, (4, 4, 3)).permute(2, 1, 0)
    torch.testing.assert_close(cross_entropy(images, target), F.cross_entropy(images, target))


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", LOGITS, ids=str)
def test_native_kernel_is_the_one_that_ran(logits, dtype):
    x = logits.lay(make_values(logits.sizes, dtype))
    for options in KINDS:
        target, arguments = options.make(logits, dtype)
        before = kernel_calls("cross_entropy")
        loss_and_grad(cross_entropy, x, target, **arguments)
        assert kernel_calls("cross_entropy") == before + 1
        with torch.no_grad():
            cross_entropy(x, target, **arguments)
        assert kernel_calls("cross_entropy") == before + 2


@pytest.mark.native
@pytest.mark.parametrize("logits", LOGITS, ids=str)
def test_gradient_has_the_strides_of_dense_logits(logits):
    x = logits.lay(make_values(logits.sizes)).requires_grad_()
    target, arguments = KINDS[0].make(logits, torch.float32)
    (grad,) = torch.autograd.grad(cross_entropy(x, target, **arguments), x)
    expected = torch.empty_like(x)  # keeps the strides of dense tensors
    if x.is_contiguous() or logits.layout in ("channels_last", "transposed"):
        assert grad.stride() == expected.stride()
    assert grad.is_contiguous() or logits.layout in ("channels_last", "transposed", "permuted")
