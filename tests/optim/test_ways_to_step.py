"""However a step is wrapped, replaced or called, hooks and profiler ranges occur as with torch's class."""

import functools

import torch

from optim_helpers import global_hooks, named, seen, step_through, with_torchs_class_and_ours


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


test_program_gives_the_same_with_torchs_class = with_torchs_class_and_ours(
    [
        *(named(f"subclass_{name}", with_subclass(derive)) for name, derive in SUBCLASSES.items()),
        a_step_assigned_to_the_class_later,
        a_step_assigned_to_the_instance,
        a_step_called_through_the_class,
        a_step_wrapped_by_a_scheduler,
    ]
)
