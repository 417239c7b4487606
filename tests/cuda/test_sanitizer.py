"""Every CUDA kernel on a few small inputs: what compute-sanitizer watches, for it slows a kernel a hundredfold."""

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import error, to_device
from loss_cases import loss_and_grad, make_values, truth_of
from optim_cases import OPTIM_CASES, make_params, set_grads

RUNS_ON = (devices.SHIM_DEVICE, devices.CUDA)

# Positions, a warp a row, a block a row (in shared memory and beyond it), several blocks a row; odd sizes throughout.
SHAPES = ((33, 10), (3, 5, 7), (9, 333), (5, 3001), (40, 60_001), (2, 20_001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", OPTIM_CASES, ids=str)
def test_a_step_of_every_rule(case, dtype):
    shapes = [(3,), (4099,), (1,)]
    own, truth = make_params(shapes, dtype), make_params(shapes, torch.float64)
    for params, cls in ((own, case.ours), (truth, case.theirs)):
        optimizer = cls(params, **case.options)
        for step in range(2):
            set_grads(params, seed=step)
            optimizer.step()
    for p, t in zip(own, truth, strict=True):
        assert error(p, t) <= (0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_loss_of_every_layout(shape, kind, dtype):
    x = make_values(shape, dtype)
    target = to_device(torch.arange(x[:, 0].numel()).reshape(x[:, 0].shape) % shape[1])
    if kind == "probability":
        target = make_values(shape, torch.float64, seed=3).softmax(1).to(dtype)
    weight = to_device(torch.arange(shape[1]) % 8 + 1).to(dtype) / 4
    arguments = dict(weight=weight, label_smoothing=0.1)
    own = loss_and_grad(fastopt.functional.cross_entropy, x, target, **arguments)
    truth = truth_of(F.cross_entropy, x, target, **arguments)
    for a, b in zip(own, truth, strict=True):
        assert error(a, b) <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * b.abs().max().item()
