"""Steps of many parameters, whose tensors several threads gather: as those that one thread gathers, to the last bit."""

import copy

import pytest
import torch

import fastopt
from common import DTYPES, kernel_calls, outcome, threads
from optim_cases import OPTIM_CASES
from optimizers import BY_NAME, CONFIGURATIONS

pytestmark = pytest.mark.native

N_PARAMS = 150
N_STEPS = 20
SHAPES = [(3,), (2, 5), (64,), (), (0, 4), (7, 1, 2)]


def made(cls, options, dtype=torch.float32, n_params=N_PARAMS, n_groups=2):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(SHAPES[i % len(SHAPES)], generator=generator).to(dtype)) for i in range(n_params)
    ]
    groups = [{"params": params[g::n_groups]} for g in range(n_groups)]
    return cls(groups, **options), params


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def left(optimizer, params):
    """All that a step may write: the bits of values and states, their versions, and the order of states."""
    places = {param: i for i, param in enumerate(params)}

    def plain(value):
        if not isinstance(value, torch.Tensor):
            return value
        dense = value.detach().to_dense().resolve_conj()
        numbers = torch.view_as_real(dense) if dense.is_complex() else dense
        return value.dtype, list(value.shape), numbers.contiguous().reshape(-1).view(torch.uint8).tolist()

    states = [(places[param], [(k, plain(v)) for k, v in state.items()]) for param, state in optimizer.state.items()]
    return [plain(param) for param in params], [param._version for param in params], states


def results(program, *arguments):
    """Of a program on one thread and on two, and how many of its steps several threads gathered."""
    found, n_updates, n_threaded = [], [], []
    for count in (1, 2):
        before = kernel_calls("update"), kernel_calls("threaded_gather")
        with threads(count):
            found.append(program(*arguments))
        n_updates.append(kernel_calls("update") - before[0])
        n_threaded.append(kernel_calls("threaded_gather") - before[1])
    assert n_updates[0] == n_updates[1]
    assert n_threaded[0] == 0
    return *found, n_threaded[1]


# --- Ordinary parameters ----------------------------------------------------------------------------------------------


def stepped(cls, options, **how):
    optimizer, params = made(cls, options, **how)
    for step in range(5):
        give_gradients(params, step)
        optimizer.step()
    return left(optimizer, params)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OPTIM_CASES, ids=str)
def test_two_threads_gather_what_one_gathers(case, dtype):
    alone, together, n_threaded = results(lambda: stepped(case.ours, case.options, dtype=dtype))
    assert together == alone
    # The first step makes the states, and the one after it is for one thread, too.
    makes_states = not case.row.has_states_at_once and (case.row.operator != "sgd_" or case.options.get("momentum"))
    assert n_threaded == (3 if makes_states else 4)


@pytest.mark.parametrize(("n_params", "is_threaded"), [(127, False), (128, True)])
def test_few_parameters_are_gathered_by_one_thread(n_params, is_threaded):
    alone, together, n_threaded = results(lambda: stepped(fastopt.Adam, {}, n_params=n_params))
    assert together == alone
    assert (n_threaded > 0) == is_threaded


# --- Others -----------------------------------------------------------------------------------------------------------


class Harmless(torch.nn.Parameter):
    pass


class Overriding(torch.nn.Parameter):
    @property
    def grad(self):
        return torch.full_like(self.data, 3)

    @grad.setter
    def grad(self, value):
        pass


def replace_param(optimizer, params, i, param):
    for group in optimizer.param_groups:
        group["params"] = [param if other is params[i] else other for other in group["params"]]
    optimizer.state.pop(params[i], None)
    params[i] = param


# Changes before given steps; True if several threads gather after it, False if one does, None if either may.
CHANGES = {}


def change(is_threaded, at=(3,)):
    def register(function):
        CHANGES[function.__name__] = (function, is_threaded, at)
        return function

    return register


@change(True)
def a_gradient_less(optimizer, params):
    params[74].grad = None


@change(True, at=range(N_STEPS))
def frozen_parameters(optimizer, params):
    for param in params[100:110]:
        param.grad = None


@change(None, at=range(0, N_STEPS, 2))
def a_gradient_now_and_then(optimizer, params):
    params[74].grad = None


@change(True)
def no_gradients(optimizer, params):
    for param in params:
        param.grad = None


@change(True)
def keys_that_are_not_interned(optimizer, params):
    for state in optimizer.state.values():
        for key in list(state):
            state["".join(list(key))] = state.pop(key)


@change(None)
def a_count_of_two_parameters(optimizer, params):
    if "step" in optimizer.state[params[0]]:
        optimizer.state[params[0]]["step"] = optimizer.state[params[-1]]["step"]


@change(True)
def a_loaded_state(optimizer, params):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@change(True)
def a_state_of_its_own_storage(optimizer, params):
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():
                state[key] = torch.from_numpy(value.numpy().copy())


@change(True)
def a_lazy_clone(optimizer, params):
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                state[key] = torch._lazy_clone(value)


@change(True)
def a_state_less(optimizer, params):
    optimizer.state.pop(params[-1], None)


@change(True)
def another_order_of_states(optimizer, params):
    for param in params[:5]:
        if param in optimizer.state:
            optimizer.state[param] = optimizer.state.pop(param)


@change(False)
def a_subclass_that_overrides_nothing(optimizer, params):
    replace_param(optimizer, params, 80, Harmless(params[80].data))


@change(False)
def a_subclass_that_overrides_the_gradient(optimizer, params):
    replace_param(optimizer, params, 80, Overriding(params[80].data))


@change(False)
def a_complex_parameter(optimizer, params):
    replace_param(optimizer, params, 80, torch.nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    params[80].grad = torch.full((3,), 1 + 2j)


@change(True)
def a_sparse_gradient(optimizer, params):
    params[2].grad = params[2].grad.to_sparse()


@change(True)
def a_gradient_laid_out_otherwise(optimizer, params):
    params[1].grad = params[1].grad.t().contiguous().t()


@change(False, at=range(3, N_STEPS))
def a_gradient_whose_memory_is_freed(optimizer, params):
    params[86].grad.untyped_storage().resize_(0)


@change(False, at=range(3, N_STEPS))
def a_parameter_whose_memory_is_freed(optimizer, params):
    params[86].data = torch.ones(64)
    params[86].untyped_storage().resize_(0)


@change(None)
def two_parameters_in_one_memory(optimizer, params):
    params[86].data = params[92].data


@change(False)
def a_list_that_is_a_tuple(optimizer, params):
    optimizer.param_groups[1]["params"] = tuple(optimizer.param_groups[1]["params"])


@change(True)
def one_count_for_all(optimizer, params):
    steps = [state["step"] for state in optimizer.state.values() if "step" in state]
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = steps[0]


@change(True)
def counts_in_float64(optimizer, params):
    for i, state in enumerate(optimizer.state.values()):
        if "step" in state and i % 3 == 0:
            state["step"] = state["step"].double()


@change(None, at=range(3, N_STEPS))
def a_negative_count(optimizer, params):
    for state in list(optimizer.state.values())[40:]:
        if "step" in state:
            state["step"] = torch.tensor(-5.0)


@change(True)
def a_rate_of_its_own(optimizer, params):
    optimizer.param_groups[1]["lr"] = 0.125


@change(False, at=(0,))
def other_states_in_one_group(optimizer, params):
    group = optimizer.param_groups[1]
    for option, value in (("amsgrad", True), ("centered", True), ("momentum", 0.5)):
        if option in group:
            group[option] = type(value)(0) if group[option] else value


@change(None, at=(5,))
def a_rate_beyond_float32(optimizer, params):
    optimizer.param_groups[1]["lr"] = 1e300


@change(True)
def a_parameter_more(optimizer, params):
    params.append(torch.nn.Parameter(torch.ones(5)))
    params[-1].grad = torch.ones(5)
    optimizer.add_param_group({"params": [params[-1]]})


@change(True)
def a_copy(optimizer, params):
    optimizer.__setstate__(copy.copy(optimizer.__getstate__()))


def run_with(change, at, name, options):
    optimizer, params = made(getattr(fastopt, name), options)
    seen = []
    for step in range(N_STEPS):
        give_gradients(params, step)
        if step in at:
            seen.append(str(outcome(lambda: change(optimizer, params))))
        seen.append(str(outcome(optimizer.step)))
    seen.append(outcome(lambda: left(optimizer, [p for p in params if p.untyped_storage().nbytes()])))
    return [str(each) if isinstance(each, Exception) else each for each in seen]


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_steps_give_what_torch_gives(change, name, options):
    function, is_threaded, at = CHANGES[change]
    alone, together, n_threaded = results(run_with, function, at, name, options)
    assert together == alone
    if change == "other_states_in_one_group" and not any(map(BY_NAME[name].has, ("amsgrad", "centered", "momentum"))):
        is_threaded = True  # no option makes others
    if is_threaded is not None:  # two before the change: the first step makes states
        assert (n_threaded > 2) == is_threaded, n_threaded
