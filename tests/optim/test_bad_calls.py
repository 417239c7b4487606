"""Bad and odd calls end as in torch: its result, or its exception to the letter; what fails changes nothing."""

import copy
import itertools
import re

import pytest
import torch

from bad_calls import CALLS, CLASSES, make
from bad_options import CLEARER, NEGATIVE_VARIANCE, OPTIONS, TAKEN, group
from bad_steps import TENSORS
from common import error
from optimizers import BY_NAME, OPTIMIZERS, OURS, THEIRS

STEPS = {**TENSORS, **OPTIONS}
FUSED_REFUSES = {f"parameter {what}" for what in ("int64", "bool", "complex64", "complex32", "on meta")} | {
    "parameter complex128, conjugated"
}


def contents(params, optimizer):
    """Everything a step may write, copied."""
    return [p.detach().clone() for p in params], [
        {k: copy.deepcopy(v) for k, v in state.items()} if isinstance(state, dict) else copy.deepcopy(state)
        for state in optimizer.state.values()
    ]


def same(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout or a.device != b.device:
            return False
        if a.is_meta:
            return True
        a, b = (x.to_dense() if x.layout != torch.strided else x for x in (a, b))
        a, b = (torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for x in (a, b))
        return error(a, b) <= 1e-5 * max(1.0, b.double().abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0.0)
    if isinstance(a, (dict, list, tuple)) and type(a) is type(b):
        pairs = a.items() if isinstance(a, dict) else enumerate(a)
        return len(a) == len(b) and all((k in b if isinstance(b, dict) else True) and same(v, b[k]) for k, v in pairs)
    return repr(a) == repr(b)


def outcome(cls, name, n_steps, spoil, call, **options):
    """The result of a call and all that it leaves, or its exception and whether it has changed something."""
    params, optimizer = make(cls, n_steps, {**CLASSES[name], **options})
    spoil(params, optimizer)
    before = contents(params, optimizer)
    try:
        result = call(params, optimizer)
    except Exception as failure:
        # A step is named after the class that has it: SGD in torch.
        return (
            type(failure),
            re.sub(r"\w+\.step\(\)", "step()", str(failure)),
            same(before, contents(params, optimizer)),
        )
    return result, contents(params, optimizer)


def is_failure(result):
    return isinstance(result[0], type)


def each_way():
    return itertools.product(CLASSES, (0, 2))


def take_step(params, optimizer):
    optimizer.step()


def leave(params, optimizer):
    pass


def assert_as_in_torch(name, ours, theirs):
    if not BY_NAME[name].is_in_torch:  # there is no result or message of torch's, but still:
        assert not is_failure(ours) or ours[2], f"{name}: {ours[1]}: but something was changed"
        return
    if not is_failure(ours) and not is_failure(theirs):
        assert same(ours, theirs), f"{ours}\ntorch: {theirs}"
        return
    assert ours[:2] == theirs[:2], f"{ours}\ntorch: {theirs}"
    assert ours[2], f"{name}: {ours[1]}: but something was changed"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in STEPS if row not in {*CLEARER, *TAKEN, *NEGATIVE_VARIANCE}])
def test_step_with_odd_input_ends_as_in_torch_or_changes_nothing(row):
    for name, n_steps in each_way():
        ours, theirs = (outcome(getattr(m, name), name, n_steps, STEPS[row], take_step) for m in (OURS, THEIRS))
        assert_as_in_torch(name, ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in TENSORS if row not in FUSED_REFUSES | NEGATIVE_VARIANCE])
def test_odd_tensor_with_fused_ends_as_in_torch_without_fused(row):
    """torch's fused kernels check neither shapes nor layouts; ours do, also where torch's implementation runs."""
    for name, n_steps in itertools.product([row.name for row in OPTIMIZERS if row.has("fused")], (0, 2)):
        if (name, row) == ("Adagrad", "gradient sparse"):
            continue  # torch's fused Adagrad refuses it, as test_torch_database.py compares
        ours = outcome(getattr(OURS, name), name, n_steps, TENSORS[row], take_step, fused=True)
        assert_as_in_torch(name, ours, outcome(getattr(THEIRS, name), name, n_steps, TENSORS[row], take_step))


@pytest.mark.parametrize("row", CLEARER)
def test_error_for_a_non_number_holds_its_name_and_value(row):
    kind, message = CLEARER[row]
    for name, n_steps in each_way():
        ours = outcome(getattr(OURS, name), name, n_steps, STEPS[row], take_step)
        if row.split()[0] in getattr(THEIRS, name)([torch.ones(1)]).defaults:
            assert ours[0] is kind
            assert re.fullmatch(message, ours[1])
            assert ours[2], f"{ours[1]}: but something was changed"
        else:  # an option of other classes
            assert_as_in_torch(name, ours, outcome(getattr(THEIRS, name), name, n_steps, STEPS[row], take_step))


@pytest.mark.parametrize("row", TAKEN)
def test_extra_accepted_values_equal_plain_numbers(row):
    for name, n_steps in each_way():
        ours = outcome(getattr(OURS, name), name, n_steps, STEPS[row], take_step)
        plain = outcome(getattr(OURS, name), name, n_steps, group(**TAKEN[row]), take_step)
        assert_as_in_torch(name, ours, plain)


@pytest.mark.parametrize("row", sorted(NEGATIVE_VARIANCE))
def test_negative_centered_variance_is_no_worse_than_in_torch(row):
    for name, n_steps in each_way():
        ours, theirs = (outcome(getattr(m, name), name, n_steps, STEPS[row], take_step) for m in (OURS, THEIRS))
        if name == "RMSprop":
            assert not is_failure(ours)
            for own, other in zip(ours[1][0], theirs[1][0], strict=True):
                assert same(torch.where(other.isnan(), other, own), other)
        else:
            assert_as_in_torch(name, ours, theirs)


@pytest.mark.parametrize("row", CALLS)
def test_odd_call_ends_as_in_torch_or_changes_nothing(row):
    for name, n_steps in each_way():
        ours, theirs = (outcome(getattr(m, name), name, n_steps, leave, CALLS[row]) for m in (OURS, THEIRS))
        assert_as_in_torch(name, ours, theirs)


def test_torch_refuses_most_rows_of_the_table():
    """Most rows are for torch to refuse."""
    outcomes = [outcome(torch.optim.SGD, "SGD", 2, spoil, take_step) for spoil in STEPS.values()]
    assert sum(map(is_failure, outcomes)) > 40
