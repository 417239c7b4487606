"""Laws of cross-entropy: what no shift, order, layout or number of threads changes, and how reductions are related."""

import math

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES, HALVES, assert_no_worse, threads, to_device
from loss_cases import KINDS, LOOPS, Logits, Options, loss_and_grad, make_values

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy
loops = pytest.mark.parametrize("logits", LOOPS, ids=str)
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


def target_and_options(logits, options, dtype=torch.float64, **changes):
    target, arguments = options.make(logits, dtype)
    return target, {**arguments, **changes}


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
