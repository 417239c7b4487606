"""Overridden parts of optimizers: each acts as it does with torch's class."""

import ast
import gc
import inspect
import weakref
from pathlib import Path

import pytest
import torch

import fastopt
from common import attempt
from fastopt.optim import optimizer as optimizer_module
from optim_helpers import seen, step_through, with_torchs_class_and_ours
from optimizers import CONFIGURATIONS


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


def groups_looked_up_in_another_way(make):
    class Halved(make.cls):
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name != "param_groups" or not is_on:
                return value
            return [{**group, "lr": group["lr"] / 2} for group in value]

    class Elsewhere(make.cls):
        def __getattr__(self, name):
            if name in kept:
                return kept[name]
            raise AttributeError(name)

    results, is_on, kept = [], [], {}
    for cls in (Halved, Elsewhere):
        params = make.params()
        optimizer = cls(params, **make.options)
        is_on.append(True)
        if cls is Elsewhere:
            kept.update({name: vars(optimizer).pop(name) for name in ("param_groups", "state")})
        results.append(attempt(lambda: step_through(optimizer, params, 3)))  # noqa: B023
        results.append([p.detach().clone() for p in params])
    return results


def attributes_that_cannot_be_set(make):
    class Frozen(make.cls):
        is_frozen = False

        def __setattr__(self, name, value):
            if self.is_frozen:
                raise TypeError(f"{name} is frozen")
            super().__setattr__(name, value)

    params = make.params()
    optimizer = Frozen(params, **make.options)
    Frozen.is_frozen = True
    return attempt(lambda: step_through(optimizer, params, 3)), seen(params, optimizer)


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


test_program_gives_the_same_with_torchs_class = with_torchs_class_and_ours(
    [
        init_group_that_changes_the_lists,
        init_group_of_the_instance,
        init_group_replaced_later,
        groups_and_states_that_are_properties,
        groups_looked_up_in_another_way,
        attributes_that_cannot_be_set,
        a_class_swapped_between_steps,
    ]
)


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


def test_class_is_freed_with_its_last_object():
    class Temporary(fastopt.Adam):
        pass

    params = [torch.nn.Parameter(torch.ones(2))]
    optimizer = Temporary(params)
    step_through(optimizer, params, 2)
    reference = weakref.ref(Temporary)
    del optimizer, Temporary
    gc.collect()
    assert reference() is None
