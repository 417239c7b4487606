"""Cross-entropy at the edges: infinities, NaN, numbers far apart, no targets, and weights of zero or infinity."""

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES
from loss_cases import loss_and_grad, make_values, truth_of
from loss_helpers import assert_as_exact

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

cross_entropy = fastopt.functional.cross_entropy
INF, NAN = float("inf"), float("nan")


def assert_same(input, target, **options):
    """Value and gradient are those of torch, infinities and NaN included."""
    ours = loss_and_grad(cross_entropy, input, target, **options)
    theirs = loss_and_grad(F.cross_entropy, input, target, **options)
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        tolerance = 8 * torch.finfo(own.dtype).eps
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, equal_nan=True)


ROWS = [
    ([-INF, 0.0, 1.0], "a masked class"),
    ([-INF, -INF, 1.0], "all but one masked"),
    ([-INF, -INF, -INF], "all masked: NaN"),
    ([INF, 0.0, 1.0], "infinity minus infinity: NaN"),
    ([INF, INF, -INF], "several infinities"),
    ([NAN, 0.0, 1.0], "NaN must not be lost in the maximum"),
    ([NAN, INF, -INF], "everything at once"),
    ([NAN, NAN, NAN], "nothing but NaN"),
    ([-1e4, -1e4, -1.0001e4], "a maximum that starts at 0 would underflow"),
    ([-6e4, -6.1e4, -6.5e4], "the same near the end of float16"),
    ([6e4, -6e4, 0.0], "a difference that float16 cannot hold"),
    ([0.0, -87.0, -88.0], "exponentials at the smallest normal float"),
    ([0.0, -104.0, -746.0], "exponentials that are 0 in float and in double"),
    ([0.0, -0.0, 0.0], "signed zeros"),
]


def rows_of(n_classes, dtype):
    """Each of the rows, its numbers placed at both ends and in the middle of n_classes classes."""
    x = torch.zeros(len(ROWS), n_classes, dtype=torch.float64)
    for i, (numbers, _) in enumerate(ROWS):
        x[i] = numbers[1]
        x[i, 0], x[i, n_classes // 2], x[i, -1] = numbers
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_classes", [3, 65, 4100])  # narrow, wide, several blocks
@pytest.mark.parametrize("as_columns", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_infinities_and_nan_give_what_torch_gives(dtype, n_classes, as_columns, smoothing):
    rows = rows_of(n_classes, dtype)
    x = rows.t().contiguous().t() if as_columns else rows
    for target_class in (0, n_classes // 2, n_classes - 1):
        target = torch.full((len(ROWS),), target_class)
        options = {"label_smoothing": smoothing, "reduction": "none"}
        ours = loss_and_grad(cross_entropy, x, target, **options)
        theirs = loss_and_grad(F.cross_entropy, x, target, **options)
        truths = truth_of(F.cross_entropy, x, target, **options)
        for own, other, truth in zip(ours, theirs, truths, strict=True):
            for i, (numbers, why) in enumerate(ROWS):
                try:
                    assert_as_exact(own[i], other[i], truth[i])
                except AssertionError as error:
                    raise AssertionError(f"{numbers} ({why}), target {target_class}: {error}") from None


@pytest.mark.parametrize("n_classes", [3, 100, 4100])
@pytest.mark.parametrize(
    ("dtype", "low"),
    [(torch.float32, -1e38), (torch.float32, -3.4e38), (torch.float64, -1e308), (torch.float64, -1e38)],
)
def test_logits_near_the_lowest_finite_number_contribute(n_classes, dtype, low):
    x = torch.full((4, n_classes), low, dtype=dtype)
    x[1, -1] = 0.0
    x[2, 0] = -low
    x[3, :] = torch.finfo(dtype).min
    assert_same(x, torch.tensor([0, n_classes - 1, 0, 1]), reduction="none")


def test_masked_classes_with_no_probability_give_what_torch_gives():
    x = make_values((4, 100))
    x[:, 7] = -INF
    y = torch.softmax(x, 1)  # 0 at the masked class: 0 times infinity is NaN in torch too
    assert_same(x, y, reduction="none")
    assert_same(x[:, :10], y[:, :10], reduction="none")


@pytest.mark.parametrize("n_classes", [10, 100])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean_over_no_targets_is_nan_with_zero_gradient(n_classes, smoothing):
    x, target = make_values((4, n_classes)), torch.full((4,), -100)
    loss, grad = loss_and_grad(cross_entropy, x, target, label_smoothing=smoothing)
    assert loss.isnan()
    theirs = loss_and_grad(F.cross_entropy, x, target, label_smoothing=smoothing)[1]
    torch.testing.assert_close(grad, theirs, equal_nan=True)


@pytest.mark.parametrize("n_classes", [10, 100])
@pytest.mark.parametrize("weight", [NAN, INF, -INF])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("is_used", [False, True])
def test_non_finite_weight_affects_the_same_results_as_in_torch(n_classes, weight, reduction, is_used):
    weights = torch.linspace(0.5, 1.5, n_classes)
    weights[3] = weight
    target = torch.tensor([0, 1, 3 if is_used else 2, n_classes - 1])
    assert_same(make_values((4, n_classes)), target, weight=weights, reduction=reduction)


@pytest.mark.parametrize("n_classes", [10, 100])
def test_weights_of_zero_give_what_torch_gives(n_classes):
    weight = torch.zeros(n_classes)
    weight[3] = 1.0
    for targets in ([3, 3], [3, 4], [4, 4]):  # the last: 0 / 0
        for smoothing in (0.0, 0.1):
            x = make_values((2, n_classes))
            assert_same(x, torch.tensor(targets), weight=weight, label_smoothing=smoothing)


def test_weights_and_probabilities_get_torchs_gradients():
    def grads(function, leaves, **options):
        x, target = make_values((4, 5), torch.float64), make_values((4, 5), torch.float64, seed=2).softmax(1)
        tensors = {"x": x, "target": target, "weight": torch.linspace(1, 2, 5, dtype=torch.float64)}
        for name in leaves:
            tensors[name].requires_grad_()
        loss = function(tensors["x"], tensors["target"], tensors["weight"], **options)
        return torch.autograd.grad(loss, [tensors[name] for name in leaves])

    for leaves in (["target"], ["weight"], ["x", "weight"], ["x", "target"], ["x", "target", "weight"]):
        for smoothing in (0.0, 0.1):
            ours = grads(cross_entropy, leaves, label_smoothing=smoothing)
            theirs = grads(F.cross_entropy, leaves, label_smoothing=smoothing)
            torch.testing.assert_close(ours, theirs)
