"""NAdam: Adam with Nesterov momentum."""

import math

import torch

from .operator import decayed, operator
from .optimizer import FusedOptimizer


@operator(
    "nadam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] mu_products, Tensor(e!)[] state_steps, *, float lr, float beta1=0.9, float beta2=0.999, "
    "float eps=1e-08, float weight_decay=0, float momentum_decay=0.004, bool decoupled_weight_decay=False, "
    "bool maximize=False) -> ()"
)
def nadam_(param, grad, exp_avg, exp_avg_sq, mu_product, step, o):
    step.add_(1)
    t = step.item()
    mu, mu_next = (o.beta1 * (1 - 0.5 * 0.96 ** (i * o.momentum_decay)) for i in (t, t + 1))
    product = mu_product.mul_(mu).item()
    if o.decoupled_weight_decay and o.weight_decay != 0:
        param.mul_(1 - o.lr * o.weight_decay)
    grad = decayed(param, grad, 0.0 if o.decoupled_weight_decay else o.weight_decay, o.maximize)
    exp_avg.lerp_(grad, 1 - o.beta1)
    exp_avg_sq.mul_(o.beta2).addcmul_(grad, grad, value=1 - o.beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - o.beta2**t)).add_(o.eps)
    param.addcdiv_(grad, denominator, value=-o.lr * (1 - mu) / (1 - product))
    param.addcdiv_(exp_avg, denominator, value=-o.lr * mu_next / (1 - product * mu_next))


class NAdam(FusedOptimizer, torch.optim.NAdam, operator=nadam_):
    r"""NAdam: :class:`torch.optim.NAdam` in one native call a step.

        grad        = (-grad if maximize else grad) + weight_decay * param         (decay: unless decoupled)
        param      -= lr * weight_decay * param                                    (if decoupled_weight_decay)
        mu(t)       = beta1 * (1 - 0.96^(t * momentum_decay) / 2)
        mu_product  = mu_product * mu(step)
        exp_avg     = beta1 * exp_avg + (1 - beta1) * grad
        exp_avg_sq  = beta2 * exp_avg_sq + (1 - beta2) * grad^2
        update      = (1 - mu(step)) / (1 - mu_product) * grad
                      + mu(step + 1) / (1 - mu_product * mu(step + 1)) * exp_avg
        param      -= lr * update / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    float64, float32, bfloat16 and float16; 16-bit types compute in float32.

    Args:
        params, betas, eps, foreach, maximize, differentiable: as :class:`fastopt.Adam`.
        lr: learning rate, number or tensor of one element. Default: 2e-3
        weight_decay: L2 penalty, or decoupled decay. Default: 0
        momentum_decay: of the distance of mu from beta1. Default: 4e-3
        decoupled_weight_decay: decay parameters directly, as AdamW does. Default: False
        capturable: as :class:`fastopt.Adam`, and ``mu_product`` with ``step``. Default: False

    State of a parameter: ``step``, ``mu_product``, ``exp_avg``, ``exp_avg_sq``.

    Raises:
        ValueError: as :class:`torch.optim.NAdam`, for arguments out of range.

    Source: Dozat, Incorporating Nesterov momentum into Adam, ICLR workshop, 2016.
    """
