"""The base of an optimizer that torch.optim does not have, in the place of torch's class."""

import torch
from torch.optim.optimizer import Optimizer


class PlainOptimizer(Optimizer):
    """Makes states and steps in plain torch, by the reference of the operator that the optimizer's class names."""

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lists = [[_as_real(tensor) for tensor in tensors] for tensors in self._init_lists(group)]
            self._reference_step(self._options(group), *lists)
        return loss

    def _init_group(self, group, params, grads, *state_lists):
        """Collect a group's tensors, as the functions of this name in torch.optim do; make states of zeros."""
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
            state = self.state[param]
            for key, tensors in zip(self._operator.state_keys, state_lists, strict=True):
                if key not in state:
                    state[key] = torch.zeros_like(param, memory_format=torch.preserve_format)
                tensors.append(state[key])
            params.append(param)
            grads.append(param.grad)


def check_options(*, lr, betas, weight_decay):
    """Raise for options out of range, with the messages of torch's optimizers.

    Raises:
        ValueError: lr or weight_decay is negative, or a beta outside [0, 1).
    """
    if isinstance(lr, torch.Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not lr >= 0:
        raise ValueError(f"Invalid learning rate: {lr}")
    for i, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}")
    if not weight_decay >= 0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}")


def _as_real(tensor):
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
