"""Adam and its AMSGrad variant."""

import math

import torch

from .operator import decayed, operator
from .optimizer import FusedOptimizer


@operator(
    "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] state_steps, *, float lr, float beta1=0.9, float beta2=0.999, "
    "float eps=1e-08, float weight_decay=0, bool amsgrad=False, bool maximize=False, "
    "bool decoupled_weight_decay=False) -> ()"
)
def adam_(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, step, o):
    step.add_(1)
    t = step.item()
    if o.decoupled_weight_decay and o.weight_decay != 0:
        param.mul_(1 - o.lr * o.weight_decay)
    grad = decayed(param, grad, 0.0 if o.decoupled_weight_decay else o.weight_decay, o.maximize)
    exp_avg.lerp_(grad, 1 - o.beta1)
    exp_avg_sq.mul_(o.beta2).addcmul_(grad, grad, value=1 - o.beta2)
    variance = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq) if o.amsgrad else exp_avg_sq
    denominator = variance.sqrt().div_(math.sqrt(1 - o.beta2**t)).add_(o.eps)
    param.addcdiv_(exp_avg, denominator, value=-o.lr / (1 - o.beta1**t))


class Adam(FusedOptimizer, torch.optim.Adam, operator=adam_):
    r"""Adam: :class:`torch.optim.Adam` in one native call a step.

        grad        = (-grad if maximize else grad) + weight_decay * param         (decay: unless decoupled)
        param      -= lr * weight_decay * param                                    (if decoupled_weight_decay)
        exp_avg     = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad^2
        max_exp_avg_sq = max(max_exp_avg_sq, exp_avg_sq)                           (if amsgrad: used below)
        param      -= lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    float64, float32, bfloat16 and float16; 16-bit types compute in float32.

    Args:
        params: tensors, named tensors or dicts that define groups.
        lr: learning rate, number or tensor of one element. Default: 1e-3
        betas: decay rates of the running averages. Default: (0.9, 0.999)
        eps: added to the denominator, outside the root. Default: 1e-8
        weight_decay: L2 penalty, or decoupled decay. Default: 0
        amsgrad: divide by the largest second moment so far. Default: False
        foreach, fused: accepted with torch's meaning; the step is fused in any case.
        maximize: ascend instead of descend. Default: False
        capturable: keep ``step`` on the parameter's CUDA device, so that steps can be captured into a CUDA graph; the
            kernels read and count it there. An error on the CPU, as in torch. Default: False
        differentiable: take torch's own step. Default: False
        decoupled_weight_decay: decay parameters directly, as AdamW does. Default: False

    State of a parameter: ``step``, ``exp_avg``, ``exp_avg_sq``, and ``max_exp_avg_sq`` if amsgrad.

    Raises:
        ValueError: as :class:`torch.optim.Adam`, for arguments out of range.

    Source: Kingma & Ba, arXiv:1412.6980, 2015; AMSGrad: Reddi, Kale & Kumar, arXiv:1904.09237, 2018.
    """
