"""Adagrad."""

import torch

from .operator import decayed, operator
from .optimizer import FusedOptimizer


@operator(
    "adagrad_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state_sums, Tensor(c!)[] state_steps, *, float lr, "
    "float lr_decay=0, float weight_decay=0, float eps=1e-10, bool maximize=False) -> ()"
)
def adagrad_(param, grad, state_sum, step, o):
    lr = o.lr / (1 + step.item() * o.lr_decay)
    step.add_(1)
    grad = decayed(param, grad, o.weight_decay, o.maximize)
    state_sum.addcmul_(grad, grad)
    param.addcdiv_(grad, state_sum.sqrt().add_(o.eps), value=-lr)


class Adagrad(FusedOptimizer, torch.optim.Adagrad, operator=adagrad_):
    r"""Adagrad: :class:`torch.optim.Adagrad` in one native call a step.

        grad   = (-grad if maximize else grad) + weight_decay * param
        sum    = sum + grad^2
        param -= lr / (1 + (step - 1) * lr_decay) * grad / (sqrt(sum) + eps)

    float64, float32, bfloat16 and float16; 16-bit types compute in float32. Sparse gradients take torch's own step.

    Args:
        params: tensors, named tensors or dicts that define groups.
        lr: learning rate, number or tensor of one element. Default: 1e-2
        lr_decay: of the learning rate. Default: 0
        weight_decay: L2 penalty. Default: 0
        initial_accumulator_value: of ``sum``. Default: 0
        eps: added to the denominator, outside the root. Default: 1e-10
        foreach, fused: accepted with torch's meaning; the step is fused in any case.
        maximize: ascend instead of descend. Default: False
        differentiable: take torch's own step. Default: False

    State of a parameter: ``step``, ``sum``; made by the constructor.

    Raises:
        ValueError: as :class:`torch.optim.Adagrad`, for arguments out of range.

    Source: Duchi, Hazan & Singer, Adaptive subgradient methods, JMLR 12, 2011.
    """
