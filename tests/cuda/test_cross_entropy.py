"""Cross-entropy by the CUDA kernels alone: kernels by size, rows near the limits of shared memory, scaled gradients."""

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES, assert_no_worse, error, to_device
from loss_cases import KINDS, loss_and_grad, make_values, truth_of

RUNS_ON = (devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy
kinds = pytest.mark.parametrize("options", KINDS, ids=str)


KERNEL_KINDS = [
    ((1, 10), "a thread for the row"),
    ((600, 10), "threads for rows, several blocks"),
    ((3, 33), "a warp for each row, one block"),
    ((100, 40), "a warp for each row, several blocks"),
    ((9, 1024), "the widest rows of warps"),
    ((9, 1025), "a block for each row, not aligned"),
    ((5, 4096), "a block for each row, in shared memory"),
    ((9, 30_000), "wide rows, as many as multiprocessors and more"),
    ((2, 16_384), "several blocks for a row"),
    ((3, 20_001), "several blocks for a row, not aligned"),
    ((33_000, 3), "targets counted by several blocks"),
    ((33_000, 34), "the same for warps"),
    ((2, 7, 300), "columns"),
]


@pytest.mark.parametrize(("shape", "why"), KERNEL_KINDS, ids=[why for _, why in KERNEL_KINDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_every_kernel_kind_is_as_exact_as_torch(shape, why, dtype, options):
    if shape[0] > 30_000 and (dtype != torch.float32 or options.ignored != "some" or options.smoothing == 0):
        pytest.skip("one dtype will do")
    x = make_values(shape, dtype)
    indices = torch.arange(x[:, 0].numel()).reshape(x[:, 0].shape)
    target = to_device(indices * 7 % shape[1])
    if options.kind == "probability":
        target = make_values(shape, torch.float64, seed=3).softmax(1).to(dtype)
    else:
        target.masked_fill_(to_device(indices % 3 == 1), -100)
        target.view(-1)[0] = shape[1] - 1  # one counts in any case
    weight = to_device(torch.arange(shape[1]) % 8 + 1).to(dtype) / 4 if options.has_weight else None
    for reduction in ("mean", "none"):
        arguments = dict(weight=weight, reduction=reduction, label_smoothing=options.smoothing)
        own = loss_and_grad(cross_entropy, x, target, **arguments)
        other = loss_and_grad(F.cross_entropy, x, target, **arguments)
        truth = truth_of(F.cross_entropy, x, target, **arguments)
        for a, b, c in zip(own, other, truth, strict=True):
            assert_no_worse(a, b, c, slack=128 if dtype == torch.float64 else 8)  # float64 is the truth itself


# Bytes of a row near each size at which it is treated otherwise: at 48 KiB, less static shared memory, a kernel has to
# ask for more, and at 112 KiB two rows no longer fit a multiprocessor's shared memory.
AROUND_LIMITS = [
    *(48 * 1024 + n for n in (-4096, -528, -420, -416, -412, -280, -216, -24, -16, -8, 0, 8)),
    *(112 * 1024 + n for n in (-24, -16, -8, 8)),
]


@pytest.mark.parametrize("row_bytes", AROUND_LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_rows_of_any_size_are_exact_in_shared_memory_or_beyond(row_bytes, dtype, kind):
    for n_classes in (row_bytes // dtype.itemsize, row_bytes // dtype.itemsize + 1):
        x = make_values((5, n_classes), dtype)
        target = to_device(torch.tensor([0, 7, n_classes - 1, n_classes // 2, -100]))
        if kind == "probability":
            target = make_values((5, n_classes), torch.float64, seed=3).softmax(1).to(dtype)
        own, other = (loss_and_grad(function, x, target) for function in (cross_entropy, F.cross_entropy))
        truth = truth_of(F.cross_entropy, x, target)
        for a, b, c in zip(own, other, truth, strict=True):
            assert_no_worse(a, b, c, slack=128 if dtype == torch.float64 else 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 4096, 40_000])
def test_gradients_are_scaled_on_the_device(dtype, n):
    x = make_values((n, 3), dtype).requires_grad_()
    target = to_device(torch.arange(n) % 3)
    for factor in (1.0, 0.5, 1024.0, float("nan")):
        loss = cross_entropy(x, target)
        (grad,) = torch.autograd.grad(loss, x, torch.tensor(factor, dtype=dtype), retain_graph=True)
        (again,) = torch.autograd.grad(loss, x, torch.tensor(factor, dtype=dtype))
        (truth,) = torch.autograd.grad(
            F.cross_entropy(wide := x.detach().double().requires_grad_(), target), wide, torch.tensor(factor).double()
        )
        assert torch.equal(grad.nan_to_num(), again.nan_to_num())
        assert grad.dtype == dtype
        assert error(grad, truth) <= 8 * torch.finfo(dtype).eps * max(1.0, torch.tensor(factor).nan_to_num().item())
