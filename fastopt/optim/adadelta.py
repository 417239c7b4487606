"""Adadelta."""

import torch

from .operator import decayed, operator
from .optimizer import FusedOptimizer


@operator(
    "adadelta_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] square_avgs, Tensor(c!)[] acc_deltas, "
    "Tensor(d!)[] state_steps, *, float lr, float rho=0.9, float eps=1e-06, float weight_decay=0, "
    "bool maximize=False) -> ()"
)
def adadelta_(param, grad, square_avg, acc_delta, step, o):
    step.add_(1)
    grad = decayed(param, grad, o.weight_decay, o.maximize)
    square_avg.mul_(o.rho).addcmul_(grad, grad, value=1 - o.rho)
    delta = acc_delta.add(o.eps).sqrt_().div_(square_avg.add(o.eps).sqrt_()).mul_(grad)
    acc_delta.mul_(o.rho).addcmul_(delta, delta, value=1 - o.rho)
    param.add_(delta, alpha=-o.lr)


class Adadelta(FusedOptimizer, torch.optim.Adadelta, operator=adadelta_):
    r"""Adadelta: :class:`torch.optim.Adadelta` in one native call a step.

        grad       = (-grad if maximize else grad) + weight_decay * param
        square_avg = rho * square_avg + (1 - rho) * grad^2
        delta      = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad
        acc_delta  = rho * acc_delta + (1 - rho) * delta^2
        param     -= lr * delta

    float64, float32, bfloat16 and float16; 16-bit types compute in float32.

    Args:
        params: tensors, named tensors or dicts that define groups.
        lr: factor of the update, number or tensor of one element. Default: 1.0
        rho: decay rate of the running averages. Default: 0.9
        eps: added inside both roots. Default: 1e-6
        weight_decay: L2 penalty. Default: 0
        foreach: accepted with torch's meaning; the step is fused in any case.
        capturable: keep ``step`` on the parameter's CUDA device, so that steps can be captured into a CUDA graph; the
            kernels read and count it there. An error on the CPU, as in torch. Default: False
        maximize: ascend instead of descend. Default: False
        differentiable: take torch's own step. Default: False

    State of a parameter: ``step``, ``square_avg``, ``acc_delta``.

    Raises:
        ValueError: as :class:`torch.optim.Adadelta`, for arguments out of range.

    Source: Zeiler, arXiv:1212.5701, 2012.
    """
