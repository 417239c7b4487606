"""Exactness of losses where rounding shows most: losses close to 0, and sums of very many terms."""

import math

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import is_native, to_device
from loss_cases import loss_and_grad, make_values, truth_of

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy
on_cpu = pytest.mark.usefixtures("skipped_on_gpus")

LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "images": lambda x: x.view(-1, 4, x.shape[1]).transpose(1, 2).contiguous(),
}


@pytest.fixture
def skipped_on_gpus(device):
    """The condition of a mark would be evaluated before the device is the test's."""
    if device != devices.CPU:
        pytest.skip("holds for the kernels of the CPU")


def relative_error(value, truth):
    return ((value.double() - truth) / truth).abs()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_classes", [2, 16, 17, 64, 65, 100, 1000, 2049, 5000])
def test_the_loss_of_nearly_certain_rows_is_as_exact_as_that_of_others(n_classes, layout):
    """Small exponentials beside the target's, which is 1, must not be rounded to its units; nor its gradient."""
    x = make_values((200, n_classes), scale=2.0)
    target = x.argmax(1)
    x[torch.arange(200), target] += torch.linspace(8, 18, 200)
    x, target = LAYOUTS[layout](x), target.view(-1, 4) if layout == "images" else target
    loss, grad = loss_and_grad(cross_entropy, x, target, reduction="none")
    truths = truth_of(F.cross_entropy, x, target, reduction="none")
    own_loss = relative_error(loss, truths[0])
    own_grad, true_grad = (g.gather(1, target.unsqueeze(1)).squeeze(1) for g in (grad, truths[1]))
    theirs = relative_error(F.cross_entropy(x, target, reduction="none"), truths[0])
    if devices.is_gpu() or not is_native():  # whose threads add in float32, as torch's do there; and torch's own
        assert own_loss.mean() <= 1.5 * theirs.mean() + 1e-6
        return
    assert own_loss.max() <= 3e-6
    assert relative_error(own_grad, true_grad).max() <= 3e-6
    torch.testing.assert_close(cross_entropy(x, target, reduction="none"), loss, rtol=2e-6, atol=0)


@pytest.mark.native
@on_cpu
@pytest.mark.parametrize("smoothing", [0.0, 1e-6])
@pytest.mark.parametrize("n_classes", [2, 16, 17, 64, 65, 100, 128, 223, 224, 1000, 5000])
def test_row_does_not_depend_on_its_neighbours(n_classes, smoothing):
    """Rows of a tile are computed together, and some of them again: those that are nearly certain of the target.

    How many rows there are matters to the last bits of 128 to 223 classes only, which other loops take where there are
    few.
    """
    x = make_values((70, n_classes), scale=2.0)
    target = x.argmax(1)
    x[torch.arange(70), target] += torch.linspace(0, 18, 70)
    target[::2] = (target[::2] + 1) % n_classes  # nearly certain of another class
    options = {"reduction": "none", "label_smoothing": smoothing}
    losses, grads = loss_and_grad(cross_entropy, x, target, **options)
    for shift in (1, 23, 69):
        loss, grad = loss_and_grad(cross_entropy, x.roll(shift, 0), target.roll(shift), **options)
        assert torch.equal(loss, losses.roll(shift)), shift
        assert torch.equal(grad, grads.roll(shift, 0)), shift
    for i in range(70):
        loss, grad = loss_and_grad(cross_entropy, x[i : i + 1], target[i : i + 1], **options)
        if 128 <= n_classes <= 223:
            torch.testing.assert_close(loss[0], losses[i], rtol=1e-6, atol=0)
            torch.testing.assert_close(grad[0], grads[i], rtol=1e-6, atol=1e-9)
            continue
        assert torch.equal(loss[0], losses[i]), i
        assert torch.equal(grad[0], grads[i]), i


@pytest.mark.native
@on_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(30, 10, 3), (30, 70, 5), (9, 100, 20), (5, 20, 50), (5, 200, 41), (9, 300, 2), (2, 300, 50)], ids=str
)
def test_image_does_not_depend_on_its_neighbours(sizes, dtype):
    """Those of a tile are computed together, and a tile may begin amid one; the last tile may be a narrow one."""
    x = make_values(sizes, dtype)
    target = x.argmax(1)
    target[::2] = 1
    losses, grads = loss_and_grad(cross_entropy, x, target, reduction="none", label_smoothing=0.1)
    for i in range(sizes[0]):
        image = slice(i, i + 1)
        loss, grad = loss_and_grad(cross_entropy, x[image], target[image], reduction="none", label_smoothing=0.1)
        assert torch.equal(loss[0], losses[i]), i
        assert torch.equal(grad[0], grads[i]), i


@pytest.mark.native
@on_cpu
@pytest.mark.parametrize("n_classes", [16, 17, 70])
def test_a_loss_of_a_ten_millionth_is_not_zero(n_classes):
    x = torch.zeros(1, n_classes)
    x[0, 0] = 17.0
    loss, grad = loss_and_grad(cross_entropy, x, torch.tensor([0]))
    exact = math.log1p((n_classes - 1) * math.exp(-17))
    assert abs(loss.item() / exact - 1) < 1e-6
    assert abs(grad[0, 0].item() / math.expm1(-exact) - 1) < 1e-6


@pytest.mark.parametrize("n_classes", [10, 70])
@pytest.mark.parametrize("has_weight", [False, True])
def test_the_mean_of_a_million_losses_is_rounded_about_once(n_classes, has_weight):
    n = 20_000 if devices.is_gpu() else 1_000_000 if n_classes == 10 else 100_000
    x, target = make_values((n, n_classes), torch.float64), to_device(torch.arange(n) * 7 % n_classes)
    weight = torch.linspace(0.01, 1.01, n_classes, dtype=torch.float64) if has_weight else None
    losses = F.cross_entropy(x, target, weight, reduction="none")
    total = math.fsum(losses.tolist())
    count = math.fsum(weight[target].tolist()) if has_weight else n
    assert abs(cross_entropy(x, target, weight).item() / (total / count) - 1) <= 4 * 2.3e-16
    assert abs(cross_entropy(x, target, weight, reduction="sum").item() / total - 1) <= 4 * 2.3e-16


def test_weights_of_very_many_classes_are_summed_as_exactly():
    n_classes = 3_000 if devices.is_gpu() else 300_000
    x, target = make_values((2, n_classes), torch.float64), torch.tensor([5, n_classes - 1])
    weight = make_values((n_classes,), torch.float64, seed=3).abs()
    log_probabilities = x.log_softmax(1)
    total = 0.0
    for row, t in zip(log_probabilities, target, strict=True):
        uniform = math.fsum((row * weight).tolist()) / n_classes
        total -= 0.9 * (row[t] * weight[t]).item() + 0.1 * uniform
    loss = cross_entropy(x, target, weight, label_smoothing=0.1, reduction="sum")
    assert abs(loss.item() / total - 1) <= 16 * 2.3e-16


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(4, 10), (4, 100), (2, 10, 4)], ids=str)
def test_gradients_that_are_normal_numbers_are_exact_wherever_the_loss_is_scaled_afterwards(dtype, sizes):
    """The docstring's limit: what is smaller counts as 0, as a large factor shows; nothing above it is lost."""
    limit = math.log(torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny)
    for gap in (0.5, 0.9, 0.99, 0.999):
        x = torch.zeros(sizes, dtype=dtype)
        x.select(1, 3)[...] = -limit * gap
        target = torch.full((sizes[0], *sizes[2:]), 3)
        for reduction in ("sum", "none"):
            factor = torch.full(target.shape if reduction == "none" else (), 2.0**24)
            _, grad = loss_and_grad(cross_entropy, x, target, factor, reduction=reduction)
            _, truth = truth_of(F.cross_entropy, x, target, factor, reduction=reduction)
            other = grad.select(1, 0).double(), truth.select(1, 0)
            # The distance of the logits is rounded in the type that is computed in.
            rounding = 100 * 2.3e-16 * 710 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 1e-2
            assert relative_error(*other).max() <= rounding
