"""Cross-entropy: laws first, then values and gradients of every layout and option against float64."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES, HALVES, assert_no_worse, kernel_calls, threads, to_device
from loss_cases import KINDS, LOGITS, OPTIONS, Logits, Options, loss_and_grad, make_values, slack_of, truth_of

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy

# One shape for each loop: narrow rows, wide rows in two blocks, columns.
LOOPS = [
    Logits((37, 10), "contiguous", "narrow rows"),
    Logits((5, 2100), "contiguous", "wide rows"),
    Logits((2, 12, 300), "contiguous", "columns"),
]
loops = pytest.mark.parametrize("logits", LOOPS, ids=str)
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


def target_and_options(logits, options, dtype=torch.float64, **changes):
    target, arguments = options.make(logits, dtype)
    return target, {**arguments, **changes}


# --- Laws -------------------------------------------------------------------------------------------------------------


@loops
@kinds
@pytest.mark.parametrize("shift", [-1024.0, 4.0, 2.0**20])  # exact: logits are multiples of 2^-10 and stay so
def test_shift_of_all_logits_changes_nothing(logits, options, shift):
    values = (make_values(logits.sizes, torch.float64) * 1024).round() / 1024
    target, arguments = target_and_options(logits, options)
    loss, grad = loss_and_grad(cross_entropy, values, target, **arguments)
    shifted_loss, shifted_grad = loss_and_grad(cross_entropy, values + shift, target, **arguments)
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-8, atol=1e-12)


@pytest.mark.native
@loops
@kinds
def test_shift_of_all_logits_changes_no_bit_in_the_kernels(logits, options):
    values = (make_values(logits.sizes, torch.float32) * 64).round() / 64
    target, arguments = target_and_options(logits, options, torch.float32)
    loss, grad = loss_and_grad(cross_entropy, values, target, **arguments)
    shifted_loss, shifted_grad = loss_and_grad(cross_entropy, values + 4096.0, target, **arguments)
    assert torch.equal(shifted_loss, loss)
    assert torch.equal(shifted_grad, grad)


@loops
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(
    ("dtype", "level"),
    [
        *[(dtype, level) for dtype in (torch.float32, torch.float64) for level in (1.0, -1e4, 1e4, 1e20, -1e20, 1e38)],
        *[(torch.float64, level) for level in (1e300, -1e300)],  # beyond them the next sum overflows
        *[(dtype, level) for dtype in HALVES for level in (1.0, 1e4, -1e4)],
    ],
)
def test_equal_logits_give_log_c(logits, smoothing, dtype, level):
    if smoothing and dtype == torch.float32 and abs(level) > 1e30:
        pytest.skip("a sum of such logits is infinite")
    x = torch.full(logits.sizes, level, dtype=dtype)
    target = Options("index", False, smoothing, "none", "none").make_target(logits, dtype)
    loss, grad = loss_and_grad(cross_entropy, x, target, reduction="none", label_smoothing=smoothing)
    expected = torch.full(logits.positions, math.log(logits.n_classes), dtype=torch.float64)
    assert_no_worse(loss, F.cross_entropy(torch.ones_like(x), target, reduction="none"), expected, slack=8)
    one_hot = F.one_hot(target, logits.n_classes).movedim(-1, 1).double()
    q = (1 - smoothing) * one_hot + smoothing / logits.n_classes
    torch.testing.assert_close(grad.double(), 1 / logits.n_classes - q, rtol=0, atol=4 * torch.finfo(dtype).eps)


@loops
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_class_indices_is_never_negative(logits, dtype, scale, smoothing):
    x = make_values(logits.sizes, dtype, scale=scale)
    target = x.argmax(1)  # where the loss is nearest to 0
    assert cross_entropy(x, target, reduction="none", label_smoothing=smoothing).min() >= 0


@loops
@kinds
def test_gradients_of_a_row_sum_to_zero(logits, options):
    x = make_values(logits.sizes, torch.float64)
    target, arguments = target_and_options(logits, options, reduction="sum")
    _, grad = loss_and_grad(cross_entropy, x, target, **arguments)
    assert grad.sum(1).abs().max() < 1e-12


@pytest.mark.native
@loops
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", KINDS[:3], ids=str)
@pytest.mark.parametrize("junk", [1.0, float("nan"), float("inf"), -float("inf")])
def test_ignored_rows_give_exactly_zero_for_any_logits(logits, dtype, options, junk):
    target, arguments = options.make(logits, dtype)
    ignored = target == -100
    x = torch.where(ignored.unsqueeze(1), torch.tensor(junk, dtype=dtype), make_values(logits.sizes, dtype))
    for reduction in ("none", "sum", "mean"):
        loss, grad = loss_and_grad(cross_entropy, x, target, **{**arguments, "reduction": reduction})
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        assert (grad.movedim(1, -1)[ignored] == 0).all()
        assert (grad.movedim(1, -1)[~ignored] != 0).any()
        if reduction == "none":
            assert (loss[ignored] == 0).all()


@loops
@kinds
def test_the_order_of_classes_does_not_matter(logits, options):
    x = make_values(logits.sizes, torch.float64)
    target, arguments = target_and_options(logits, options)
    order = to_device(torch.randperm(logits.n_classes, generator=torch.Generator().manual_seed(3), device="cpu"))
    loss, grad = loss_and_grad(cross_entropy, x, target, **arguments)
    if arguments["weight"] is not None:
        arguments["weight"] = arguments["weight"][order]
    if options.kind == "index":
        moved = torch.where(target == -100, -100, order.argsort()[target.clamp_min(0)])
    else:
        moved = target.index_select(1, order)
    moved_loss, moved_grad = loss_and_grad(cross_entropy, x.index_select(1, order), moved, **arguments)
    torch.testing.assert_close(moved_loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(moved_grad, grad.index_select(1, order), rtol=1e-10, atol=1e-13)


@loops
@kinds
def test_sum_and_mean_are_those_of_none(logits, options):
    x = make_values(logits.sizes, torch.float64)
    target, arguments = target_and_options(logits, options)
    results = {
        reduction: loss_and_grad(cross_entropy, x, target, **{**arguments, "reduction": reduction})
        for reduction in ("none", "sum", "mean")
    }
    total = results["none"][0].sum()
    count = math.prod(logits.positions)
    if options.kind == "index":
        weight = arguments["weight"] if options.has_weight else torch.ones(logits.n_classes, dtype=torch.float64)
        count = weight[target[target != -100]].sum()
    torch.testing.assert_close(results["sum"][0], total, rtol=1e-12, atol=0)
    torch.testing.assert_close(results["mean"][0], total / count, rtol=1e-12, atol=0)
    torch.testing.assert_close(results["sum"][1], results["none"][1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(results["mean"][1], results["sum"][1] / count, rtol=1e-12, atol=1e-15)


@loops
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_probabilities_equal_indices(logits, has_weight, smoothing):
    x = make_values(logits.sizes, torch.float64)
    target, arguments = Options("index", has_weight, 0.0, "none", "sum").make(logits, torch.float64)
    one_hot = F.one_hot(target, logits.n_classes).movedim(-1, 1).double()
    arguments["label_smoothing"] = smoothing
    ours = loss_and_grad(cross_entropy, x, target, **arguments)
    for value, expected in zip(loss_and_grad(cross_entropy, x, one_hot, **arguments), ours, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.native
@kinds
@pytest.mark.parametrize("sizes", [(3000, 10), (40, 1000), (3, 9000), (2, 20, 1500), (1, 3, 20000)])
def test_the_number_of_threads_changes_no_bit(sizes, options):
    logits = Logits(sizes, "contiguous", "enough for a second thread")
    x = make_values(sizes)
    target, arguments = options.make(logits, torch.float32)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(loss_and_grad(cross_entropy, x, target, **arguments))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.native
@kinds
@pytest.mark.parametrize("n_classes", [1, 10, 64, 65, 300, 2100])
def test_a_row_gives_the_same_bits_anywhere_in_the_batch(n_classes, options):
    logits = Logits((40, n_classes), "contiguous", "every lane of a tile")
    x = make_values(logits.sizes)
    target, arguments = options.make(logits, torch.float32)
    arguments["reduction"] = "none"
    loss, grad = loss_and_grad(cross_entropy, x, target, **arguments)
    for first in (1, 7, 16, 39):
        part_loss, part_grad = loss_and_grad(cross_entropy, x[first:], target[first:], **arguments)
        assert torch.equal(part_loss, loss[first:])
        assert torch.equal(part_grad, grad[first:])


# --- Values and gradients ---------------------------------------------------------------------------------------------


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
