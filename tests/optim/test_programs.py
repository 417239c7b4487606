"""Hooks, closures and groups in programs: each gives with fastopt's class what it gives with torch's."""

import copy
import itertools

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from common import attempt, outcome
from optim_helpers import seen, step_through, with_torchs_class_and_ours

# Of a group, with values that are allowed for some class and not the default.
CHANGES = [
    ("lr", 0.2),
    ("lr", torch.tensor(0.2)),
    ("weight_decay", 0.3),
    ("maximize", True),
    ("momentum", 0.5),
    ("nesterov", True),
    ("dampening", 0.5),
    ("alpha", 0.5),
    ("centered", True),
    ("betas", (0.5, 0.6)),
    ("betas", [0.5, 0.6]),
    ("amsgrad", True),
    ("eps", 1e-3),
    ("decoupled_weight_decay", True),
    ("foreach", True),
    ("fused", True),
    ("foreach", None),
]


# --- Hooks and closures -----------------------------------------------------------------------------------------------


def hooks_around_a_step(make):
    params, optimizer = make.stepped()
    log = []
    handles = [
        optimizer.register_step_post_hook(lambda o, args, kwargs: log.append(("post", o is optimizer, len(args)))),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: log.append(("pre", o is optimizer, args[1:], kwargs))),
        register_optimizer_step_pre_hook(lambda o, args, kwargs: log.append(("global pre", len(args)))),
        register_optimizer_step_post_hook(lambda o, args, kwargs: log.append(("global post", len(args)))),
    ]
    optimizer.step()
    optimizer.step(None)
    optimizer.step(closure=None)
    for handle in handles:
        handle.remove()
    optimizer.step()
    return log, seen(params, optimizer)


def hooks_that_return_something(make):
    results = []
    for returned in (((None, lambda: torch.tensor(3.0)), {}), 5, ((None,), {"closure": lambda: 7}), "no"):
        params, optimizer = make.stepped()
        replaced = returned
        if isinstance(returned, tuple):
            replaced = ((optimizer, *returned[0][1:]), returned[1])
        optimizer.register_step_pre_hook(lambda *_, replaced=replaced: replaced)
        found = outcome(optimizer.step)  # torch's message begins with the address of a function
        results.append(type(found) if isinstance(found, Exception) else found)
        results.append(seen(params, optimizer))
    return results


def hooks_of_state_dicts(make):
    params, optimizer = make.stepped()
    log = []

    def with_note(o, state_dict):
        return {**state_dict, "note": "seen"}

    def without_note(o, state_dict):
        log.append(state_dict.pop("note"))
        return state_dict

    optimizer.register_state_dict_pre_hook(lambda o: log.append("first"))
    optimizer.register_state_dict_pre_hook(lambda o: log.append("prepended"), prepend=True)
    optimizer.register_state_dict_post_hook(with_note)
    saved = optimizer.state_dict()
    log.append(list(saved))
    other = make(params)
    other.register_load_state_dict_post_hook(lambda o: log.append("loaded"))
    other.register_load_state_dict_pre_hook(without_note)
    other.register_load_state_dict_pre_hook(lambda o, s: log.append("before"), prepend=True)
    other.load_state_dict(saved)
    step_through(other, params, 2)
    return log, seen(params, other)


def closures(make):
    params, optimizer = make.stepped()

    def loss():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        value = sum((p * p).sum() for p in params)
        value.backward()
        return value

    results = [optimizer.step(loss), optimizer.step(closure=loss), optimizer.step(lambda: None), optimizer.step(None)]
    with torch.no_grad():
        results.append(optimizer.step(loss))
    results.append(attempt(lambda: optimizer.step(lambda: 1 / 0)))
    results.append(attempt(lambda: optimizer.step(1)))
    return [r.detach() if isinstance(r, torch.Tensor) else r for r in results], seen(params, optimizer)


def closures_that_change_what_is_stepped(make):
    params, optimizer = make.stepped()
    more = make.params()

    def add_a_group():
        optimizer.add_param_group({"params": more, "lr": 0.5})
        for p in (*params, *more):
            p.grad = torch.ones_like(p)
        params[1].grad = None

    optimizer.step(add_a_group)
    return seen(params + more, optimizer)


# --- Groups and options -----------------------------------------------------------------------------------------------


def defaults_changed_later(make):
    params, optimizer = make.stepped()
    more = make.params()
    optimizer.defaults["lr"] = 0.5
    optimizer.defaults["weight_decay"] = 0.25
    optimizer.add_param_group({"params": more[0]})
    optimizer.add_param_group({"params": [more[1]], "maximize": True})
    step_through(optimizer, params + more, 3)
    return seen(params + more, optimizer)


def options_changed_between_steps(make):
    results = []
    for (name, value), only_first in itertools.product(CHANGES, (False, True)):
        params = make.params()
        optimizer = make([{"params": params[:1]}, {"params": params[1:]}])
        step_through(optimizer, params, 2)
        if name in optimizer.param_groups[0]:
            for group in optimizer.param_groups[: 1 if only_first else None]:
                group[name] = value
            found = attempt(lambda: step_through(optimizer, params, 3, first=2))  # noqa: B023
            results.append((name, found, None if found else seen(params, optimizer)))
    return results


def groups_that_torch_refuses(make):
    p, q = make.params()
    refused = [
        lambda: make(p),
        lambda: make([]),
        lambda: make([1.0]),
        lambda: make([p * 2]),
        lambda: make([{"params": {p, q}}]),
        lambda: make([{"params": p}, {"params": [q, p]}]),
        lambda: make([("p", p), q]),
        lambda: make([("p", p), ("p", q)]),
        lambda: make([{"params": [("p", p)]}, {"params": [q]}]),
        lambda: make([{"lr": 0.1}]),
        lambda: make([p]).add_param_group({"params": p}),
        lambda: make([p]).add_param_group([q]),
        lambda: make([p]).add_param_group({"params": [("q", q)]}),
        lambda: make(x for x in (p, 5)),
        lambda: make([p], learning_rate=0.1),
    ]
    return [attempt(lambda: repr(call())) for call in refused]  # noqa: B023


def named_parameters(make):
    params, optimizer = make.stepped(named=True)
    others, other = make.stepped()
    named, unnamed = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(other.state_dict())
    other.load_state_dict(named)
    optimizer.load_state_dict(unnamed)
    step_through(optimizer, params, 2)
    step_through(other, others, 2)
    return named["param_groups"], seen(params, optimizer), seen(others, other)


def gradients_that_are_missing_or_zero(make):
    params, optimizer = make.stepped(1)
    optimizer.zero_grad()
    optimizer.step()
    results = [seen(params, optimizer), [p.grad for p in params]]
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    fresh = make.params()
    untouched = make(fresh)
    untouched.step()
    return results, [p.grad for p in params], seen(params, optimizer), seen(fresh, untouched)


test_program_gives_the_same_with_torchs_class = with_torchs_class_and_ours(
    [
        hooks_around_a_step,
        hooks_that_return_something,
        hooks_of_state_dicts,
        closures,
        closures_that_change_what_is_stepped,
        defaults_changed_later,
        options_changed_between_steps,
        groups_that_torch_refuses,
        named_parameters,
        gradients_that_are_missing_or_zero,
    ]
)
