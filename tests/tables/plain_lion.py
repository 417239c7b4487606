"""Lion in plain torch, for the tables: torch.optim does not have it."""

import torch


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al., arXiv:2302.06675, 2023."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, foreach=None, maximize=False):
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for i in range(2):
            if not 0.0 <= betas[i] < 1.0:
                raise ValueError(f"Invalid beta parameter at index {i}: {betas[i]}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "foreach": foreach, "maximize": maximize}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params, grads, exp_avgs = [], [], []
            self._init_group(group, params, grads, exp_avgs)
            beta1, beta2 = group["betas"]
            for param, grad, exp_avg in zip(params, grads, exp_avgs, strict=True):
                if param.is_complex():
                    param, grad, exp_avg = map(torch.view_as_real, (param, grad, exp_avg))
                grad = -grad if group["maximize"] else grad
                param.mul_(1 - group["lr"] * group["weight_decay"])
                average = exp_avg.mul(beta1).add(grad, alpha=1 - beta1)
                direction = torch.where(average.isnan(), average, torch.sign(average))
                param.add_(direction, alpha=-float(group["lr"]))
                exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
        return loss

    def _init_group(self, group, params, grads, exp_avgs):
        for param in group["params"]:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError("Lion does not support sparse gradients")
            state = self.state[param]
            if not state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            params.append(param)
            grads.append(param.grad)
            exp_avgs.append(state["exp_avg"])
