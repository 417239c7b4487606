"""Small cases of the benchmark, and providers of wrong results."""

import pytest
import torch
import torch.nn.functional as F

from fastopt.bench import tables
from fastopt.bench.cases import LossCase, OptimizerCase
from fastopt.bench.providers import Provider

SHAPES = ((3, 5), (1,), (129,))
SMALL_STEPS = [OptimizerCase(row, row.label, SHAPES) for row in tables.OPTIMIZERS if row.label]
CROSS_ENTROPY, *_ = tables.LOSSES
SMALL_LOSSES = [
    LossCase(CROSS_ENTROPY, (7, 10)),
    LossCase(CROSS_ENTROPY, (7, 10), options=dict(label_smoothing=0.1)),
    LossCase(CROSS_ENTROPY, (7, 10), trait="probabilities"),
    LossCase(CROSS_ENTROPY, (7, 10), torch.bfloat16),
    LossCase(CROSS_ENTROPY, (7, 10), trait="no gradient"),
    LossCase(CROSS_ENTROPY, (2, 5, 3, 4)),
    LossCase(CROSS_ENTROPY, (2, 5, 3, 4), trait="channels_last"),
]


def named(values):
    return pytest.mark.parametrize("case", values, ids=[value.name for value in values])


def is_right(ready, started):
    error, allowed = ready.check(started)
    return error <= allowed


def faulty_loss(change):
    def loss(logits, target, **options):
        return change(F.cross_entropy(logits, target, **options))

    return Provider("faulty", lambda case: loss)
