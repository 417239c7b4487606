"""Every rule and loss in plain torch: the fallback, and what the kernels are measured against.

The optimizers take lists of tensors as their operators do and update them in place. 16-bit tensors compute in float32
and are rounded once, as in the kernels.
"""

import math

import torch
from torch.nn import _reduction

# torch's own loss below torch.nn.functional.cross_entropy, which others replace, by fastopt's for one.
torch_cross_entropy = torch._C._nn.cross_entropy_loss

KERNEL_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _updated(compute):
    """Run ``compute(param, grad, *states)`` in place in the compute type; round 16-bit tensors at the end."""

    def run(param, grad, *states):
        tensors = (param, *states)
        if param.dtype not in (torch.bfloat16, torch.float16):
            compute(param, grad, *states)
            return
        wide = [tensor.float() for tensor in tensors]
        compute(wide[0], grad.float(), *wide[1:])
        for tensor, value in zip(tensors, wide, strict=True):
            tensor.copy_(value)

    return run


def _decayed(param, grad, weight_decay, maximize):
    grad = -grad if maximize else grad
    return grad.add(param, alpha=weight_decay) if weight_decay != 0 else grad


@torch.no_grad()
def sgd_(
    params,
    grads,
    momentum_buffers,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    is_first_step=False,
):
    """SGD, see :class:`fastopt.SGD`. ``is_first_step``: the momentum buffers are set to the gradients, undamped."""

    @_updated
    def update(param, grad, *states):
        grad = _decayed(param, grad, weight_decay, maximize)
        if momentum != 0:
            (buffer,) = states
            if is_first_step:
                buffer.copy_(grad)
            else:
                buffer.mul_(momentum).add_(grad, alpha=1 - dampening)
            grad = grad.add(buffer, alpha=momentum) if nesterov else buffer
        param.add_(grad, alpha=-lr)

    for i, param in enumerate(params):
        update(param, grads[i], *((momentum_buffers[i],) if momentum != 0 else ()))


@torch.no_grad()
def rmsprop_(
    params,
    grads,
    square_avgs,
    momentum_buffers,
    grad_avgs,
    state_steps,
    *,
    lr,
    alpha=0.99,
    eps=1e-8,
    weight_decay=0.0,
    momentum=0.0,
    centered=False,
    maximize=False,
):
    """RMSprop, see :class:`fastopt.RMSprop`. Steps count up; unused lists may be empty."""

    @_updated
    def update(param, grad, square_avg, *states):
        grad = _decayed(param, grad, weight_decay, maximize)
        square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
        variance = square_avg
        if centered:
            grad_avg = states[-1]
            grad_avg.lerp_(grad, 1 - alpha)
            variance = square_avg.addcmul(grad_avg, grad_avg, value=-1)
            variance = torch.where(variance < 0, 0.0, variance)  # not negative but for rounding; NaN stays
        denominator = variance.sqrt().add_(eps)
        if momentum > 0:
            states[0].mul_(momentum).addcdiv_(grad, denominator)
            param.add_(states[0], alpha=-lr)
        else:
            param.addcdiv_(grad, denominator, value=-lr)

    for i, param in enumerate(params):
        state_steps[i].add_(1)
        states = [square_avgs[i]]
        states += [momentum_buffers[i]] if momentum > 0 else []
        states += [grad_avgs[i]] if centered else []
        update(param, grads[i], *states)


@torch.no_grad()
def adam_(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    state_steps,
    *,
    lr,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    amsgrad=False,
    maximize=False,
    decoupled_weight_decay=False,
):
    """Adam, see :class:`fastopt.Adam`. Steps count up; ``max_exp_avg_sqs`` may be empty without amsgrad."""
    l2_decay = 0.0 if decoupled_weight_decay else weight_decay

    for i, param in enumerate(params):
        state_steps[i].add_(1)
        step = state_steps[i].item()
        bias_correction2_sqrt = math.sqrt(1 - beta2**step)
        step_size = lr / (1 - beta1**step)

        @_updated
        def update(param, grad, exp_avg, exp_avg_sq, *states, step_size=step_size, scale=bias_correction2_sqrt):
            if decoupled_weight_decay and weight_decay != 0:
                param.mul_(1 - lr * weight_decay)
            grad = _decayed(param, grad, l2_decay, maximize)
            exp_avg.lerp_(grad, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            if amsgrad:
                torch.maximum(states[0], exp_avg_sq, out=states[0])
            denominator = (states[0] if amsgrad else exp_avg_sq).sqrt().div_(scale).add_(eps)
            param.addcdiv_(exp_avg, denominator, value=-step_size)

        update(param, grads[i], exp_avgs[i], exp_avg_sqs[i], *([max_exp_avg_sqs[i]] if amsgrad else []))


def cross_entropy(input, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0):
    """Cross-entropy, see :func:`fastopt.functional.cross_entropy`; 16-bit logits compute in float32."""
    options = (_reduction.get_enum(reduction), ignore_index, label_smoothing)
    is_half = input.dtype in (torch.bfloat16, torch.float16)
    if not is_half or not isinstance(target, torch.Tensor) or torch.is_autocast_enabled(input.device.type):
        return torch_cross_entropy(input, target, weight, *options)
    if weight is not None and weight.dtype != input.dtype or target.is_floating_point() and target.dtype != input.dtype:
        return torch_cross_entropy(input, target, weight, *options)  # for torch to raise, or not
    target = target.float() if target.is_floating_point() and target.shape == input.shape else target
    weight = weight.float() if weight is not None else None
    return torch_cross_entropy(input.float(), target, weight, *options).to(input.dtype)


def cross_entropy_gradient(input, target, weight=None, reduction="mean", ignore_index=-100, label_smoothing=0.0):
    """Gradient of :func:`cross_entropy` by its formula, without autograd; of each row's own loss for "none"."""
    dim = 1 if input.dim() > 1 else 0
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    n_classes = input.shape[dim]
    weight = torch.ones(n_classes, dtype=dtype) if weight is None else weight.to(dtype)
    along_classes = [-1 if d == dim else 1 for d in range(input.dim())]
    spread = (weight * (label_smoothing / n_classes)).view(along_classes)
    if target.is_floating_point():
        q = weight.view(along_classes) * (1 - label_smoothing) * target.to(dtype) + spread
        is_kept, denominator = torch.ones((), dtype=torch.bool), input.numel() / n_classes
    else:
        is_kept = (target != ignore_index).unsqueeze(dim)
        index = torch.where(is_kept, target.unsqueeze(dim), 0)
        on = weight[index] * is_kept
        q = torch.zeros_like(input, dtype=dtype).scatter_(dim, index, (1 - label_smoothing) * on) + spread
        denominator = on.sum()
    grad = torch.where(is_kept, q.sum(dim, keepdim=True) * input.to(dtype).softmax(dim) - q, 0.0)
    return grad / denominator if reduction == "mean" else grad
