"""The formulas of the reference path against torch's autograd; the rest of it is tested wherever the kernels are."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from common import error
from fastopt import reference

SHAPES = [((5,), ()), ((6, 7), (6,)), ((2, 3, 4), (2, 4))]  # one row, rows, positions


@pytest.mark.parametrize("has_probabilities", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_cross_entropy_by_formula_is_autograds(has_probabilities, has_weight, smoothing):
    for (shape, positions), reduction in itertools.product(SHAPES, ("none", "mean", "sum")):
        n_classes = shape[min(1, len(shape) - 1)]
        logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        target = torch.randint(0, n_classes, positions)
        if target.dim():
            target.view(-1)[0] = -100
        if has_probabilities:
            target = torch.rand(shape, dtype=torch.float64)
        weight = torch.rand(n_classes, dtype=torch.float64) if has_weight else None
        F.cross_entropy(logits, target, weight, reduction=reduction, label_smoothing=smoothing).sum().backward()
        grad = reference.cross_entropy_gradient(logits.detach(), target, weight, reduction, -100, smoothing)
        assert error(grad, logits.grad) <= 1e-14
