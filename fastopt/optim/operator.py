"""Optimizers as operators: the schema is the description, and one function in plain torch the reference.

A schema's arguments are ``params``, ``grads``, a list of tensors for each key of a parameter's state (``exp_avgs`` for
``exp_avg``, ``state_steps`` for ``step``), and the options. Of a pair in the param group, ``betas``, the options are
``beta1`` and ``beta2``. ``is_first_step`` is no option of a group, but says that the step makes the states.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch._C import parse_schema

from .. import _ops

SCALAR_KEYS = {"step", "mu_product"}  # of one number; under the others are tensors like the parameter


@dataclass(frozen=True)
class Option:
    """An option of an operator, and the place that a param group has it in."""

    name: str  # in the schema: "beta1"
    group_key: str  # "betas"
    place: int | None  # in the pair under that key; None: it is the value itself
    is_flag: bool

    def value_in(self, group):
        value = group[self.group_key]
        if self.place is None:
            return value
        first, second = value
        return (first, second)[self.place]

    @property
    def is_decay_rate(self):
        """It must lie in [0, 1): otherwise a bias correction may be 0 or have no root."""
        return self.group_key == "betas"


class OptimizerOperator:
    """An operator of ``torch.ops.fastopt`` that updates lists of tensors in place.

    ``update(param, grad, *kept, options)`` updates one parameter and what its state keeps, in the order of the schema's
    lists; None where a list is empty. 16-bit tensors come in float32, and are rounded once at the end.
    """

    def __init__(self, schema, update):
        self.name = schema.split("(")[0]
        self.update = update
        arguments = parse_schema(f"fastopt::{schema}").arguments
        self.n_lists = sum(not argument.kwarg_only for argument in arguments)
        lists = [argument.name for argument in arguments[2 : self.n_lists]]
        self.state_keys = tuple(name.removesuffix("s").removeprefix("state_") for name in lists)
        self.keeps_scalar = tuple(key in SCALAR_KEYS for key in self.state_keys)
        self.defaults = {a.name: a.default_value for a in arguments if a.kwarg_only}
        self.options = tuple(_option(a) for a in arguments if a.kwarg_only and a.name != "is_first_step")
        _ops.OPERATORS.append(_ops.Operator(schema, self._checked_reference, lambda *args, **kwargs: None))

    @torch.no_grad()
    def reference(self, params, grads, *lists, **options):
        """The operator in plain torch."""
        options = SimpleNamespace(**{**self.defaults, **options})
        for i, param in enumerate(params):
            tensors = [param, *(tensors[i] if len(tensors) else None for tensors in lists)]
            wide = [_widened(tensor) for tensor in tensors]
            self.update(wide[0], _widened(grads[i]), *wide[1:], options)
            for tensor, value in zip(tensors, wide, strict=True):
                if value is not tensor:
                    tensor.copy_(value)

    def _checked_reference(self, params, *lists, **options):
        """Refuses what the kernels refuse."""
        if torch.is_grad_enabled() and any(param.requires_grad for param in params):
            raise RuntimeError(
                f"fastopt::{self.name}: a param that requires grad is updated in place; call it under torch.no_grad()"
            )
        self.reference(params, *lists, **options)


def operator(schema):
    """Make the decorated function an :class:`OptimizerOperator`."""
    return lambda update: OptimizerOperator(schema, update)


def decayed(param, grad, weight_decay, maximize):
    """The gradient, negated if ``maximize``, with an L2 penalty."""
    grad = -grad if maximize else grad
    return grad.add(param, alpha=weight_decay) if weight_decay != 0 else grad


def _widened(tensor):
    is_narrow = tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if is_narrow else tensor


def _option(argument):
    name, stem, place = argument.name, argument.name[:-1], argument.name[-1]
    if place in "12":
        return Option(name, stem + "s", int(place) - 1, False)
    return Option(name, name, None, str(argument.type) == "bool")
