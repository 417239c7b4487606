"""What step hooks and closures do: raise, step, and change what is stepped, as with torch's class."""

import torch

from common import attempt
from optim_helpers import global_hooks, seen, step_through, with_torchs_class_and_ours


def hooks_that_raise(make):
    def fail(*_):
        raise TypeError("in the hook")

    results = []
    for register in ("register_step_pre_hook", "register_step_post_hook"):
        params, optimizer = make.stepped()
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("before"))  # noqa: B023
        handle = getattr(optimizer, register)(fail)
        found = attempt(optimizer.step)
        handle.remove()
        with global_hooks(calls):  # are those of the next step run?
            optimizer.step()
        results.append((found, calls, seen(params, optimizer)))
    return results


def hooks_that_step(make):
    """The same optimizer, which must not go on for ever, and another one."""
    log, others = [], make.params()
    other = make(others)
    params, optimizer = make.stepped()
    step_through(other, others, 1)

    def again(*_):
        log.append("again")
        if len(log) < 3:
            optimizer.step()

    def second(*_):
        log.append("second")
        other.step()

    results = []
    for hook in (again, second):
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            log.clear()
            handle = register(hook)
            with global_hooks(log):
                optimizer.step()
            handle.remove()
            results.append(list(log))
    return results, seen(params, optimizer), seen(others, other)


def hooks_registered_and_removed_inside_hooks(make):
    params, optimizer = make.stepped()
    log, handles = [], []

    def register_more(*_):
        log.append("first")
        handles.append(optimizer.register_step_post_hook(lambda *_: log.append("more")))

    def remove(*_):
        log.append("removes")
        while handles:
            handles.pop().remove()

    handles.append(optimizer.register_step_pre_hook(register_more))
    found = [attempt(optimizer.step)]
    optimizer.register_step_post_hook(remove)
    found += [attempt(optimizer.step), attempt(optimizer.step)]
    return found, log, seen(params, optimizer)


def hooks_that_change_what_is_stepped(make):
    params, optimizer = make.stepped()

    def before(*_):
        for p in params:
            p.grad.mul_(2)
        optimizer.param_groups[0]["lr"] /= 2

    def after(*_):
        for p in params:
            p.data.clamp_(-0.5, 0.5)
        optimizer.state.clear()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    step_through(optimizer, params, 3)
    return seen(params, optimizer)


def closures_that_step(make):
    """A closure may step the same optimizer; hooks of both steps run, as in torch."""
    params, optimizer = make.stepped()
    log = []
    optimizer.register_step_pre_hook(lambda *_: log.append("pre"))
    optimizer.register_step_post_hook(lambda *_: log.append("post"))

    def closure():
        log.append("closure")
        optimizer.step()
        return torch.tensor(2.0)

    result = optimizer.step(closure)
    return result, log, seen(params, optimizer)


class Number(float):
    def __float__(self):
        raise TypeError("in the number")


class Whole(int):
    __float__ = __int__ = __index__ = Number.__float__


def closures_and_steps_that_raise_a_type_error(make):
    """It is raised once, and nothing has run twice."""
    calls = []

    def fail():
        calls.append("closure")
        raise TypeError("incompatible function arguments, in the closure")

    def fail_in_step(self, closure=None):
        calls.append("step")
        make.cls.step(self, closure)
        raise TypeError("incompatible function arguments, in the step")

    def fail_in_init_group(self, *args):
        calls.append("init_group")
        raise TypeError("incompatible function arguments, in _init_group")

    results = []
    for spoil in (
        lambda o: o.step(fail),
        lambda o: type("Sub", (make.cls,), {"step": fail_in_step})(o.param_groups, **make.options).step(),
        lambda o: type("Sub", (make.cls,), {"_init_group": fail_in_init_group})(o.param_groups, **make.options).step(),
        lambda o: o.param_groups[0].update(lr=Number(0.5)) or o.step(),
        lambda o: o.param_groups[0].update(lr=Whole(1)) or o.step(),
    ):
        params, optimizer = make.stepped()
        results.append((attempt(lambda: spoil(optimizer)), list(calls), seen(params, optimizer)))  # noqa: B023
        calls.clear()
    return results


test_program_gives_the_same_with_torchs_class = with_torchs_class_and_ours(
    [
        hooks_that_raise,
        hooks_that_step,
        hooks_registered_and_removed_inside_hooks,
        hooks_that_change_what_is_stepped,
        closures_that_step,
        closures_and_steps_that_raise_a_type_error,
    ]
)
