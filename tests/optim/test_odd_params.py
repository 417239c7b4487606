"""An optimizer that has a few parameters which no kernel takes: torch's values, and the kernels step all others."""

import pytest
import torch

import fastopt
from common import is_native, kernel_calls, outcome
from optim_helpers import assert_same
from optimizers import BY_NAME, CONFIGURATIONS, OURS, THEIRS

N_STEPS = 3


def dense(values):
    return values.clone()


def sliced(values):
    return torch.stack([values, values], -1)[..., 0]


ODD = {  # how parameter and gradient are made of the same values
    "complex": (lambda v: torch.complex(v, -v), lambda v: torch.complex(v, v)),
    "not dense": (sliced, sliced),
    "sparse gradient": (dense, lambda v: v.to_sparse()),
    "float8": (lambda v: v.to(torch.float8_e4m3fn), lambda v: v.to(torch.float8_e4m3fn)),
    "on meta": (lambda v: v.to("meta"), lambda v: v.to("meta")),
}
PLACES = {"first": [0], "in between": [3], "last": [5], "several": [1, 2, 4], "all": range(6)}


def made(cls, options, places, make, make_grad, n_groups=2):
    """An optimizer of six parameters in groups, some of them odd, and a function that gives it the next gradients."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for i in range(6):
        values = torch.randn(2, 3, generator=generator)
        params.append(torch.nn.Parameter(make(values) if i in places else values))
    size = len(params) // n_groups
    groups = [{"params": params[g * size : (g + 1) * size], "weight_decay": 0.0} for g in range(n_groups)]

    def give_grads():
        for i, param in enumerate(params):
            values = torch.randn(2, 3, generator=generator)
            param.grad = make_grad(values) if i in places else values

    return cls(groups, **options), params, give_grads


def left(optimizer, params):
    """All that a step may write, in a form that can be compared."""
    owners = [[param is owner for param in params].index(True) for owner in optimizer.state]
    states = [(list(state), [plain(value) for value in state.values()]) for state in optimizer.state.values()]
    return [[plain(param.detach()) for param in params], owners, states]


def plain(value):
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout != torch.strided:
        value = value.to_dense()
    if value.dtype == torch.float8_e4m3fn:
        value = value.float()
    if value.is_meta:
        return (value.shape, value.dtype)
    return torch.view_as_real(value) if value.is_complex() else value.clone()


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_a_step_with_odd_parameters_is_torchs_or_fails_as_it_does_and_changes_nothing(name, options, what):
    for place, indices in PLACES.items():
        ends = []
        for module in (OURS, THEIRS):
            optimizer, params, give_grads = made(getattr(module, name), options, indices, *ODD[what])
            for _ in range(N_STEPS):
                give_grads()
                before = left(optimizer, params)
                failure = outcome(optimizer.step)
                if failure is not None:
                    if module is OURS:
                        assert_same(left(optimizer, params), before, f"{place}: {failure}")
                    break
            ends.append((type(failure), str(failure)) if failure is not None else left(optimizer, params))
        assert_same(*ends, where=place)


@pytest.mark.parametrize("what", ["complex", "not dense", "sparse gradient"])
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_kernels_step_all_but_unusual_parameters(name, options, what):
    if what == "sparse gradient" and not BY_NAME[name].takes_sparse:
        return
    optimizer, _, give_grads = made(getattr(fastopt, name), options, [1, 4], *ODD[what])
    before = kernel_calls("update")
    for _ in range(N_STEPS):
        give_grads()
        optimizer.step()
    assert kernel_calls("update") - before == N_STEPS * is_native()


def share_values(params, optimizer, first, odd):
    base = torch.arange(12.0).view(2, 6)
    params[first].data, params[odd].data = base.view(-1)[:6].view(2, 3), base[:, ::2]


def share_grad(params, optimizer, first, odd):
    params[first].grad = params[odd].data


def share_expanded_grad(params, optimizer, first, odd):
    params[first].grad = params[odd].data[:, :1].expand(2, 3)


def share_state(params, optimizer, first, odd):
    state, other = optimizer.state[params[odd]], optimizer.state[params[first]]
    if "step" in state:
        state["step"] = other["step"]


@pytest.mark.parametrize("share", [share_values, share_grad, share_expanded_grad, share_state])
@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS)
def test_odd_parameters_that_share_memory_with_others_are_stepped_in_order(name, options, share):
    for first, odd in ((0, 1), (4, 1)):
        ends = []
        for module in (OURS, THEIRS):
            optimizer, params, give_grads = made(getattr(module, name), options, [odd], sliced, sliced)
            give_grads()
            optimizer.step()
            give_grads()
            share(params, optimizer, first, odd)
            optimizer.step()
            ends.append(left(optimizer, params))
        assert_same(*ends, where=f"{first} {odd}")


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_gradient_scaler_skips_or_unscales_odd_parameters_too(name):
    for value in (2.0, float("inf")):
        ends = []
        for module in (OURS, THEIRS):
            options = dict(lr=0.1, fused=module is OURS)
            optimizer, params, give_grads = made(getattr(module, name), options, [1], sliced, sliced)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            for _ in range(N_STEPS):
                give_grads()
                scaler.scale(torch.ones(1))
                params[2].grad.mul_(value)
                scaler.step(optimizer)
                scaler.update()
            ends.append(left(optimizer, params)[:1])
        assert_same(*ends)
