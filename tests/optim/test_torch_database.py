"""torch's own table of optimizer inputs, with fastopt's classes in the place of torch's."""

import itertools
import warnings

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import fastopt
from common import DTYPES, HALVES, assert_no_worse, error, outcome
from optim_cases import OPTIM_CASES
from optim_helpers import step_through
from optimizers import NAMES, OPTIMIZERS

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

INFOS = [info for info in optim_db if info.name in fastopt.optim.__all__]
IMPLEMENTATIONS = ("foreach", "fused", "differentiable")


def ours(info):
    return getattr(fastopt, info.name)


def theirs(info):
    return getattr(torch.optim, info.name)


def configurations():
    """Every input of torch's table, those for GPUs among them, by itself and with each implementation that is there."""
    for info in INFOS:
        for of_table in info.optim_inputs_func(device="cuda"):
            for implementation in (None, *info.supported_impls):
                options = {**of_table.kwargs, **({implementation: True} if implementation else {})}
                name = "-".join(filter(None, [info.name, of_table.desc.replace(" ", "_"), implementation]))
                yield pytest.param(info, options, id=name)


all_infos = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
all_configurations = pytest.mark.parametrize(("info", "options"), list(configurations()))


def copied(options):
    """Options whose tensors are not shared with another optimizer."""
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in options.items()}


def make_params(dtype, *, is_leaf=True):
    """A matrix, a strided matrix, a scalar, an empty vector, and one that never has a gradient."""
    generator = torch.Generator().manual_seed(0)

    def make(*sizes):
        value = torch.randn(sizes, generator=generator, dtype=torch.complex128 if dtype.is_complex else torch.float64)
        return value.to(dtype)

    values = [make(10, 5), make(10, 5, 2)[..., 0], make(), make(0), make(3)]
    return [value.requires_grad_() if is_leaf else value.requires_grad_().clone() for value in values]


def trained(cls, options, dtype, n_steps=5):
    params = make_params(dtype, is_leaf=not options.get("differentiable"))
    optimizer = cls(params, **copied(options))
    step_through(optimizer, params[:-1], n_steps)
    return params, optimizer


def test_torchs_table_has_every_optimizer_class():
    assert {info.name for info in INFOS} == {row.name for row in OPTIMIZERS if row.is_in_torch}


def test_our_tables_have_every_optimizer_class():
    assert set(NAMES) == set(fastopt.optim.__all__)
    assert list(dict.fromkeys(case.name for case in OPTIM_CASES)) == NAMES


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64, torch.complex128], ids=str)
@all_configurations
def test_a_configuration_trains_as_torchs_or_raises_what_torch_raises(info, options, dtype):
    expected = outcome(lambda: trained(theirs(info), options, dtype))
    if isinstance(expected, Exception):
        found = outcome(lambda: trained(ours(info), options, dtype))
        assert (type(found), str(found)) == (type(expected), str(expected))
        return
    params, optimizer = trained(ours(info), options, dtype)
    if dtype.is_complex or options.get("differentiable") or options.get("capturable"):  # stepped by torch itself
        others, reference = expected
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    else:
        # Of torch's implementations the plain loop is the reference: its fused one has defects of its own in 16 bits.
        plain = {name: value for name, value in options.items() if name not in IMPLEMENTATIONS}
        others, reference = trained(theirs(info), plain, dtype)
        truths, _ = trained(theirs(info), plain, torch.float64)
        for p, q, t in zip(params, others, truths, strict=True):
            assert_no_worse(p, q, t, slack=20 if dtype in HALVES else 4)
    assert optimizer.state_dict()["param_groups"] == expected[1].state_dict()["param_groups"]
    for p, q in zip(params, others, strict=True):
        state, other = optimizer.state[p], reference.state[q]
        assert list(state) == list(other)
        for key, value in other.items():
            same = value is None or (state[key].dtype, state[key].shape) == (value.dtype, value.shape)
            assert same, key


@all_infos
def test_wrong_input_raises_or_warns_as_the_table_says(info):
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        params, options = case.optimizer_error_input.params, case.optimizer_error_input.kwargs
        make = lambda: ours(info)(params, **options)  # noqa: B023, E731
        if case.error_on == OptimizerErrorEnum.STEP_ERROR:
            make = make().step
        expects = pytest.warns if issubclass(case.error_type, Warning) else pytest.raises
        with expects(case.error_type, match=case.error_regex):
            make()


@all_configurations
def test_a_tensor_learning_rate_is_a_number(info, options):
    options = {name: value for name, value in options.items() if name not in ("capturable", "differentiable")}
    for n_dims in range(3):
        tensor = torch.tensor(1e-3, dtype=torch.float64).reshape([1] * n_dims)
        expected = outcome(lambda: trained(theirs(info), {**options, "lr": tensor}, torch.float64))  # noqa: B023
        found = outcome(lambda: trained(ours(info), {**options, "lr": tensor}, torch.float64))  # noqa: B023
        if isinstance(expected, Exception):
            assert (type(found), str(found)) == (type(expected), str(expected))
        else:
            params, _ = trained(ours(info), {**options, "lr": 1e-3}, torch.float64)
            for p, q in zip(params, found[0], strict=True):
                assert error(p, q) <= (2e-15 if info.optim_cls is torch.optim.NAdam else 1e-15)  # its two terms


@all_infos
def test_sparse_gradients_give_what_torch_gives(info):
    """Uncoalesced gradients of one element at a time, with the table's options and schedules."""
    options, schedules = info.metadata_for_sparse

    def descended(cls, more):
        param = torch.tensor([1.5, 1.5], dtype=torch.float64, requires_grad=True)
        optimizer = cls([param], **{**options, **more})
        schedulers = [make(optimizer) for make in schedules]
        for step in range(40):
            part = torch.tensor([0.25, 0.75], dtype=torch.float64) * (param.detach()[step % 2] - 1)
            param.grad = torch.sparse_coo_tensor([[step % 2] * 2], part, (2,))
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        return param.detach()

    momenta = [{}, {"momentum": 0.9}, {"maximize": True}, {"weight_decay": 0.1}, {"foreach": True}, {"fused": True}]
    for more in momenta:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = outcome(lambda: descended(theirs(info), more))  # noqa: B023
            found = outcome(lambda: descended(ours(info), more))  # noqa: B023
        if isinstance(expected, Exception):
            assert (type(found), str(found)) == (type(expected), str(expected))
        else:
            assert torch.equal(found, expected)


@all_infos
def test_a_complex_parameter_is_a_pair_of_real_ones(info):
    for of_table in info.optim_inputs_func(device="cpu"):
        whole = torch.tensor([1 + 2j, -0.5j, 3], dtype=torch.complex128, requires_grad=True)
        parts = [part.detach().clone().requires_grad_() for part in (whole.real, whole.imag)]
        optimizers = [ours(info)([whole], **copied(of_table.kwargs)), ours(info)(parts, **copied(of_table.kwargs))]
        for optimizer in optimizers * 4:
            x = whole if optimizer is optimizers[0] else torch.complex(*parts)
            optimizer.zero_grad()
            (x - 1).abs().pow(4).sum().backward()
            optimizer.step()
        assert error(torch.view_as_real(whole), torch.stack(parts, -1)) <= 1e-12


@all_infos
def test_differentiating_through_steps_gives_torchs_derivatives(info):
    def derivatives(cls, options, n_steps):
        leaves = make_params(torch.float64)[:3]
        grads = [leaf.detach().cos().requires_grad_() for leaf in leaves]
        params = [leaf.clone() for leaf in leaves]
        optimizer = cls(params, **{**options, "differentiable": True})
        for _ in range(n_steps):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad
            optimizer.step()
        return torch.autograd.grad(sum(p.square().sum() for p in params), [*leaves, *grads])

    n_derived = 0
    for of_table, n_steps in itertools.product(info.optim_inputs_func(device="cpu"), (1, 3)):
        expected = outcome(lambda: derivatives(theirs(info), of_table.kwargs, n_steps))  # noqa: B023
        found = outcome(lambda: derivatives(ours(info), of_table.kwargs, n_steps))  # noqa: B023
        if isinstance(expected, Exception):
            assert (type(found), str(found)) == (type(expected), str(expected))
        else:
            n_derived += 1
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert n_derived


@all_infos
def test_parameters_of_several_dtypes_and_layouts_are_stepped_together(info):
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.complex64)
    for of_table, implementation in itertools.product(info.optim_inputs_func(device="cpu"), (None, "foreach")):
        more = {implementation: True} if implementation else {}
        results = []
        for cls in (ours(info), theirs(info)):
            params = [torch.full((7, 3), 0.5, dtype=dtype).mT.requires_grad_() for dtype in dtypes]
            step_through(cls(params, **copied(of_table.kwargs), **more), params, 4)
            results.append([torch.view_as_real(p) if p.is_complex() else p for p in params])
        for p, q in zip(*results, strict=True):
            assert error(p, q) <= (0.02 if p.dtype == torch.bfloat16 else 1e-6)
