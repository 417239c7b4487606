"""The table of optimizers, from which all other tables take their classes.

A new optimizer is one row here and its rows of interesting options in ``optim_cases.py``. One that torch.optim does not
have names a subclass of ``torch.optim.Optimizer`` in plain torch, of the same name, arguments, errors and states.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import fastopt
import plain_lion


@dataclass(frozen=True)
class Optimizer:
    name: str  # of the class, in fastopt and in torch.optim
    operator: str  # in torch.ops.fastopt; classes of one operator continue each other's checkpoints
    typical: tuple  # of options, at a usual learning rate; the last make all states, but where another class does so
    drawn: dict  # values that options may take together at random
    rules: tuple = ()  # rules in csrc/rules that no class above has, with {} for the type that computes
    is_allowed: Callable = lambda options: True  # of drawn options
    has_divisions: bool = True  # rules without are compiled for narrow vectors too
    takes_sparse: bool = False  # sparse gradients
    has_states_at_once: bool = False  # the constructor makes them
    reference: type | None = None  # in torch.optim's place

    @property
    def ours(self):
        return getattr(fastopt, self.name)

    @property
    def theirs(self):
        return self.reference or getattr(torch.optim, self.name)

    @property
    def is_in_torch(self):
        return self.reference is None

    def has(self, option):
        """True if torch's class has this keyword argument."""
        return option in inspect.signature(self.theirs).parameters

    def states(self, options):
        """Names of the states that torch's class makes with these options."""
        param = torch.nn.Parameter(torch.ones(1, device="cpu"))
        param.grad = torch.ones_like(param)
        optimizer = self.theirs([param], **options)
        optimizer.step()
        return [name for name, value in optimizer.state[param].items() if value is not None]


def _is_sgd(options):
    return not options["nesterov"] or (options["momentum"] > 0 and options["dampening"] == 0)


_ADAM = {"betas": ((0.9, 0.999), (0.0, 0.5), (0.5, 0.0)), "eps": (1e-3,), "amsgrad": (False, True)}

OPTIMIZERS = [
    Optimizer(
        "SGD",
        "sgd_",
        typical=(dict(lr=0.05), dict(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1)),
        drawn={"momentum": (0.0, 0.5, 0.99), "nesterov": (False, True), "dampening": (0, 0.5)},
        is_allowed=_is_sgd,
        rules=("Sgd<{}>", "SgdMomentum<{}, false>", "SgdMomentum<{}, true>"),
        has_divisions=False,
        takes_sparse=True,
    ),
    Optimizer(
        "RMSprop",
        "rmsprop_",
        typical=(dict(lr=0.01), dict(lr=0.01, momentum=0.9, centered=True)),
        drawn={"alpha": (0.5, 0.9, 0.99), "momentum": (0, 0.9), "eps": (1e-3,), "centered": (False, True)},
        rules=tuple(f"RmsProp<{{}}, {a}, {b}>" for a in ("false", "true") for b in ("false", "true")),
    ),
    Optimizer(
        "Adam",
        "adam_",
        typical=(dict(lr=0.01, amsgrad=True),),
        drawn=_ADAM,
        rules=("Adam<{}, false>", "Adam<{}, true>"),
    ),
    Optimizer("AdamW", "adam_", typical=(dict(lr=0.01),), drawn=_ADAM),
    Optimizer(
        "Adagrad",
        "adagrad_",
        typical=(dict(lr=0.05), dict(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1)),
        drawn={"lr_decay": (0.0, 0.1), "initial_accumulator_value": (0.0, 0.5), "eps": (1e-10, 1e-3)},
        rules=("Adagrad<{}>",),
        takes_sparse=True,
        has_states_at_once=True,
    ),
    Optimizer(
        "Adadelta",
        "adadelta_",
        typical=(dict(lr=0.5), dict(lr=0.5, rho=0.5, weight_decay=0.1)),
        drawn={"rho": (0.5, 0.9, 0.99), "eps": (1e-6, 1e-3)},
        rules=("Adadelta<{}>",),
    ),
    Optimizer(
        "NAdam",
        "nadam_",
        typical=(dict(lr=0.01), dict(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
        drawn={"betas": _ADAM["betas"], "eps": (1e-3,), "momentum_decay": (0.0, 0.004, 0.1)},
        rules=("NAdam<{}>",),
    ),
    Optimizer(
        "Lion",
        "lion_",
        typical=(dict(lr=1e-3), dict(lr=1e-3, weight_decay=0.1)),
        drawn={"betas": ((0.9, 0.99), (0.5, 0.5), (0.0, 0.9))},
        rules=("Lion<{}>",),
        has_divisions=False,
        reference=plain_lion.Lion,
    ),
]
BY_NAME = {row.name: row for row in OPTIMIZERS}
NAMES = list(BY_NAME)
OURS = SimpleNamespace(**{row.name: row.ours for row in OPTIMIZERS})
THEIRS = SimpleNamespace(**{row.name: row.theirs for row in OPTIMIZERS})

# Name and options of each class, for generic tests.
CONFIGURATIONS = [(row.name, options) for row in OPTIMIZERS for options in row.typical]
# For error messages and modes, which are torch's; and for long runs: Lion steps by a sign, which rounding decides where
# an average nearly cancels.
IN_TORCH = [(name, options) for name, options in CONFIGURATIONS if BY_NAME[name].is_in_torch]
# Options of each class beside the learning rate that make its states.
WITH_STATES = {row.name: {k: v for k, v in row.typical[-1].items() if k != "lr"} for row in OPTIMIZERS}
