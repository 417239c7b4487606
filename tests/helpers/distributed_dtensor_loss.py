"""Checks of cross-entropy with DTensors, against torch's on all logits in float64."""

import contextlib
import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from common import DTYPES
from distributed_loss import ALL_REDUCED_TWICE, CASES, N_CLASSES, REDUCTIONS, Collectives, compare, make, slope
from distributed_modes import Check, mesh
from fastopt.nn.functional import cross_entropy


def check_torchs_function_replaced(_folder):
    """By ours: DTensors end as in torch, whether their classes are sharded or not."""
    logits, target, _ = make(shape=(16, N_CLASSES))
    on, torchs = mesh(), F.cross_entropy
    expected = torchs(logits, target)
    grad = torch.func.grad(lambda x: torchs(x, target))(logits)
    F.cross_entropy = cross_entropy
    try:
        for placement, target_placement in ((Shard(1), Replicate()), (Shard(0), Shard(0)), (Replicate(), Replicate())):
            x = distribute_tensor(logits, on, [placement]).requires_grad_()
            loss = F.cross_entropy(x, distribute_tensor(target, on, [target_placement]))
            loss.backward()
            torch.testing.assert_close(loss.full_tensor(), expected)
            torch.testing.assert_close(x.grad.full_tensor(), grad)
        with loss_parallel():
            loss = torch.nn.CrossEntropyLoss()(distribute_tensor(logits, on, [Shard(1)]), target)
        torch.testing.assert_close(loss.full_tensor(), expected)
        with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
            F.cross_entropy(distribute_tensor(logits, on, [Shard(1)]), target)
    finally:
        F.cross_entropy = torchs
    return {}


def check_dtensor(shape_of_mesh, placements, is_inside, options, _folder):
    """The function is torch's with DTensors; nothing is gathered. ``is_inside``: of ``loss_parallel()``."""
    on = mesh(*(size or dist.get_world_size() for size in shape_of_mesh))
    everywhere = [Replicate()] * on.ndim
    largest = 0.0
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        logits, target, more = make(**options)
        logits, more = logits.to(dtype), {**more, "reduction": reduction}
        ours = distribute_tensor(logits, on, placements).requires_grad_()
        given, weight = target, more.pop("weight", None)
        weight = None if weight is None else weight.to(dtype)
        if not is_inside:
            given = distribute_tensor(target, on, everywhere)
            weight = None if weight is None else distribute_tensor(weight, on, everywhere)
        with loss_parallel() if is_inside else contextlib.nullcontext(), Collectives() as comm:
            loss = cross_entropy(ours, given, weight, **more)
            loss.backward(DTensor.from_local(slope(loss).to(dtype), on, everywhere, run_check=False))
        assert ours.grad.placements == ours.placements
        assert comm.names == ALL_REDUCED_TWICE
        whole_grad = ours.grad.full_tensor()
        place = (0, 0, whole_grad.shape[0])
        whole_options = {**make(**options)[2], "reduction": reduction}
        largest = max(largest, compare(loss.full_tensor().detach(), whole_grad, place, logits, target, whole_options))
    return {"largest": largest}


def check_other_dtensors_go_to_torch(_folder):
    """Logits sharded by row, and targets that torch refuses."""
    on = mesh()
    logits, target, _ = make(shape=(16, N_CLASSES))
    rows = distribute_tensor(logits, on, [Shard(0)])
    targets = distribute_tensor(target, on, [Shard(0)])
    loss = cross_entropy(rows, targets)
    torch.testing.assert_close(loss.full_tensor(), F.cross_entropy(logits, target))
    by_class = distribute_tensor(logits, on, [Shard(1)])
    with pytest.raises(RuntimeError, match="mixed torch.Tensor and DTensor"):
        cross_entropy(by_class, target)
    return {}


CHECKS = {
    "cross_entropy/torch's function replaced": Check(check_torchs_function_replaced),
    "cross_entropy/other DTensors go to torch": Check(check_other_dtensors_go_to_torch),
}
for name, is_inside in (("inside loss_parallel", True), ("outside loss_parallel", False)):
    for case in ("defaults", "smoothing, weights, ignored", "positions in two dimensions", "one position"):
        placement = Shard(0 if case == "one position" else 1)
        CHECKS[f"DTensor/{name}/{case}"] = Check(
            functools.partial(check_dtensor, (None,), [placement], is_inside, CASES[case])
        )
    CHECKS[f"DTensor/{name}/on a mesh of 2 x 2"] = Check(
        functools.partial(check_dtensor, (2, 2), [Replicate(), Shard(1)], is_inside, CASES["defaults"]), (4,)
    )
