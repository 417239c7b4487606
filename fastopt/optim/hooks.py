"""Step hooks and profiler ranges as torch's optimizers have them, at no cost where there are none."""

import contextlib
import functools
import threading

import torch
from torch.compiler import is_compiling
from torch.optim import optimizer as torch_optimizer
from torch.optim.optimizer import Optimizer


class _Underway(threading.local):
    """Optimizers, by id, whose steps this thread runs inside their hooks."""

    def __init__(self):
        self.ids = set()


_underway = _Underway()


@contextlib.contextmanager
def _set_underway(optimizer, is_underway):
    """Mark a step of the optimizer as a part of another one of it, whose hooks have run, or not."""
    ids = _underway.ids
    before = ids.copy()
    (ids.add if is_underway else ids.discard)(id(optimizer))
    try:
        yield
    finally:
        _underway.ids = before


def run_closure(optimizer, closure):
    """The loss of a closure, in which another step of the optimizer is one of its own."""
    if not _underway.ids:
        return closure()
    with _set_underway(optimizer, False):
        return closure()


def with_hooks_if_any(step):
    """A ``step`` that runs torch's hooks and profiler range if there are any, once for each outermost call.

    torch wraps the step of every class that is instantiated, at a cost of microseconds a call, and runs the hooks as
    often as a step passes through a wrapped class.
    """

    @functools.wraps(step)
    def step_underway(self, *args, **kwargs):
        if is_compiling():  # a compiler follows no thread-local variables
            return step(self, *args, **kwargs)
        with _set_underway(self, True):
            return step(self, *args, **kwargs)

    step_with_hooks = Optimizer.profile_hook_step(step_underway)

    @functools.wraps(step)
    def call(self, *args, **kwargs):
        needs_hooks = (
            is_compiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or torch_optimizer._global_optimizer_pre_hooks
            or torch_optimizer._global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        )
        if needs_hooks:
            return _step_with_hooks(self, step, step_with_hooks, call, args, kwargs)
        return step(self, *args, **kwargs) if args or kwargs else step(self)  # unpacking nothing costs 100 ns

    call.hooked = True  # for torch, which would wrap it once more
    return call


def _step_with_hooks(optimizer, step, step_with_hooks, call, args, kwargs):
    if is_compiling():
        return (step_with_hooks if type(optimizer).step is call else step)(optimizer, *args, **kwargs)
    is_a_part = id(optimizer) in _underway.ids
    return (step if is_a_part else step_with_hooks)(optimizer, *args, **kwargs)


def wrap_step_of(cls):
    """Give a class's own step, if it has one, hooks that know of those in the steps that it calls."""
    if getattr(cls.step, "__code__", None) is not _CALL_CODE:
        cls.step = with_hooks_if_any(cls.step)


_CALL_CODE = with_hooks_if_any(Optimizer.step).__code__
