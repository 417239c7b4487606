"""Checks of cross-entropy whose classes are divided among processes, against torch's on all logits in float64."""

import copy
import functools
import io
import itertools
import math
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from common import DTYPES, assert_no_worse, error, is_native, kernel_calls
from distributed_modes import Check, mesh
from fastopt.nn.functional import cross_entropy

N_CLASSES = 11
# More classes than a block of the kernel has; shares of it, and shares that it does not take.
N_MANY, MIN_KERNEL_CLASSES = 5000, 65
SHARES = {
    N_CLASSES: {2: (5, 6), 4: (5, 0, 4, 2)},
    N_MANY: {1: (5000,), 2: (2100, 2900), 3: (65, 4935, 0), 4: (2100, 0, 64, 2836)},
}
WEIGHT = torch.linspace(0.2, 3.0, N_CLASSES, dtype=torch.float64)
MANY_WEIGHTS = torch.linspace(0.2, 3.0, N_MANY, dtype=torch.float64)
ALL_REDUCED_TWICE = ["c10d.allreduce_.default"] * 2
REDUCTIONS = ("mean", "sum", "none")

CASES = {
    "defaults": dict(),
    "one position": dict(shape=(N_CLASSES,)),
    "positions in two dimensions": dict(shape=(4, N_CLASSES, 3, 2), weight=WEIGHT, label_smoothing=0.1),
    "no positions": dict(shape=(0, N_CLASSES)),
    "weights": dict(weight=WEIGHT),
    "ignored positions": dict(n_ignored=3),
    "an ignored class": dict(ignore_index=7),
    "all ignored": dict(n_ignored=16),
    "smoothing": dict(label_smoothing=0.3),
    "smoothing only": dict(label_smoothing=1.0),
    "smoothing, weights, ignored": dict(label_smoothing=0.3, weight=WEIGHT, n_ignored=3),
    "a shift of 10000": dict(shift=10000.0),
    "masked classes": dict(n_masked=5),  # all that the first process holds
    "a NaN logit": dict(broken=math.nan),
    "an infinite logit": dict(broken=math.inf),
}
MANY = {
    "defaults": dict(),
    "one position": dict(shape=(N_MANY,), weight=MANY_WEIGHTS, label_smoothing=0.1),
    "positions in two dimensions": dict(shape=(4, N_MANY, 3), weight=MANY_WEIGHTS, label_smoothing=0.1),
    "no positions": dict(shape=(0, N_MANY)),
    "weights": dict(weight=MANY_WEIGHTS),
    "ignored positions": dict(n_ignored=3),
    "an ignored class": dict(ignore_index=7),
    "all ignored": dict(n_ignored=16, label_smoothing=0.3),
    "smoothing": dict(label_smoothing=0.3),
    "smoothing only": dict(label_smoothing=1.0, weight=MANY_WEIGHTS),
    "smoothing, weights, ignored": dict(label_smoothing=0.3, weight=MANY_WEIGHTS, n_ignored=3),
    "a shift of 10000": dict(shift=10000.0, label_smoothing=0.3),
    "masked classes": dict(n_masked=2100),
    "masked classes, smoothing": dict(n_masked=2100, label_smoothing=0.3, weight=MANY_WEIGHTS),
    "all classes masked": dict(n_masked=N_MANY),
    "a NaN logit": dict(broken=math.nan),
    "an infinite logit": dict(broken=math.inf, label_smoothing=0.3),
    "nearly certain": dict(certain=20.0),
    "nearly certain, smoothing": dict(certain=20.0, label_smoothing=0.1),
}
MANY = {case: {"shape": (16, N_MANY), **options} for case, options in MANY.items()}


class Collectives(TorchDispatchMode):
    """Names of the collectives inside. torch's CommDebugMode does it too, but takes a second to import."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # which becomes operators on local tensors
        if "c10d" in func.namespace and "wait" not in str(func):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def make(shape=(16, N_CLASSES), n_ignored=0, shift=0.0, n_masked=0, broken=None, certain=None, **options):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + shift
    dim = 1 if len(shape) > 1 else 0
    n_classes = shape[dim]
    positions = shape[:1] + shape[2:] if dim else ()
    target = torch.randint(n_masked % n_classes, n_classes, positions, generator=generator)
    logits.narrow(dim, 0, n_masked)[...] = -torch.inf
    if broken is not None:
        logits[2, 8] = broken
    if certain is not None:
        logits.scatter_(dim, target.unsqueeze(dim), logits.amax(dim, keepdim=True) + certain)
    if n_ignored:
        target[:n_ignored] = -100
    return logits, target, options


def theirs(logits, target, weight=None, **options):
    """torch's loss and gradient on all logits."""
    logits = logits.clone().requires_grad_()
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits, target, weight, **options)
    (loss.double() * slope(loss)).sum().backward()
    return loss.detach(), logits.grad


def slope(loss):
    return torch.linspace(0.5, 2.0, max(1, loss.numel()), dtype=torch.float64)[: loss.numel()].view(loss.shape)


def sharded(logits, target, group=None, weight=None, **options):
    """Our loss, our share of the gradient, and where it belongs."""
    rank = dist.get_rank(group)
    dim = 1 if logits.dim() > 1 else 0
    shares = SHARES[logits.shape[dim]][dist.get_world_size(group)]
    start, size = sum(shares[:rank]), shares[rank]
    mine = logits.narrow(dim, start, size).clone().requires_grad_()
    weight = None if weight is None else weight[start : start + size].to(logits.dtype)
    group = group or dist.group.WORLD
    loss = cross_entropy(mine, target, weight, process_group=group, **options)
    (loss.double() * slope(loss)).sum().backward()
    return loss.detach(), mine.grad, (dim, start, size)


def compare(ours, our_grad, place, logits, target, options):
    truth, truth_grad = theirs(logits.double(), target, **options)
    reference, reference_grad = theirs(logits, target, **options)
    assert ours.dtype == reference.dtype
    assert_no_worse(ours, reference, truth, slack=4)
    assert_no_worse(our_grad, reference_grad.narrow(*place), truth_grad.narrow(*place), slack=4)
    return error(ours, truth)


def check_case(case, _folder):
    largest = {}
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        logits, target, options = make(**CASES[case])
        logits, options = logits.to(dtype), {**options, "reduction": reduction}
        found = compare(*sharded(logits, target, **options), logits, target, options)
        largest[str(dtype)] = max(largest.get(str(dtype), 0.0), found)
    return largest


def check_many_classes(case, sizes_of_groups, _folder):
    """Each process's kernels take its share, whatever the others' do. Groups of the given sizes, or all processes."""
    ranks = iter(range(dist.get_world_size()))
    groups = [dist.new_group([next(ranks) for _ in range(size)]) for size in sizes_of_groups]
    group = next((group for group in groups if dist.get_rank(group) >= 0), dist.group.WORLD)
    results = []
    for dtype, reduction in itertools.product(DTYPES, REDUCTIONS):
        logits, target, options = make(**MANY[case])
        logits, options = logits.to(dtype), {**options, "reduction": reduction}
        before = kernel_calls("cross_entropy")
        found = sharded(logits, target, group, **options)
        results.append((kernel_calls("cross_entropy") - before, *found, logits, target, options))
    for n_calls, loss, grad, place, logits, target, options in results:  # an error above would leave others waiting
        takes = is_native() and logits.dim() < 3 and place[2] >= MIN_KERNEL_CLASSES and target.numel() > 0
        assert n_calls == 2 * takes
        if logits.dtype != torch.float64:
            compare(loss, grad, place, logits, target, options)
            continue
        # torch's float64 has rounded sums over all classes itself.
        truth, truth_grad = theirs(logits, target, **options)
        for ours, torchs in ((loss, truth), (grad, truth_grad.narrow(*place))):
            torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-14, equal_nan=True)
    return {}


def check_few_numbers_are_communicated(_folder):
    n_rows, sent = 64, []
    all_reduce = dist.all_reduce

    def spy(tensor, *args, **kwargs):
        sent.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    logits, target, options = make(shape=(n_rows, N_CLASSES), weight=WEIGHT, label_smoothing=0.1)
    dist.all_reduce = spy
    try:
        with Collectives() as comm:
            sharded(logits, target, **options)
    finally:
        dist.all_reduce = all_reduce
    assert len(sent) == 2, sent
    assert sum(sent) <= 6 * n_rows + 2 * dist.get_world_size(), sent
    assert comm.names == ALL_REDUCED_TWICE
    return {"sent": sent}


def check_groups_are_apart(_folder):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    which = dist.get_rank() // 2
    logits, target, options = make()
    logits = logits + torch.arange(N_CLASSES) * which
    return {"loss_error": compare(*sharded(logits, target, groups[which]), logits, target, options)}


def check_module(_folder):
    logits, target, _ = make()
    shares = SHARES[N_CLASSES][dist.get_world_size()]
    start, size = sum(shares[: dist.get_rank()]), shares[dist.get_rank()]
    options = dict(label_smoothing=0.1, reduction="sum")
    weight = WEIGHT[start : start + size]
    loss = fastopt.CrossEntropyLoss(weight, process_group=dist.group.WORLD, **options)(
        logits[:, start:][:, :size], target
    )
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, WEIGHT, **options))
    with torch.autocast("cpu", torch.bfloat16):
        halves = cross_entropy(logits[:, start:][:, :size].bfloat16(), target, process_group=dist.group.WORLD)
    assert halves.dtype == torch.float32
    return {}


def check_copies(_folder):
    """A copy has the group itself; what is saved is loaded with this process's own group of that name."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if dist.get_world_size() == 4 else [dist.group.WORLD]
    mine = groups[dist.get_rank() // 2]
    logits, target, _ = make()
    start, size = (0, 5) if dist.get_rank(mine) == 0 else (5, 6)
    module = fastopt.CrossEntropyLoss(WEIGHT[start : start + size], process_group=mine)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    expected = F.cross_entropy(logits, target, WEIGHT)
    for found in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert found.process_group is mine
        torch.testing.assert_close(found(logits[:, start : start + size], target), expected)
    return {}


def check_refusals(_folder):
    x, t, group = torch.randn(4, 3, requires_grad=True), torch.zeros(4, dtype=torch.int64), dist.group.WORLD
    n_processes = dist.get_world_size()
    refused = [
        (TypeError, "ProcessGroup", lambda: cross_entropy(x, t, process_group="world")),
        (ValueError, "probabilities", lambda: cross_entropy(x, torch.ones(4, 3), process_group=group)),
        (ValueError, "target size", lambda: cross_entropy(x, t[:3], process_group=group)),
        (RuntimeError, "dtype", lambda: cross_entropy(x, t.int(), process_group=group)),
        (RuntimeError, "weight", lambda: cross_entropy(x, t, torch.ones(3 * n_processes), process_group=group)),
        (RuntimeError, "weight", lambda: cross_entropy(x, t, torch.ones(3).double(), process_group=group)),
        (RuntimeError, "label_smoothing", lambda: cross_entropy(x, t, label_smoothing=1.5, process_group=group)),
        (ValueError, "reduction", lambda: cross_entropy(x, t, reduction="all", process_group=group)),
        (IndexError, "out of bounds", lambda: cross_entropy(x, t + 3 * n_processes, process_group=group)),
        (IndexError, "out of bounds", lambda: cross_entropy(x, t - 1, process_group=group)),
    ]
    whole = distribute_tensor(x, mesh(), [Shard(1)])
    refused.append((TypeError, "DTensor", lambda: cross_entropy(whole, t, process_group=group)))
    loss = cross_entropy(x, t, process_group=group)
    refused.append((RuntimeError, "twice", lambda: torch.autograd.grad(loss, x, create_graph=True)))
    refused.append(
        (ValueError, "inplace_backward", lambda: cross_entropy(x, t, inplace_backward=True, process_group=group))
    )
    for kind, words, call in refused:
        with pytest.raises(kind, match=words):
            call()
    return {}


CHECKS = {f"cross_entropy/{case}": Check(functools.partial(check_case, case)) for case in CASES}
for case in MANY:
    CHECKS[f"cross_entropy/many classes/{case}"] = Check(functools.partial(check_many_classes, case, ()))
    in_groups = functools.partial(check_many_classes, case, (1, 3))
    CHECKS[f"cross_entropy/many classes, groups of 1 and 3/{case}"] = Check(in_groups, (4,))
CHECKS |= {
    "cross_entropy/few numbers are communicated": Check(check_few_numbers_are_communicated),
    "cross_entropy/groups are apart": Check(check_groups_are_apart, (4,)),
    "cross_entropy/module": Check(check_module),
    "cross_entropy/copies": Check(check_copies),
    "cross_entropy/refusals": Check(check_refusals),
}
