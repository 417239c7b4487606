"""Cross-entropy with every number of classes and positions, and logits that begin at any element."""

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES
from loss_cases import KINDS, Logits, loss_and_grad, make_values, truth_of
from loss_helpers import assert_as_exact

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

cross_entropy = fastopt.functional.cross_entropy
NAN = float("nan")
kinds = pytest.mark.parametrize("options", KINDS, ids=str)

# Vectors and their tails; the border to wide rows; a flush of sums; a block; two blocks and one.
CLASS_COUNTS = [*range(1, 34), *range(63, 68), *range(255, 259), *range(2047, 2051), 4097]


def check_inside_nan(sizes, options, dtype, offset=1):
    """Logits and probabilities between NaN, at an odd address: what lies outside must not leak in, nor change."""
    logits = Logits(sizes, "contiguous", "")
    values = make_values(sizes, dtype)
    target, arguments = options.make(logits, dtype)
    n = values.numel()
    buffers = []

    def inside(values):
        buffers.append(values.new_full((n + offset + 40,), NAN))
        buffers[-1][offset : offset + n] = values.flatten()
        return buffers[-1][offset : offset + n].view(sizes)

    x = inside(values)
    y = inside(target) if options.kind == "probability" else target
    copies = [buffer.clone() for buffer in buffers]
    ours = loss_and_grad(cross_entropy, x, y, **arguments)
    theirs = loss_and_grad(F.cross_entropy, values, target, **arguments)
    for own, other, truth in zip(ours, theirs, truth_of(F.cross_entropy, values, target, **arguments), strict=True):
        assert_as_exact(own, other, truth)
    for buffer, copy in zip(buffers, copies, strict=True):
        torch.testing.assert_close(buffer, copy, rtol=0, atol=0, equal_nan=True)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_classes_is_as_exact_as_torch(options, dtype):
    for n_classes in CLASS_COUNTS:
        check_inside_nan((3, n_classes), options, dtype)
        check_inside_nan((2, n_classes, 3), options, dtype)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_of_positions_is_as_exact_as_torch(options, dtype):
    for n in [*range(1, 34), 255, 256, 257]:  # lanes of a tile; a whole tile and its neighbours
        check_inside_nan((n, 3), options, dtype)
        check_inside_nan((1, 3, n), options, dtype)
    for n in range(1, 34):
        check_inside_nan((n, 70), options, dtype)


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_may_start_at_any_element(offset, dtype):
    for options in KINDS:
        for sizes in [(5, 10), (3, 100), (2, 5, 20)]:
            check_inside_nan(sizes, options, dtype, offset)


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_operator_allocates_no_more_than_the_gradient(dtype):
    x, target = make_values((5, 100), dtype), torch.arange(5)
    _, grad = torch.ops.fastopt.cross_entropy_forward(x, target, None, 1, -100, 0.0, True)
    assert grad.shape == x.shape
    assert grad.untyped_storage().nbytes() == grad.numel() * grad.element_size()
