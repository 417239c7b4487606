"""Overridden parts of parameters, gradients and states, and modes: each acts as it does with torch's class."""

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from common import kernel_calls
from optim_helpers import seen, step_through, with_torchs_class_and_ours
from optimizers import CONFIGURATIONS

# --- Parameters -------------------------------------------------------------------------------------------------------


def logging_class(log):
    class Logging(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            log.append(getattr(function, "__name__", str(function)))
            return super().__torch_function__(function, types, args, kwargs or {})

    return Logging


def with_class(make, cls):
    """Two steps of parameters of a class."""
    params = [cls(p.detach().clone()) for p in make.params()]
    optimizer = make(params)
    for step in range(3):
        for p in params:
            p.grad = torch.linspace(-1, 1 + step, p.numel(), dtype=p.dtype).reshape(p.shape)
        optimizer.step()
    return [torch.Tensor(p.detach().as_subclass(torch.Tensor)).clone() for p in params], len(optimizer.state)


def parameters_with_torch_function(make):
    log = []
    return with_class(make, logging_class(log)), "step" in log, "add_" in log or "addcdiv_" in log


def parameters_that_scale_what_is_added(make):
    class Halved(torch.nn.Parameter):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            for name in ("alpha", "value"):
                if name in kwargs and function in (torch.Tensor.add_, torch.Tensor.addcdiv_):
                    kwargs[name] = kwargs[name] / 2
            return super().__torch_function__(function, types, args, kwargs)

    return with_class(make, Halved)


def parameters_with_a_grad_property(make):
    class Clipped(torch.nn.Parameter):
        @property
        def grad(self):
            grad = torch.Tensor.grad.__get__(self)
            return None if grad is None else grad.clamp(-0.1, 0.1)

        @grad.setter
        def grad(self, value):
            torch.Tensor.grad.__set__(self, value)

    return with_class(make, Clipped)


def parameters_with_a_property_added_later(make):
    class Plain(torch.nn.Parameter):
        pass

    params = [Plain(p.detach().clone()) for p in make.params()]
    optimizer = make(params)
    step_through(optimizer, params, 2)
    own = torch.Tensor.grad
    Plain.grad = property(lambda self: None, lambda self, value: own.__set__(self, value))
    step_through(optimizer, params, 1)
    del Plain.grad
    step_through(optimizer, params, 1)
    return [p.detach().as_subclass(torch.Tensor).clone() for p in params]


def parameters_with_operators_of_their_own(make):
    class Doubled(torch.nn.Parameter):
        __torch_function__ = torch._C._disabled_torch_function_impl

        def add_(self, other, **options):
            return torch.Tensor.add_(self, other, **options).mul_(2)

        def addcdiv_(self, *args, **options):
            return torch.Tensor.addcdiv_(self, *args, **options).mul_(2)

    return with_class(make, Doubled)


def parameters_with_torch_dispatch(make):
    log = []

    class Dispatched(torch.Tensor):
        @staticmethod
        def __new__(cls, data):
            return torch.Tensor._make_subclass(cls, data, True)

        __torch_function__ = torch._C._disabled_torch_function_impl

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            log.append(str(function))
            with torch._C._DisableTorchDispatch():
                return function(*args, **(kwargs or {}))

    found = with_class(make, Dispatched)
    return found, any("add" in name for name in log)


def gradients_of_a_class(make):
    log = []
    cls = logging_class(log)
    params = make.params()
    optimizer = make(params)
    for _ in range(3):
        for p in params:
            p.grad = cls(torch.linspace(-1, 1, p.numel(), dtype=p.dtype).reshape(p.shape)).requires_grad_(False)
        optimizer.step()
    return [p.detach().as_subclass(torch.Tensor).clone() for p in params], len(log) > 0


def states_of_a_class(make):
    log = []
    cls = logging_class(log)
    params, optimizer = make.stepped()
    for state in optimizer.state.values():
        for name, value in state.items():
            state[name] = cls(value).requires_grad_(False)
    before = len(log)
    step_through(optimizer, params, 2)
    return [p.detach().as_subclass(torch.Tensor).clone() for p in params], len(log) > before


# --- Modes ------------------------------------------------------------------------------------------------------------


def function_modes_around_a_step(make):
    class Logging(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            log.append(getattr(function, "__name__", str(function)))
            return function(*args, **(kwargs or {}))

    class NoDecay(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if "alpha" in kwargs:
                kwargs["alpha"] = 0
            return function(*args, **kwargs)

    class LoggingDispatch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            log.append(str(function))
            return function(*args, **(kwargs or {}))

    results = []
    for mode in (Logging, NoDecay, LoggingDispatch, BaseTorchFunctionMode):
        log = []
        params, optimizer = make.stepped()
        with mode():
            step_through(optimizer, params, 2)
        results.append((any("add" in name for name in log), seen(params, optimizer)))
    params, optimizer = make.stepped()
    with torch.device("cpu"):
        step_through(optimizer, params, 2)
    return results, seen(params, optimizer)


test_program_gives_the_same_with_torchs_class = with_torchs_class_and_ours(
    [
        parameters_with_torch_function,
        parameters_that_scale_what_is_added,
        parameters_with_a_grad_property,
        parameters_with_a_property_added_later,
        parameters_with_operators_of_their_own,
        parameters_with_torch_dispatch,
        gradients_of_a_class,
        states_of_a_class,
        function_modes_around_a_step,
    ]
)


# --- What overrides nothing stays with the kernels --------------------------------------------------------------------


class OfThePackage(torch.nn.Parameter):
    """As packages define them: attributes and a constructor of its own, nothing of a tensor's."""

    def __new__(cls, data, name=""):
        param = super().__new__(cls, data)
        param.name_in_model = name
        return param

    def __repr__(self):
        return f"OfThePackage({self.name_in_model})"


@pytest.mark.native
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_subclasses_that_override_nothing_of_a_step_take_the_kernels(name, options):
    class Optimizer(getattr(fastopt, name)):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            self.n_steps = 0

        def step(self, closure=None):
            self.n_steps += 1
            return super().step(closure)

    params = [OfThePackage(torch.ones(3, 2), "a"), torch.nn.Parameter(torch.ones(4))]
    optimizer = Optimizer(params, **options)
    step_through(optimizer, params, 1)
    before = kernel_calls("update")
    step_through(optimizer, params, 2)
    assert kernel_calls("update") == before + 2
    assert optimizer.n_steps == 3
    assert optimizer._plan.why_not() == ""
