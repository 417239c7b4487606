"""Optimizers against torch's: trajectories, layouts, lengths, groups. Truth is torch.optim in float64."""

import copy
import inspect
import itertools

import pytest
import torch

import devices
import fastopt
from common import DTYPES, HALVES, assert_no_worse, error, kernel_calls, reference_of, threads, to_device
from optim_cases import OPTIM_CASES, make_params, set_grads
from optim_helpers import assert_same

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE, devices.CUDA)

# Empty, one, around a vector of 16 and two, a matrix, an image kernel, several cache lines, more than one thread.
SHAPES = [(0,), (1,), (15,), (16,), (17,), (33,), (7, 9), (4, 3, 3, 3), (1000,), (130, 129)]

ids = [str(case) for case in OPTIM_CASES]


def run(cls, options, dtype, shapes=SHAPES, n_steps=20, start=None):
    params = make_params(shapes, dtype)
    optimizer = cls(params, **options)
    if start is not None:
        optimizer.load_state_dict(start)
    for step in range(n_steps):
        set_grads(params, seed=step)
        optimizer.step()
    return params, optimizer


def states_of(optimizer):
    return [
        {key: value for key, value in optimizer.state[p].items() if key != "step"}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_twenty_steps_are_as_exact_as_torchs(case, dtype):
    ours, our_optimizer = run(case.ours, case.options, dtype)
    theirs, their_optimizer = run(case.theirs, case.options, dtype)
    truth, true_optimizer = run(case.theirs, case.options, torch.float64)
    if dtype == torch.float64:
        for p, t in zip(ours, truth, strict=True):
            assert error(p, t) <= 1e-12 * max(1.0, t.abs().max().item() if t.numel() else 0.0)
    else:
        slack = 20 if dtype in HALVES else 4  # a rounding a step, or several that partly cancel
        for p, q, t in zip(ours, theirs, truth, strict=True):
            assert_no_worse(p, q, t, slack)
    for s, q, t in zip(*map(states_of, (our_optimizer, their_optimizer, true_optimizer)), strict=True):
        assert s.keys() == q.keys()
        for key in s:
            assert s[key].dtype == q[key].dtype
            assert s[key].shape == q[key].shape
            assert_no_worse(s[key], q[key], t[key], slack=20)


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_state_keys_and_step_tensors_are_torchs(case):
    ours, theirs = (run(cls, case.options, torch.float32, n_steps=3)[1] for cls in (case.ours, case.theirs))
    mine, yours = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    assert mine["state"].keys() == yours["state"].keys()
    for index, state in yours["state"].items():
        assert list(mine["state"][index]) == list(state)
        for key, value in state.items():
            other = mine["state"][index][key]
            assert (other.dtype, other.shape, other.stride()) == (value.dtype, value.shape, value.stride())
            if key == "step":
                assert torch.equal(other, value)


@pytest.mark.native
@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_each_step_is_one_native_call(case):
    params = make_params(SHAPES)
    optimizer = case.ours([{"params": params[:4]}, {"params": params[4:]}], **case.options)
    for step in range(3):
        set_grads(params, seed=step)
        before = kernel_calls("update")
        optimizer.step()
        assert kernel_calls("update") == before + 1


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_groups_keep_their_own_hyper_parameters(case):
    def groups(params):
        return [{"params": params[::2]}, {"params": params[1::2], "lr": 1e-2, "weight_decay": 0.1}]

    results = []
    for cls in (case.ours, case.theirs):
        params = make_params(SHAPES, torch.float64)
        optimizer = cls(groups(params), **case.options)
        for step in range(5):
            set_grads(params, seed=step)
            optimizer.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) <= 1e-10  # a decay that cancels most of a gradient magnifies its rounding


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_no_length_or_alignment_writes_outside_its_tensor(dtype, offset):
    """Every length from none to two vectors and one, at several alignments, with sentinels on both sides."""
    for n, name in itertools.product(range(34), ("sgd_", "adam_")):
        buffers = [torch.full((n + 8 + offset,), 7.0, dtype=dtype) for _ in range(4)]
        param, grad, *states = (b[offset : offset + n] for b in buffers)
        for tensor in (param, grad, *states):
            tensor.copy_(torch.linspace(0.5, 1.5, n))
        expected = [t.double() for t in (param, *states)]
        if name == "sgd_":
            torch.ops.fastopt.sgd_([param], [grad], [states[0]], lr=0.5, momentum=0.5)
            reference_of("sgd_")([expected[0]], [grad.double()], [expected[1]], lr=0.5, momentum=0.5)
        else:
            steps = [torch.tensor(3.0), torch.tensor(3.0)]
            torch.ops.fastopt.adam_([param], [grad], [states[0]], [states[1]], [], [steps[0]], lr=0.5)
            reference_of("adam_")([expected[0]], [grad.double()], [expected[1]], [expected[2]], [], [steps[1]], lr=0.5)
        for buffer in buffers:
            assert (buffer[:offset] == 7).all()
            assert (buffer[offset + n :] == 7).all()
        for value, truth in zip((param, *states), expected, strict=True):
            assert error(value, truth) <= 2 * torch.finfo(dtype).eps * 2


@pytest.mark.native
@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_result_is_independent_of_position_and_threads(case):
    """The vector body, the scalar tail and each thread give the same bits."""
    n = 40_000
    values, grads = torch.randn(n), torch.randn(n)
    results = []
    for count, shift in ((1, 0), (2, 0), (2, 5)):
        with threads(count):
            param = torch.nn.Parameter(torch.cat([torch.zeros(shift), values]))
            optimizer = case.ours([param], **case.options)
            for _ in range(3):
                param.grad = torch.cat([torch.zeros(shift), grads])
                optimizer.step()
            results.append(param.detach()[shift:])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


LAYOUTS = {
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 3).contiguous().transpose(0, 3),
    "every other element of a larger tensor": lambda t: torch.stack([t, t], -1).reshape(*t.shape[:-1], -1)[..., ::2],
    "contiguous": lambda t: t.contiguous(),
}


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, LAYOUTS)), ids="/".join)
def test_layouts_of_parameter_and_gradient_change_nothing(case, layouts):
    of_param, of_grad = (LAYOUTS[name] for name in layouts)
    shape = (4, 3, 5, 6)
    values = torch.randn(shape, dtype=torch.float64)
    params = [torch.nn.Parameter(of_param(values.clone())), torch.nn.Parameter(values.clone())]
    optimizers = [case.ours(params[:1], **case.options), case.theirs(params[1:], **case.options)]
    for _ in range(3):
        grad = torch.randn(shape, dtype=torch.float64)
        params[0].grad, params[1].grad = of_grad(grad.clone()), grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert error(params[0], params[1]) <= 1e-12
    assert params[0].stride() == of_param(values).stride()


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_expanded_gradient_and_missing_gradient_are_handled_as_in_torch(case):
    results = []
    for cls in (case.ours, case.theirs):
        params = make_params([(6, 5), (3,), (4,)], torch.float64)
        how = {} if cls is case.ours else {"foreach": False}  # which writes into gradients, with Nesterov's momentum
        optimizer = cls(params, **case.options, **how)
        for step in range(3):
            params[0].grad = torch.full((), 0.3 + step, dtype=torch.float64).expand(6, 5)
            params[1].grad = None if step == 1 else torch.ones(3, dtype=torch.float64)
            optimizer.step()
        results.append((params, optimizer))
    (ours, optimizer), (theirs, _) = results
    for p, q in zip(ours, theirs, strict=True):
        assert error(p, q) <= 1e-13
    assert params[2] not in optimizer.state or not optimizer.state[params[2]]


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_gradients_are_not_changed(case):
    params = make_params(SHAPES)
    optimizer = case.ours(params, **case.options)
    for step in range(2):
        set_grads(params, seed=step)
        grads = [p.grad.clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_infinities_and_nan_reach_no_more_elements_than_in_torch(case):
    special = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-45, 1e38, -1e38]
    results = []
    for cls in (case.ours, case.theirs):
        param = torch.nn.Parameter(torch.tensor([a for a, _ in itertools.product(special, special)]))
        optimizer = cls([param], **case.options)
        for _ in range(3):
            param.grad = torch.tensor([b for _, b in itertools.product(special, special)])
            optimizer.step()
        results.append(param.detach())
    ours, theirs = results
    assert not (ours.isnan() & ~theirs.isnan()).any()


@pytest.mark.parametrize("eps", [0.0, 1e-300, 1e-45, 1e-44, 1e-43, 1e-40, 1e-30, 1e-8])
@pytest.mark.parametrize("case", [case for case in OPTIM_CASES if case.row.has("eps")], ids=str)
def test_small_eps_or_lr_gives_no_more_nan_and_zeros_than_in_torch(case, eps):
    """One that takes up a bias correction becomes 0 itself: 0 / 0 is NaN, and updates are lost."""
    # On a GPU torch's fused step multiplies by the step size first, as ours does, and its foreach divides first.
    is_fused = devices.current() == devices.CUDA and case.row.has("fused")
    fused = {"fused": True} if is_fused else {}
    for lr, grad in itertools.product((1e-3, 1e-36, 3e-43), (0.0, 1e-18, 1.0)):
        results = []
        ways = [(case.ours, torch.float32, {}), (case.theirs, torch.float32, fused), (case.theirs, torch.float64, {})]
        for cls, dtype, how in ways:
            param = torch.nn.Parameter(to_device(torch.zeros(1, dtype=dtype)))  # at 0 the smallest update shows
            optimizer = cls([param], **{**case.options, "eps": eps, "lr": lr, "weight_decay": 0}, **how)
            for _ in range(3):
                param.grad = torch.full_like(param, grad)
                optimizer.step()
            results.append(param.item())
        ours, theirs, truth = results
        if theirs == theirs:
            is_inside_root = case.name == "Adadelta" and eps >= 1e-45  # an eps that may be subnormal
            rounding = max(1e-5, 1.5e-45 / eps) if is_inside_root else 1e-5
            assert abs(ours - truth) <= abs(theirs - truth) + rounding * abs(truth) + 1e-44, (lr, grad, results)


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_versions_of_written_tensors_are_bumped(case):
    params = make_params([(5,), (6,)])
    optimizer = case.ours(params, **case.options)
    set_grads(params, seed=0)
    optimizer.step()
    tensors = [params[0], *optimizer.state[params[0]].values()]
    versions = [t._version for t in tensors]
    optimizer.step()
    assert all(t._version > before for t, before in zip(tensors, versions, strict=True))


def test_backward_through_a_stepped_parameter_raises():
    param = torch.nn.Parameter(torch.ones(3))
    loss = (param * param).sum()
    param.grad = torch.ones(3)
    fastopt.SGD([param], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_tensor_learning_rates_and_schedules_are_read_each_step(case):
    def train(cls, lr):
        params = make_params([(33,)], torch.float64)
        optimizer = cls(params, **{**case.options, "lr": lr})
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            set_grads(params, seed=step)
            optimizer.step()
            schedule.step()
        return params[0]

    lr = case.options.get("lr", 1e-3)
    assert error(train(case.ours, lr), train(case.theirs, lr)) <= 1e-13
    tensor = torch.tensor(lr, dtype=torch.float64)
    assert error(train(case.ours, tensor.clone()), train(case.theirs, tensor.clone())) <= 1e-13


@pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
def test_class_signature_and_repr_are_torchs(case):
    params = make_params([(3,)])
    ours, theirs = case.ours(params, **case.options), case.theirs(params, **case.options)
    assert isinstance(ours, case.theirs if case.row.is_in_torch else torch.optim.Optimizer)
    assert inspect.signature(case.ours) == inspect.signature(case.theirs)
    assert repr(ours) == repr(theirs)
    assert ours.defaults == theirs.defaults
    copied = copy.deepcopy(ours)
    assert type(copied) is case.ours
    assert_same(copied.state_dict(), ours.state_dict())
