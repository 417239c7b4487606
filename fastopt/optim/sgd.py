"""SGD, plain and with momentum."""

import torch

from .operator import decayed, operator
from .optimizer import FusedOptimizer


@operator(
    "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, *, float lr, float momentum=0, "
    "float dampening=0, float weight_decay=0, bool nesterov=False, bool maximize=False, "
    "bool is_first_step=False) -> ()"
)
def sgd_(param, grad, buffer, o):
    """``is_first_step``: the momentum buffers are set to the gradients, undamped."""
    grad = decayed(param, grad, o.weight_decay, o.maximize)
    if o.momentum != 0:
        if o.is_first_step:
            buffer.copy_(grad)
        else:
            buffer.mul_(o.momentum).add_(grad, alpha=1 - o.dampening)
        grad = grad.add(buffer, alpha=o.momentum) if o.nesterov else buffer
    param.add_(grad, alpha=-o.lr)


class SGD(FusedOptimizer, torch.optim.SGD, operator=sgd_):
    r"""Stochastic gradient descent, optionally with momentum: :class:`torch.optim.SGD` in one native call a step.

        grad   = (-grad if maximize else grad) + weight_decay * param
        buffer = momentum * buffer + (1 - dampening) * grad        (first step: buffer = grad)
        param -= lr * (buffer, or grad + momentum * buffer if nesterov, or grad if momentum is 0)

    float64, float32, bfloat16 and float16; 16-bit types compute in float32.

    Args:
        params: tensors, named tensors or dicts that define groups.
        lr: learning rate, number or tensor of one element. Default: 1e-3
        momentum: momentum factor. Default: 0
        dampening: of the gradient in the momentum buffer. Default: 0
        weight_decay: L2 penalty. Default: 0
        nesterov: Nesterov momentum; needs a momentum and no dampening. Default: False
        maximize: ascend instead of descend. Default: False
        foreach, fused: accepted with torch's meaning; the step is fused in any case.
        differentiable: take torch's own differentiable step. Default: False

    State of a parameter: ``momentum_buffer``, if momentum is not 0.

    Raises:
        ValueError: as :class:`torch.optim.SGD`, for arguments out of range.

    Source: Sutskever, Martens, Dahl & Hinton, On the importance of initialization and momentum in deep learning, 2013.
    """

    def _may_be(self, tensor, grad, options):
        # No buffer before the first step; sparse gradients, unless something dense is added to them.
        is_plain = options["weight_decay"] == 0 and not options["nesterov"]
        return tensor is None or (is_plain and grad.is_sparse and tensor.is_sparse)

    def _reference_step(self, options, params, grads, momentum_buffers):
        for i, param in enumerate(params):
            buffers, is_first = [], False
            if options["momentum"] != 0:
                is_first = momentum_buffers[i] is None
                buffers = [torch.zeros_like(param) if is_first else momentum_buffers[i]]
            sgd_.reference([param], [grads[i]], buffers, **options, is_first_step=is_first)
            if is_first:
                self.state[param]["momentum_buffer"] = buffers[0]
