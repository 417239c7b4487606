"""The table of optimizer cases: each row an optimizer with options, and why it is there."""

from dataclasses import dataclass

import pytest
import torch

from common import to_device
from optimizers import BY_NAME


@dataclass(frozen=True)
class OptimCase:
    name: str  # in the table of optimizers
    options: dict
    why: str

    @property
    def row(self):
        return BY_NAME[self.name]

    @property
    def ours(self):
        return self.row.ours

    @property
    def theirs(self):
        return self.row.theirs

    def __str__(self):
        return "-".join([self.name.lower(), *(f"{key}={value}" for key, value in self.options.items())])


def _case(name, why, **options):
    return OptimCase(name, options, why)


OPTIM_CASES = [
    _case("SGD", "defaults", lr=0.05),
    _case("SGD", "decay reads the parameter before it moves", lr=0.05, weight_decay=0.01),
    _case("SGD", "momentum", lr=0.02, momentum=0.9),
    _case("SGD", "dampening skips the first step", lr=0.02, momentum=0.9, dampening=0.5),
    _case("SGD", "Nesterov looks ahead", lr=0.02, momentum=0.9, nesterov=True),
    _case("SGD", "decay enters the momentum buffer", lr=0.02, momentum=0.9, weight_decay=0.01, nesterov=True),
    _case("SGD", "maximize negates before decay", lr=1e-4, weight_decay=0.01, maximize=True),
    _case("SGD", "maximize with a buffer", lr=1e-4, momentum=0.9, weight_decay=0.01, maximize=True),
    _case("RMSprop", "defaults but lr", lr=1e-3),
    _case("RMSprop", "momentum", lr=3e-4, momentum=0.9),
    _case("RMSprop", "centered", lr=1e-3, centered=True),
    _case("RMSprop", "three states", lr=3e-4, momentum=0.9, centered=True, weight_decay=0.01),
    _case("RMSprop", "large eps, small alpha", lr=1e-3, alpha=0.5, eps=1e-3, weight_decay=0.01),
    _case("RMSprop", "maximize", lr=1e-5, weight_decay=0.01, maximize=True),
    _case("Adam", "defaults"),
    _case("Adam", "L2 decay enters the moments", lr=1e-3, weight_decay=0.01),
    _case("Adam", "decay in AdamW's manner", lr=1e-3, weight_decay=0.01, decoupled_weight_decay=True),
    _case("Adam", "AMSGrad keeps the largest second moment", lr=1e-3, amsgrad=True),
    _case("Adam", "other betas, large eps", lr=1e-3, betas=(0.5, 0.9), eps=1e-3),
    _case("Adam", "beta1 0 keeps no first moment", lr=1e-3, betas=(0.0, 0.99)),
    _case("Adam", "maximize", lr=1e-5, weight_decay=0.01, maximize=True),
    _case("AdamW", "defaults: decoupled decay"),
    _case("AdamW", "AMSGrad, maximize", lr=1e-5, weight_decay=0.1, amsgrad=True, maximize=True),
    _case("Adagrad", "defaults"),
    _case("Adagrad", "lr decays, the sum begins above 0", lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1),
    _case("Adagrad", "decay, large eps, maximize", lr=1e-4, weight_decay=0.01, eps=1e-3, maximize=True),
    _case("Adadelta", "defaults"),
    _case("Adadelta", "short memory, large eps, decay", lr=0.5, rho=0.5, eps=1e-3, weight_decay=0.01),
    _case("Adadelta", "maximize", lr=0.1, weight_decay=0.01, maximize=True),
    _case("NAdam", "defaults"),
    _case("NAdam", "L2 decay enters the moments, mu grows fast", lr=1e-3, weight_decay=0.01, momentum_decay=0.1),
    _case(
        "NAdam",
        "decoupled decay, small beta1",
        lr=1e-3,
        betas=(0.5, 0.9),
        weight_decay=0.01,
        decoupled_weight_decay=True,
    ),
    _case("NAdam", "maximize", lr=1e-5, weight_decay=0.01, maximize=True),
    _case("Lion", "defaults"),
    _case("Lion", "decay, other betas", lr=1e-3, betas=(0.5, 0.9), weight_decay=0.1),
    _case("Lion", "maximize", lr=1e-4, weight_decay=0.01, maximize=True),
]


def one_of_each_class_is_quick(cases):
    """Parameters of a test that takes seconds a case: all but the first case of each class are slow."""
    cases = list(cases)
    first = {case.name: case for case in reversed(cases)}
    return [pytest.param(c, id=str(c), marks=[] if first[c.name] is c else pytest.mark.slow) for c in cases]


def make_params(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=generator, device="cpu", dtype=torch.float64) for s in shapes]
    return [torch.nn.Parameter(to_device(v).to(dtype)) for v in values]


def set_grads(params, seed):
    """Gradients of several magnitudes, the same for any dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float64) * 10.0 ** (-(i % 4))
        p.grad = grad.to(p.device, p.dtype)


def take_steps(params, optimizer, first, last):
    for step in range(first, last):
        set_grads(params, seed=step)
        optimizer.step()
