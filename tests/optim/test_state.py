"""Checkpoints, copies, and everything that can change between two steps: nothing a step knew before may go stale."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch

import devices
import fastopt
from common import error, kernel_calls
from optim_cases import OPTIM_CASES, make_params, set_grads, take_steps

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

SHAPES = [(7,), (5, 4), (3,), (64, 33)]
all_cases = pytest.mark.parametrize("case", OPTIM_CASES, ids=str)


def assert_equal_params(params, others, tolerance=0.0):
    for p, q in zip(params, others, strict=True):
        assert error(p, q) <= tolerance


def saved(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@all_cases
def test_state_dict_moves_to_torch_and_back_midway(case):
    """torch all the way; fastopt, torch, fastopt by turns through saved checkpoints."""
    truth = make_params(SHAPES, torch.float64)
    take_steps(truth, case.theirs(truth, **case.options), 0, 12)
    params = make_params(SHAPES, torch.float64)
    checkpoint = None
    for turn, cls in enumerate((case.ours, case.theirs, case.ours, case.theirs)):
        optimizer = cls(params, **case.options)
        if checkpoint is not None:
            optimizer.load_state_dict(checkpoint)
        take_steps(params, optimizer, 3 * turn, 3 * turn + 3)
        checkpoint = saved(optimizer.state_dict())
    # Loading makes NAdam's mu_product, of float32, a float64, as the parameters are.
    assert_equal_params(params, truth, 1e-10 if case.name == "NAdam" else 1e-12)


def through_state_dict(cls, other, params, optimizer, case):
    return params, loaded(cls, params, case, optimizer.state_dict())


def through_file(cls, other, params, optimizer, case):
    return params, loaded(cls, params, case, saved(optimizer.state_dict()))


def through_the_other_library(cls, other, params, optimizer, case):
    between = loaded(other, params, case, saved(optimizer.state_dict()))
    return params, loaded(cls, params, case, saved(between.state_dict()))


def through_deepcopy(cls, other, params, optimizer, case):
    return copy.deepcopy((params, optimizer))


def through_pickle(cls, other, params, optimizer, case):
    return pickle.loads(pickle.dumps((params, optimizer)))


def loaded(cls, params, case, checkpoint):
    optimizer = cls(params, **case.options)
    optimizer.load_state_dict(checkpoint)
    return optimizer


DETOURS = [through_state_dict, through_file, through_the_other_library, through_deepcopy, through_pickle]


@all_cases
@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_continued_run_equals_an_uninterrupted_one_bit_for_bit(case, at):
    """Of fastopt and of torch, each through the other too; steps from no state, to a first state, to a later one."""
    for cls, other in ((case.ours, case.theirs), (case.theirs, case.ours)):
        whole = make_params(SHAPES)
        take_steps(whole, cls(whole, **case.options), 0, at + 2)
        for detour in DETOURS:
            params = make_params(SHAPES)
            optimizer = cls(params, **case.options)
            take_steps(params, optimizer, 0, at)
            params, optimizer = detour(cls, other, params, optimizer, case)
            assert type(optimizer) is cls
            take_steps(params, optimizer, at, at + 2)
            assert_equal_params(params, whole)


def replace_states(params, optimizer):
    for p in params:
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = value.clone()


def replace_state_dicts(params, optimizer):
    for p in reversed(params):
        if p in optimizer.state:
            optimizer.state[p] = {key: value.clone() for key, value in reversed(optimizer.state[p].items())}


def scale_states_in_place(params, optimizer):
    for p in params:
        for value in optimizer.state[p].values():
            value.mul_(2.0)


def replace_states_by_other_values(params, optimizer):
    for p in params:
        optimizer.state[p].update({k: v + 1 for k, v in optimizer.state[p].items() if k != "grad_avg"})


def reset_state(params, optimizer):
    optimizer.state.clear()


def forget_one_state(params, optimizer):
    optimizer.state.pop(params[1], None)


def replace_data(params, optimizer):
    for p in params:
        p.data = p.data.clone() + 0.5


def relayout_data(params, optimizer):
    params[1].data = params[1].data.t().contiguous().t()


def freeze_one(params, optimizer):
    params[0].requires_grad_(False)


def add_group(params, optimizer):
    params.append(torch.nn.Parameter(torch.full((6,), 0.25, dtype=params[0].dtype)))
    optimizer.add_param_group({"params": [params[-1]], "lr": 1e-3})


def reload(params, optimizer):
    optimizer.load_state_dict(saved(optimizer.state_dict()))


def change_lr(params, optimizer):
    optimizer.param_groups[0]["lr"] = 0.5e-3


def reverse_params(params, optimizer):
    optimizer.param_groups[0]["params"].reverse()


def replace_groups(params, optimizer):
    optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]


CHANGES = [
    replace_states,
    replace_state_dicts,
    scale_states_in_place,
    replace_states_by_other_values,
    reset_state,
    forget_one_state,
    replace_data,
    relayout_data,
    freeze_one,
    add_group,
    reload,
    change_lr,
    reverse_params,
    replace_groups,
]


@all_cases
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changes_between_steps_take_effect(case, change):
    results = []
    for cls in (case.ours, case.theirs):
        params = make_params(SHAPES, torch.float64)
        optimizer = cls(params, **case.options)
        take_steps(params, optimizer, 0, 3)
        change(params, optimizer)
        take_steps(params, optimizer, 3, 5)
        change(params, optimizer)
        take_steps(params, optimizer, 5, 7)
        results.append(params)
    assert_equal_params(*results, 1e-11)


@all_cases
def test_change_of_the_models_dtype_takes_effect(case):
    """Parameters in float64, state still in float32: torch's result, or torch's error."""
    results = []
    for cls in (case.ours, case.theirs):
        module = torch.nn.Linear(3, 2)
        with torch.no_grad():
            module.weight.copy_(torch.arange(6.0).reshape(2, 3)), module.bias.fill_(0.5)
        optimizer = cls(module.parameters(), **case.options)
        take_steps(list(module.parameters()), optimizer, 0, 2)
        module.double()
        try:
            take_steps(list(module.parameters()), optimizer, 2, 4)
            results.append([p.detach().clone() for p in module.parameters()])
        except RuntimeError as failure:
            results.append(str(failure))
    ours, theirs = results
    assert type(ours) is type(theirs)
    if not isinstance(ours, str):
        assert_equal_params(ours, theirs, 1e-6)


@pytest.mark.native
@all_cases
def test_kernels_run_again_after_every_change(case):
    params = make_params(SHAPES)
    optimizer = case.ours(params, **case.options)
    take_steps(params, optimizer, 0, 1)
    for change in CHANGES:
        change(params, optimizer)
        set_grads(params, seed=1)
        before = kernel_calls("update")
        optimizer.step()
        if change is not relayout_data:  # state of another layout than its parameter is for the reference
            assert kernel_calls("update") == before + 1, change.__name__
        else:
            params[1].data = params[1].data.contiguous()


@all_cases
def test_an_error_leaves_parameters_and_state_untouched(case):
    """The second group cannot be stepped; the first must not have been."""
    params = make_params([(5,), (4,)])
    optimizer = case.ours([{"params": params[:1]}, {"params": params[1:]}], **case.options)
    take_steps(params, optimizer, 0, 2)
    optimizer.param_groups[1]["lr"] = "fast"
    before = copy.deepcopy((params, optimizer.state_dict()["state"]))
    set_grads(params, seed=3)
    with pytest.raises(TypeError):
        optimizer.step()
    after = (params, optimizer.state_dict()["state"])
    for p, q in zip(before[0], after[0], strict=True):
        assert torch.equal(p, q)
    for index, state in before[1].items():
        for key, value in state.items():
            assert torch.equal(value, after[1][index][key])


@all_cases
def test_the_optimizer_keeps_no_tensor_alive(case):
    params = make_params(SHAPES)
    optimizer = case.ours(params, **case.options)
    take_steps(params, optimizer, 0, 2)
    states = [weakref.ref(v) for state in optimizer.state.values() for v in state.values()]
    optimizer.state.clear()
    assert all(ref() is None for ref in states)


def test_a_cycle_through_the_optimizer_is_collected():
    def step_and_forget():
        params = make_params(SHAPES)
        optimizer = fastopt.Adam(params)
        take_steps(params, optimizer, 0, 2)
        optimizer.itself = optimizer
        return weakref.ref(optimizer), weakref.ref(params[0])

    references = step_and_forget()
    gc.collect()
    assert all(reference() is None for reference in references)


@all_cases
def test_optimizers_in_several_threads_are_independent(case):
    def train():
        params = make_params([(20_000,), (300, 300)])
        optimizer = case.ours(params, **case.options)
        take_steps(params, optimizer, 0, 3)
        return params

    expected = train()
    results = [None] * 4

    def work(index):
        results[index] = train()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for params in results:
        assert_equal_params(params, expected)
