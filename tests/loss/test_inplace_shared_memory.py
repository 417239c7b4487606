"""``inplace_backward`` of logits that share memory, with each other or with a target: torch's gradient, or refused."""

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from loss_cases import make_values
from loss_helpers import CHANGED, Produce

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy


def windows(x):
    """Rows that begin two classes apart."""
    return torch.as_strided(x, (4, 10), (2, 1))


# Of 60 logits that nothing else holds; the target may lie in the same memory, or the weights, or probabilities.
def overlapping_rows(x):
    return windows(x), torch.arange(4), {}


def overlapping_images(x):
    return torch.as_strided(x, (2, 5, 3), (7, 3, 1)), torch.arange(6).view(2, 3) % 5, {}


def overlapping_columns(x):
    return torch.as_strided(x, (6, 4), (1, 3)), torch.arange(6) % 4, {}


def rows_of_every_other_class_that_interlock(x):
    return torch.as_strided(x, (2, 5), (1, 2)), torch.arange(2), {}


def a_row_that_is_all_classes(x):
    return x[:6].view(6, 1).expand(6, 10), torch.arange(6), {}


def one_row_for_all(x):
    return x[:10].expand(6, 10), torch.arange(6), {}


def weights_from_the_logits(x):
    return x.view(6, 10), torch.arange(6), {"weight": x.detach()[5:15]}


def probabilities_that_are_the_logits(x):
    return x.view(6, 10), x.detach().view(6, 10), {}


def probabilities_in_the_next_row(x):
    return x[:50].view(5, 10), x.detach()[10:].view(5, 10), {}


def probabilities_in_the_same_row(x):
    return x.view(6, 10)[:, :5], x.detach().view(6, 10)[:, 5:], {}


def indices_in_the_logits(x):
    values = x.detach()
    target = values[:12].view(torch.int64)
    target.copy_(torch.arange(6))
    return x.view(6, 10), target, {}


SHARED = [
    overlapping_rows,
    overlapping_images,
    overlapping_columns,
    rows_of_every_other_class_that_interlock,
    a_row_that_is_all_classes,
    one_row_for_all,
    weights_from_the_logits,
    probabilities_that_are_the_logits,
    probabilities_in_the_next_row,
    probabilities_in_the_same_row,
    indices_in_the_logits,
]


@pytest.mark.parametrize("n_uses", [1, 2])
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("make", SHARED, ids=lambda f: f.__name__)
def test_logits_that_share_memory_get_torchs_gradient_or_are_refused(make, reduction, factor, n_uses):
    """Logits that the first backward overwrites are read by the second."""

    def grads(function, **in_place):
        leaf = (make_values((60,)).abs() + 0.1).requires_grad_()
        memory = Produce.apply(leaf * 1)
        x, target, options = make(memory)
        copies = [t.clone() for t in (x, target, *options.values())]
        losses = [function(x, target, **options, reduction=reduction, **in_place) for _ in range(n_uses)]
        sum(loss.sum() * factor for loss in losses).backward()
        return leaf.grad, (x, target, *options.values()), copies

    expected = grads(F.cross_entropy)[0]
    try:
        found, tensors, copies = grads(cross_entropy, inplace_backward=True)
    except RuntimeError as error:
        if "more than one element of the written-to tensor" not in str(error) and CHANGED not in str(error):
            raise
        return
    torch.testing.assert_close(found, expected)
    others = zip(tensors[1:], copies[1:], strict=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in others), "a target or a weight was overwritten"
