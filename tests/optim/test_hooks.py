"""Step hooks and profiler ranges, however a step is wrapped, replaced or called: as with torch's class."""

import contextlib
import functools

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from optim_helpers import attempt, named, seen, step_through, with_torchs_class_and_ours


@contextlib.contextmanager
def global_hooks(log):
    handles = [
        register_optimizer_step_pre_hook(lambda *_: log.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: log.append("global post")),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def watched_step(make, optimizer, params, call=None):
    """The calls of one step: own hooks, global ones, and the profiler's ranges; each once.

    torch runs the hooks as often as a step passes through a class of which an object was made, fastopt once.
    """
    log = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: log.append("pre")),
        optimizer.register_step_post_hook(lambda *_: log.append("post")),
    ]
    call = call or optimizer.step
    with global_hooks(log):
        call()
    for handle in handles:
        handle.remove()
    with torch.profiler.profile() as profile:
        call()
    ranges = {event.key for event in profile.key_averages() if event.key.startswith("Optimizer.step#")}
    assert not is_ours(make) or log in ([], ONCE, ONCE + ONCE), log  # of one step, or of the two that it takes
    return list(dict.fromkeys(log)), sorted(ranges), seen(params, optimizer)


def is_ours(make):
    return make.cls.__module__.startswith("fastopt")


ONCE = ["global pre", "pre", "post", "global post"]


# --- Ways to come by a step -------------------------------------------------------------------------------------------


def class_of(make, step=None):
    """A subclass, with a step of its own if one is given; the name is the same for torch's class and ours."""

    class Sub(make.cls):
        pass

    if step is not None:
        Sub.step = step
    return Sub


def calling_super(make):
    cls = class_of(make)

    def step(self, closure=None):
        return super(cls, self).step(closure)

    cls.step = step
    return cls


def under_no_grad(make):
    cls = calling_super(make)
    cls.step = torch.no_grad()(cls.step)
    return cls


def wrapped_by_functools(make):
    @functools.wraps(make.cls.step)
    def step(self, *args, **kwargs):
        return make.cls.step(self, *args, **kwargs)

    return class_of(make, step)


SUBCLASSES = {
    "without_a_step": class_of,
    "with_a_step": calling_super,
    "with_a_step_that_calls_torchs": lambda make: class_of(make, lambda self: make.cls.step(self)),
    "with_a_step_wrapped_by_functools": wrapped_by_functools,
    "with_a_step_under_no_grad": under_no_grad,
    "with_a_step_under_no_grad_of_the_base": lambda make: class_of(make, torch.no_grad()(make.cls.step)),
    "with_the_step_of_the_base": lambda make: class_of(make, make.cls.step),
    "with_a_partial_method": lambda make: class_of(make, functools.partialmethod(make.cls.step, None)),
    "with_a_step_that_takes_two": lambda make: class_of(make, lambda self: [make.cls.step(self), make.cls.step(self)]),
}


def with_subclass(derive):
    """Made as usual, swapped in later, made by __new__, and derived once more."""

    def program(make):
        results = []
        for kind in ("made", "swapped", "by __new__", "derived"):
            params, optimizer = make.stepped()
            cls = derive(make)
            if kind == "derived":

                class Sub(cls):
                    def step(self, *args):
                        return super().step(*args)

                cls = Sub
            if kind == "swapped":
                optimizer.__class__ = cls
            elif kind == "by __new__":
                state = optimizer.__getstate__()
                optimizer = object.__new__(cls)
                optimizer.__setstate__(state)
            else:
                optimizer = cls(params, **make.options)
            results.append(watched_step(make, optimizer, params))
        return results

    return program


def a_step_assigned_to_the_class_later(make):
    Sub = class_of(make)
    params = make.params()
    optimizer = Sub(params, **make.options)
    step_through(optimizer, params, 2)
    Sub.step = lambda self: make.cls.step(self)
    assigned = watched_step(make, optimizer, params)
    other = Sub(params, **make.options)
    again = watched_step(make, other, params)
    del Sub.step
    return assigned, again, watched_step(make, optimizer, params)


def a_step_assigned_to_the_instance(make):
    results = []
    for wrap in (lambda step: lambda: step(), torch.no_grad(), lambda step: functools.partial(step, None)):
        params, optimizer = make.stepped()
        optimizer.step = wrap(optimizer.step)
        results.append(watched_step(make, optimizer, params))
    return results


def a_step_called_through_the_class(make):
    params, optimizer = make.stepped()
    return watched_step(make, optimizer, params, lambda: make.cls.step(optimizer))


def a_step_wrapped_by_a_scheduler(make):
    params, optimizer = make.stepped()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    results = [watched_step(make, optimizer, params)]
    schedule.step()
    return [*results, optimizer.param_groups[0]["lr"], watched_step(make, optimizer, params)]


# --- What hooks do ----------------------------------------------------------------------------------------------------


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
        *(named(f"subclass_{name}", with_subclass(derive)) for name, derive in SUBCLASSES.items()),
        a_step_assigned_to_the_class_later,
        a_step_assigned_to_the_instance,
        a_step_called_through_the_class,
        a_step_wrapped_by_a_scheduler,
        hooks_that_raise,
        hooks_that_step,
        hooks_registered_and_removed_inside_hooks,
        hooks_that_change_what_is_stepped,
        closures_that_step,
        closures_and_steps_that_raise_a_type_error,
    ]
)
