"""Errors that the user's own hooks, subclasses and modes raise within cross-entropy: once, and the loss not again."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import devices
import fastopt
from common import is_native, kernel_calls
from loss_helpers import both, cross_entropy

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

X, T = torch.linspace(-1, 1, 15).view(3, 5), torch.arange(3)


class Failing(torch.Tensor):
    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "cross_entropy" in getattr(function, "__name__", ""):
            Failing.calls += 1
            raise TypeError("a user's own")
        return super().__torch_function__(function, types, args, kwargs)


class FailingMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        Failing.calls += 1
        raise TypeError("a user's own")


class FailingDispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Failing.calls += 1
        raise TypeError("a user's own")


class Number:
    """An object with an ``__index__`` that fails."""

    def __index__(self):
        Failing.calls += 1
        raise TypeError("a user's own")

    __int__ = __float__ = __index__


def fail(*args):
    Failing.calls += 1
    raise TypeError("a user's own")


def within(context):
    def run(function):
        with context:
            function(X.clone().requires_grad_() * 1, T)

    return run


FAILURES = {
    "a subclass of logits": lambda function: function(X.as_subclass(Failing), T),
    "a subclass of the target": lambda function: function(X, T.as_subclass(Failing)),
    "a subclass of weights": lambda function: function(X, T, torch.ones(5).as_subclass(Failing)),
    "a function mode": within(FailingMode()),
    "a dispatch mode": within(FailingDispatch()),
    "a hook that packs": within(saved_tensors_hooks(fail, lambda t: t)),
    "a number": lambda function: function(X, T, ignore_index=Number()),
}


@pytest.mark.parametrize("row", FAILURES)
def test_type_error_of_user_code_is_raised_once(row):
    def outcome(function):
        Failing.calls, before = 0, kernel_calls("cross_entropy")
        with pytest.raises(TypeError) as error:
            FAILURES[row](function)
        return Failing.calls, str(error.value).replace("_cross_entropy()", "cross_entropy()"), error.type, before

    ours, before = outcome(cross_entropy)[:3], outcome(cross_entropy)[3]
    theirs = outcome(F.cross_entropy)[:3]
    if row in ("a hook that packs", "a dispatch mode"):  # how much is saved, and how many operators run, may differ
        assert ours[1:] == theirs[1:]
        assert ours[0] == 1
    else:
        assert ours == theirs
    if is_native():
        assert kernel_calls("cross_entropy") <= before + 1


def test_a_type_error_in_a_backwards_hook_is_raised_once():
    def outcome(function):
        Failing.calls = 0
        leaf = X.clone().requires_grad_()
        y = leaf * 1
        y.register_hook(fail)
        loss = function(y, T)
        with pytest.raises(TypeError, match="a user's own"):
            loss.backward()
        with pytest.raises(TypeError, match="a user's own"), saved_tensors_hooks(lambda t: t, fail):
            function(leaf * 1, T).backward()
        return Failing.calls

    theirs, ours = both(outcome)
    assert ours == theirs == 2


def test_a_module_with_a_hook_that_fails_computes_its_loss_once():
    for module in (fastopt.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()):
        Failing.calls = 0
        module.register_forward_hook(fail)
        with pytest.raises(TypeError, match="a user's own"):
            module(X, T)
        assert Failing.calls == 1
