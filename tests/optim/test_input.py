"""Optimizers on unusual input: shared memory, sparse and complex tensors, bad arguments."""

import warnings

import pytest
import torch

import devices
import fastopt
from common import error, kernel_calls
from optim_cases import OPTIM_CASES, make_params, set_grads
from optimizers import NAMES, OURS, THEIRS

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

ids = [str(case) for case in OPTIM_CASES]
all_cases = pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
all_classes = pytest.mark.parametrize("name", NAMES)


def tied_views(dtype):
    base = torch.arange(1.0, 9.0, dtype=dtype)
    return [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[2:])]


@all_cases
def test_parameters_that_share_memory_are_stepped_one_after_the_other(case):
    results = []
    for cls in (case.ours, case.theirs):
        params = tied_views(torch.float64)
        optimizer = cls(params, **case.options)
        for step in range(3):
            set_grads(params, seed=step)
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert error(p, q) <= 1e-12


@all_cases
def test_a_parameter_listed_twice_is_stepped_twice(case):
    results = []
    for cls in (case.ours, case.theirs):
        (param,) = make_params([(5,)], torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = cls([param, param], **case.options)
        for step in range(3):
            set_grads([param], seed=step)
            optimizer.step()
        results.append(param)
    assert error(*results) <= 1e-12


@all_cases
def test_a_gradient_that_is_another_parameter_is_read_before_that_is_stepped(case):
    results = []
    for cls in (case.ours, case.theirs):
        params = make_params([(50_000,), (50_000,)], torch.float64)
        optimizer = cls(params, **case.options)
        for _ in range(2):
            params[0].grad = params[1].data
            params[1].grad = torch.ones_like(params[1])
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert error(p, q) <= 1e-11


@pytest.mark.native
def test_adjacent_parameters_in_one_buffer_take_the_kernel():
    buffer = torch.ones(30)
    params = [torch.nn.Parameter(buffer[a:b]) for a, b in ((0, 10), (10, 20), (20, 30))]
    set_grads(params, seed=0)
    before = kernel_calls("update")
    fastopt.SGD(params, lr=0.1).step()
    assert kernel_calls("update") == before + 1


def with_sparse_grad(cls):
    param = torch.nn.Parameter(torch.ones(4, 2))
    param.grad = torch.sparse_coo_tensor([[1, 3]], torch.ones(2, 2), (4, 2))
    return [param], cls([param], lr=0.1)


def with_complex(cls):
    param = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    param.grad = torch.tensor([0.5 + 1j, 2 - 2j])
    return [param], cls([param], lr=0.1)


def with_conjugate_grad(cls):
    param = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
    param.grad = torch.tensor([0.5 + 1j, 2 - 2j]).conj().imag
    return [param], cls([param], lr=0.1)


def with_integer_looking_numbers(cls):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return [param], cls([param], lr=1, weight_decay=2)


def with_differentiable(cls):
    param = torch.nn.Parameter(torch.ones(3)).clone()
    param.grad = torch.ones(3)
    return [param], cls([param], lr=0.1, differentiable=True)


def with_float8_state_like_dtype(cls):
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = cls([param], lr=0.1)
    param.data = param.data.float()
    param.grad = torch.ones(3)
    return [param], optimizer


def with_meta(cls):
    param = torch.nn.Parameter(torch.ones(3, device="meta"))
    param.grad = torch.ones(3, device="meta")
    return [param], cls([param], lr=0.1)


def with_capturable(cls):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return [param], cls([param], lr=0.1, capturable=True)


def with_no_gradients(cls):
    return [torch.nn.Parameter(torch.ones(3))], cls([torch.nn.Parameter(torch.ones(3))], lr=0.1)


UNUSUAL = [
    with_sparse_grad,
    with_complex,
    with_conjugate_grad,
    with_integer_looking_numbers,
    with_differentiable,
    with_float8_state_like_dtype,
    with_meta,
    with_capturable,
    with_no_gradients,
]


@all_classes
@pytest.mark.parametrize("make", UNUSUAL, ids=lambda f: f.__name__)
def test_unusual_tensors_give_torchs_result_or_torchs_error(make, name):
    if make is with_capturable and devices.current() == devices.SHIM_DEVICE:
        pytest.skip("the shim's kernels take what those of a GPU take")
    results = []
    for module in (OURS, THEIRS):
        try:
            params, optimizer = make(getattr(module, name))
            optimizer.step()
            optimizer.step()
            results.append([torch.view_as_real(p) if p.is_complex() else p for p in params])
        except (RuntimeError, TypeError, AssertionError, NotImplementedError) as failure:
            results.append((type(failure), str(failure)))
    ours, theirs = results
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        for p, q in zip(ours, theirs, strict=True):
            assert p.device == q.device
            assert p.is_meta or error(p, q) <= 1e-6


BAD_ARGUMENTS = [
    dict(lr=-0.1),
    dict(lr=float("nan")),
    dict(weight_decay=-1.0),
    dict(lr=torch.ones(2)),
    dict(eps=-1.0),
    dict(momentum=-0.5),
    dict(alpha=-1.0),
    dict(betas=(1.0, 0.9)),
    dict(betas=(0.9, -0.1)),
    dict(nesterov=True),
    dict(nesterov=True, momentum=0.9, dampening=0.1),
    dict(foreach=True, fused=True),
    dict(fused=True, differentiable=True),
    dict(params=[]),
    dict(params=torch.ones(3)),
    dict(params=[1.0]),
    dict(params=[{"params": [torch.ones(2, requires_grad=True) * 2]}]),
    dict(learning_rate=0.1),
    dict(),
]


@all_classes
@pytest.mark.parametrize("options", BAD_ARGUMENTS, ids=str)
def test_constructors_raise_what_torchs_raise(options, name):
    outcomes = []
    for module in (OURS, THEIRS):
        arguments = {"params": [torch.nn.Parameter(torch.ones(2))], **options}
        try:
            outcomes.append(repr(getattr(module, name)(**arguments)))
        except Exception as failure:
            outcomes.append((type(failure), str(failure)))
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_centered_variance_that_rounds_below_zero_is_zero(dtype):
    def trained(cls):
        param = torch.zeros(2000, dtype=dtype)
        param.grad = torch.linspace(0.1, 3, 2000).to(param)
        optimizer = cls([param], alpha=0.5, eps=1e-3, centered=True)
        for _ in range(500):
            optimizer.step()
        return param

    assert trained(torch.optim.RMSprop).isnan().any()
    assert trained(fastopt.RMSprop).isfinite().all()
