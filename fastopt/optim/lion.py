"""Lion, which torch.optim does not have."""

import torch

from .operator import operator
from .optimizer import FusedOptimizer
from .plain import PlainOptimizer, check_options


@operator(
    "lion_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, *, float lr, float beta1=0.9, "
    "float beta2=0.99, float weight_decay=0, bool maximize=False) -> ()"
)
def lion_(param, grad, exp_avg, o):
    grad = -grad if o.maximize else grad
    if o.weight_decay != 0:
        param.mul_(1 - o.lr * o.weight_decay)
    average = exp_avg.mul(o.beta1).add_(grad, alpha=1 - o.beta1)
    param.add_(torch.where(average.isnan(), average, average.sign()), alpha=-o.lr)  # torch.sign makes 0 of NaN
    exp_avg.mul_(o.beta2).add_(grad, alpha=1 - o.beta2)


class Lion(FusedOptimizer, PlainOptimizer, operator=lion_):
    r"""Lion in one native call a step.

        grad    = -grad if maximize else grad
        param  -= lr * weight_decay * param
        param  -= lr * sign(beta1 * exp_avg + (1 - beta1) * grad)
        exp_avg = beta2 * exp_avg + (1 - beta2) * grad

    float64, float32, bfloat16 and float16; 16-bit types compute in float32. A step is of the same size whatever the
    gradient is: take a third to a tenth of AdamW's learning rate, and as much more decay.

    Args:
        params: tensors, named tensors or dicts that define groups.
        lr: learning rate, number or tensor of one element. Default: 1e-4
        betas: decay rates of the update's average and of the state. Default: (0.9, 0.99)
        weight_decay: decoupled decay. Default: 0
        foreach: accepted as torch's optimizers take it; the step is fused in any case.
        maximize: ascend instead of descend. Default: False

    State of a parameter: ``exp_avg``.

    Raises:
        ValueError: lr or weight_decay is negative, or a beta outside [0, 1).

    Source: Chen et al., Symbolic discovery of optimization algorithms, arXiv:2302.06675, 2023, algorithm 2.
    """

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, foreach=None, maximize=False):
        check_options(lr=lr, betas=betas, weight_decay=weight_decay)
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, foreach=foreach, maximize=maximize)
        super().__init__(params, defaults)
