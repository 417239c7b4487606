"""What Python overrides in optimizers, parameters, groups and states: each acts as it does with torch's class."""

import ast
import collections
import gc
import inspect
import weakref
from collections import UserDict, UserList, defaultdict
from pathlib import Path

import pytest
import torch
from torch.overrides import BaseTorchFunctionMode, TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

import fastopt
from common import kernel_calls
from fastopt.optim import optimizer as optimizer_module
from optim_helpers import CONFIGURATIONS, attempt, named, seen, step_through, with_torchs_class_and_ours

# --- The class of the optimizer ---------------------------------------------------------------------------------------


def init_group_that_changes_the_lists(make):
    """As optimizers do that are derived from torch's: gradients clipped, a parameter left out, states of their own."""
    calls = []

    def clip(params, grads):
        grads[:] = [g.clamp(-0.1, 0.1) for g in grads]

    def leave_out(params, grads):
        if len(params) == 2:
            params.pop(), grads.pop()

    def only_count(params, grads):
        pass

    results = []
    for change in (clip, leave_out, only_count):

        class Changed(make.cls):
            def _init_group(self, group, params, grads, *states, change=change):
                calls.append(len(group["params"]))
                found = super()._init_group(group, params, grads, *states)
                change(params, grads)
                for p in params:
                    self.state[p]["seen"] = self.state[p].get("seen", 0) + 1
                return found

        params = make.params()
        optimizer = Changed(params, **make.options)
        results.append((attempt(lambda: step_through(optimizer, params, 3)), seen(params, optimizer)))  # noqa: B023
    return calls, results


def init_group_of_the_instance(make):
    params, optimizer = make.stepped()
    calls, own = [], optimizer._init_group

    def init_group(*args):
        calls.append(len(args))
        return own(*args)

    optimizer._init_group = init_group
    step_through(optimizer, params, 2)
    del optimizer._init_group
    step_through(optimizer, params, 2)
    return calls, seen(params, optimizer)


def init_group_replaced_later(make):
    """In the class, and taken back."""

    class Later(make.cls):
        pass

    params = make.params()
    optimizer = Later(params, **make.options)
    step_through(optimizer, params, 2)
    calls = []

    def init_group(self, *args):
        calls.append(len(args))
        return super(Later, self)._init_group(*args)

    Later._init_group = init_group
    step_through(optimizer, params, 2)
    del Later._init_group
    step_through(optimizer, params, 2)
    return calls, seen(params, optimizer)


def groups_and_states_that_are_properties(make):
    class Watched(make.cls):
        @property
        def state(self):
            return self.__dict__["own_state"]

        @state.setter
        def state(self, value):
            self.__dict__["own_state"] = value

        @property
        def param_groups(self):
            log.append("groups")
            return self.__dict__["own_groups"]

        @param_groups.setter
        def param_groups(self, value):
            self.__dict__["own_groups"] = value

    log = []
    params = make.params()
    optimizer = Watched(params, **make.options)
    step_through(optimizer, params, 3)
    return bool(log), seen(params, optimizer)


def a_class_swapped_between_steps(make):
    class Other(make.cls):
        def _init_group(self, *args):
            log.append("other")
            return super()._init_group(*args)

    log = []
    params, optimizer = make.stepped()
    optimizer.__class__ = Other
    step_through(optimizer, params, 2)
    optimizer.__class__ = make.cls
    step_through(optimizer, params, 2)
    return log, seen(params, optimizer)


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


# --- Groups and states ------------------------------------------------------------------------------------------------


class Halving(dict):
    """A group whose lr is read as half."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        return value / 2 if name == "lr" else value


class Missing(dict):
    def __missing__(self, name):
        return {"weight_decay": 0.125}[name]


def with_groups(change):
    def program(make):
        params, optimizer = make.stepped()
        change(optimizer)
        found = attempt(lambda: step_through(optimizer, params, 2))
        return found, [p.detach().clone() for p in params]

    return program


def missing_groups(optimizer):
    optimizer.param_groups[:] = [Missing(group) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        del group["weight_decay"]


class Reversed(list):
    def __iter__(self):
        return super().__reversed__()


def reversed_groups(optimizer):
    (group,) = optimizer.param_groups
    more = {**group, "params": group["params"][1:], "lr": 0.25}
    group["params"] = group["params"][:1]
    optimizer.param_groups = Reversed([group, more])


GROUPS = {
    "dict_with_getitem": lambda o: o.param_groups.__setitem__(0, Halving(o.param_groups[0])),
    "dict_with_missing": missing_groups,
    "user_dict": lambda o: o.param_groups.__setitem__(0, UserDict(o.param_groups[0])),
    "chain_map": lambda o: o.param_groups.__setitem__(0, collections.ChainMap({"lr": 0.5}, o.param_groups[0])),
    "ordered_dict": lambda o: o.param_groups.__setitem__(0, collections.OrderedDict(o.param_groups[0])),
    "list_with_iter": reversed_groups,
    "user_list": lambda o: setattr(o, "param_groups", UserList(o.param_groups)),
    "tuple": lambda o: setattr(o, "param_groups", tuple(o.param_groups)),
    "params_user_list": lambda o: o.param_groups[0].update(params=UserList(o.param_groups[0]["params"])),
    "params_reversed": lambda o: o.param_groups[0].update(params=Reversed(o.param_groups[0]["params"])),
    "params_tuple": lambda o: o.param_groups[0].update(params=tuple(o.param_groups[0]["params"])),
}


class Loading(dict):
    """A parameter's state that is kept elsewhere, and fetched when it is read."""

    def __init__(self, items):
        super().__init__(dict.fromkeys(items))
        self.kept = dict(items)

    def __getitem__(self, name):
        return self.kept[name]

    def __setitem__(self, name, value):
        super().__setitem__(name, None)
        self.kept[name] = value

    def get(self, name, default=None):
        return self.kept.get(name, default)


class LoadingStates(dict):
    """States by parameter, made when they are looked up."""

    def __init__(self, items):
        super().__init__()
        self.kept = dict(items)

    def __missing__(self, param):
        return self.setdefault(param, self.kept.setdefault(param, {}))


def weak(states):
    found = WeakTensorKeyDictionary()
    for param, state in states.items():
        found[param] = state
    return found


class OwnDefault(defaultdict):
    def __missing__(self, param):
        return self.setdefault(param, collections.OrderedDict())


def each_own(cls):
    return lambda states: defaultdict(dict, {param: cls(state) for param, state in states.items()})


STATES = {
    "user_dict": UserDict,
    "weak_tensor_keys": weak,
    "ordered_dict": collections.OrderedDict,
    "dict": dict,
    "chain_map": lambda states: collections.ChainMap({}, states),
    "defaultdict_with_missing": lambda states: OwnDefault(dict, states),
    "loaded_when_missing": LoadingStates,
    "own_user_dicts": each_own(UserDict),
    "own_dicts_loaded_when_read": each_own(Loading),
    "own_chain_maps": each_own(lambda state: collections.ChainMap({}, state)),
    "own_ordered_dicts": each_own(collections.OrderedDict),
}


def with_states(convert):
    def program(make):
        results = []
        for n_steps in (0, 2):
            params, optimizer = make.stepped(n_steps)
            optimizer.state = convert(optimizer.state)
            found = attempt(lambda: step_through(optimizer, params, 2))  # noqa: B023
            results += [found and found[0], [p.detach().clone() for p in params]]  # a KeyError's text has addresses
            results.append([{k: v for k, v in optimizer.state.get(p, {}).items() if v is not None} for p in params])
        return results

    return program


test_a_program_gives_what_it_gives_with_torchs_class = with_torchs_class_and_ours(
    [
        init_group_that_changes_the_lists,
        init_group_of_the_instance,
        init_group_replaced_later,
        groups_and_states_that_are_properties,
        a_class_swapped_between_steps,
        parameters_with_torch_function,
        parameters_that_scale_what_is_added,
        parameters_with_a_grad_property,
        parameters_with_a_property_added_later,
        parameters_with_operators_of_their_own,
        parameters_with_torch_dispatch,
        gradients_of_a_class,
        states_of_a_class,
        function_modes_around_a_step,
        *(named(f"groups_{name}", with_groups(change)) for name, change in GROUPS.items()),
        *(named(f"states_{name}", with_states(convert)) for name, convert in STATES.items()),
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
def test_subclasses_that_override_nothing_of_a_step_are_for_the_kernels(name, options):
    class Optimizer(getattr(fastopt, name)):
        def __init__(self, params, **options):
            super().__init__(params, **options)
            self.n_steps = 0

        def step(self, closure=None):
            self.n_steps += 1
            return super().step(closure)

    for convert in (lambda o: o.state, STATES["ordered_dict"], STATES["own_ordered_dicts"]):
        params = [OfThePackage(torch.ones(3, 2), "a"), torch.nn.Parameter(torch.ones(4))]
        optimizer = Optimizer(params, **options)
        step_through(optimizer, params, 1)
        optimizer.state = convert(optimizer.state) if convert in STATES.values() else optimizer.state
        before = kernel_calls("update")
        step_through(optimizer, params, 2)
        assert kernel_calls("update") == before + 2
        assert optimizer.n_steps == 3
        assert optimizer._plan.why_not() == ""


@pytest.mark.native
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
def test_the_reason_of_a_refusal_is_that_of_the_last_step(name, options):
    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = getattr(fastopt, name)(params, **options)
    for differentiable, reason in ((False, ""), (True, "differentiable is set"), (False, "")):
        step_through(optimizer, params, 1)
        optimizer.param_groups[0]["differentiable"] = differentiable
        with torch.no_grad():
            step_through(optimizer, params, 1)
        assert optimizer._plan.why_not() == reason


def test_type_checkers_see_the_methods_of_torchs_class():
    """A decorator, or a method that is assigned, hides the signature from them."""
    (cls,) = [
        node for node in ast.parse(Path(optimizer_module.__file__).read_text()).body if isinstance(node, ast.ClassDef)
    ]
    methods = {node.name: node for node in cls.body if isinstance(node, ast.FunctionDef)}
    for name in ("step", "zero_grad"):
        assert methods[name].decorator_list == []
        assert [a.arg for a in methods[name].args.args] == list(
            inspect.signature(getattr(torch.optim.SGD, name)).parameters
        )
    assert inspect.signature(fastopt.SGD.zero_grad) == inspect.signature(torch.optim.SGD.zero_grad)


def test_a_class_is_forgotten_with_its_last_object():
    class Temporary(fastopt.Adam):
        pass

    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = Temporary(params)
    step_through(optimizer, params, 2)
    reference = weakref.ref(Temporary)
    del optimizer, Temporary
    gc.collect()
    assert reference() is None
