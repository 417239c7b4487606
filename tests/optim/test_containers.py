"""Groups, lists of parameters and states in containers of other kinds: each acts as it does with torch's class."""

import collections
from collections import UserDict, UserList, defaultdict

import pytest
import torch
from torch.utils.weak import WeakTensorKeyDictionary

import fastopt
from common import attempt, kernel_calls
from optim_helpers import named, seen, step_through, with_torchs_class_and_ours
from optimizers import CONFIGURATIONS


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


class Name(str):
    pass


def names_that_are_a_subclass_of_str(make):
    params, optimizer = make.stepped()
    for items in (*optimizer.state.values(), *optimizer.param_groups):
        renamed = {Name(name): value for name, value in items.items()}
        items.clear()
        items.update(renamed)
    step_through(optimizer, params, 2)
    return seen(params, optimizer)


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


test_program_gives_the_same_with_torchs_class = with_torchs_class_and_ours(
    [
        names_that_are_a_subclass_of_str,
        *(named(f"groups_{name}", with_groups(change)) for name, change in GROUPS.items()),
        *(named(f"states_{name}", with_states(convert)) for name, convert in STATES.items()),
    ]
)


@pytest.mark.native
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("kind", ["dict", "ordered_dict", "own_ordered_dicts"])
def test_dict_subclasses_of_the_standard_library_take_the_kernels(kind, name, options):
    params = [torch.nn.Parameter(torch.ones(4))]
    optimizer = getattr(fastopt, name)(params, **options)
    step_through(optimizer, params, 1)
    optimizer.state = STATES[kind](optimizer.state)
    before = kernel_calls("update")
    step_through(optimizer, params, 2)
    assert kernel_calls("update") == before + 2
