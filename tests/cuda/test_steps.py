"""Steps by the CUDA kernels alone: the tables of launches, numbers that stay on the device, mixtures of dtypes."""

import pytest
import torch

import devices
import fastopt
from common import HALVES, error, kernel_calls, reference_of, to_device
from loss_cases import make_values
from optim_cases import OPTIM_CASES, make_params, set_grads

RUNS_ON = (devices.SHIM_DEVICE, devices.CUDA)

cases = pytest.mark.parametrize("case", OPTIM_CASES, ids=str)
NEEDS_STEP = [case for case in OPTIM_CASES if "step" in case.row.states(case.options)]


def step_both(case, shapes, dtype=torch.float32, n_steps=4, own=None, others=None):
    """Parameters after some steps of our optimizer and of torch's in float64."""
    results = []
    for cls, kind, extra in ((case.ours, dtype, own), (case.theirs, torch.float64, others)):
        params = make_params(shapes, kind)
        optimizer = cls(params, **case.options, **(extra or {}))
        if extra and "capturable" in extra and devices.current() == devices.SHIM_DEVICE:
            set_grads(params, seed=0)
            for group in optimizer.param_groups:  # torch makes such states on a GPU only
                optimizer._init_lists(group)
        for step in range(n_steps):
            set_grads(params, seed=step)
            optimizer.step()
        results.append((params, optimizer))
    return results


def assert_near(case, ours, truth, slack=16):
    for p, t in zip(ours, truth, strict=True):
        unit = torch.finfo(p.dtype).eps * max(1.0, t.abs().max().item() if t.numel() else 1.0)
        assert error(p, t) <= slack * unit + 1e-5 * (p.dtype not in HALVES and p.dtype != torch.float64)


@cases
def test_step_runs_in_the_cuda_library(case):
    before = kernel_calls("cuda")
    step_both(case, [(5,), (3000,)], n_steps=3)
    assert kernel_calls("cuda") == before + 3


@cases
@pytest.mark.parametrize("n_tensors", [39, 40, 41, 489, 490, 491, 1200])
def test_every_number_of_tensors_is_stepped_whole(case, n_tensors):
    """In the arguments of a short and of a long launch, and in device memory."""
    if n_tensors > 100 and case is not NEEDS_STEP[0]:
        case = next(c for c in OPTIM_CASES if c.name == case.name)  # one of each optimizer
    shapes = [(i % 7,) for i in range(n_tensors)]
    (ours, _), (truth, _) = step_both(case, shapes, n_steps=3)
    assert_near(case, ours, truth)


@cases
def test_chunks_of_long_tensors_cover_every_element_once(case):
    shapes = [(2047,), (2048,), (2049,), (70_001,), (3,), (0,), (4096 * 3,)]
    (ours, _), (truth, _) = step_both(case, shapes, n_steps=2)
    assert_near(case, ours, truth)


@pytest.mark.parametrize("n_groups", [7, 8, 9, 30])
def test_more_groups_than_one_launch_holds_are_stepped(n_groups):
    results = []
    for cls, dtype in ((fastopt.Adam, torch.float32), (torch.optim.Adam, torch.float64)):
        params = make_params([(9,)] * n_groups, dtype)
        optimizer = cls([{"params": [p], "lr": 1e-3 * (i + 1)} for i, p in enumerate(params)])
        for step in range(3):
            set_grads(params, seed=step)
            optimizer.step()
        results.append(params)
    for ours, truth in zip(*results, strict=True):
        assert error(ours, truth) < 1e-6


@pytest.mark.parametrize("how", ["capturable", "fused"])
@pytest.mark.parametrize("case", NEEDS_STEP, ids=str)
def test_step_counts_on_the_device_are_counted_there(case, how):
    if not case.row.has(how):
        pytest.skip("torch has no such argument")
    own = {how: True}
    (ours, optimizer), (truth, _) = step_both(case, [(5,), (0,), (3000,)], own=own)
    assert_near(case, ours, truth)
    for param in ours:
        step = optimizer.state[param]["step"]
        assert step.item() == 4
        assert step._version == 4
        assert step.device == param.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@cases
def test_a_learning_rate_on_the_device_is_read_there(case, dtype):
    lr = torch.tensor(case.options.get("lr", 1e-3), dtype=dtype)
    results = []
    for cls, kind, rate in ((case.ours, torch.float32, lr), (case.theirs, torch.float64, lr.item())):
        params = make_params([(5,), (3000,)], kind)
        optimizer = cls(params, **{**case.options, "lr": rate})
        for step in range(3):
            set_grads(params, seed=step)
            if step == 2:
                optimizer.param_groups[0]["lr"] *= 0.5  # in place on the device
            optimizer.step()
        results.append(params)
    assert_near(case, *results)


@cases
@pytest.mark.parametrize("skipped", [(), (0,), (1,), (0, 1), (2,)])
def test_a_scalers_numbers_are_read_on_the_device(case, skipped):
    """Gradients come scaled; steps whose gradients overflowed change nothing, the first ones included."""
    if "fused" not in case.ours.__init__.__code__.co_varnames:
        pytest.skip("torch gives such numbers to optimizers made with fused=True")
    scale, results = 1024.0, []
    for ours in (True, False):
        params = make_params([(5,), (3000,)], torch.float32 if ours else torch.float64)
        optimizer = case.ours(params, **case.options, fused=True) if ours else case.theirs(params, **case.options)
        for step in range(4):
            set_grads(params, seed=step)
            if ours:
                for p in params:
                    p.grad *= scale
                optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(2.0 * (step in skipped))
                optimizer.step()
                if step not in skipped:
                    assert params[0].grad.abs().max() < 10, "gradients are left unscaled"
            elif step not in skipped:
                optimizer.step()
        results.append((params, optimizer))
    (ours, optimizer), (truth, other) = results
    assert_near(case, ours, truth)
    for p, q in zip(ours, truth, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        if "step" in other.state[q]:
            assert optimizer.state[p]["step"].item() == other.state[q]["step"].item()


MIXTURES = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "state_dtype"), MIXTURES, ids=str)
@pytest.mark.parametrize("n", [1, 17, 2048, 5000])
@pytest.mark.parametrize("name", ["sgd_", "rmsprop_", "adam_"])
def test_states_may_have_another_dtype(name, dtype, state_dtype, n):
    values = [make_values((n,), torch.float64, seed=s, scale=1.0) for s in range(5)]
    param, grad = values[0].to(dtype), values[1].to(dtype)
    states = [v.abs().to(state_dtype) for v in values[2:]]
    expected = [t.double() for t in (param, grad, *states)]
    steps = [torch.tensor(3.0)]
    if name == "sgd_":
        torch.ops.fastopt.sgd_([param], [grad], states[:1], lr=0.5, momentum=0.5)
        reference_of("sgd_")(expected[:1], expected[1:2], expected[2:3], lr=0.5, momentum=0.5)
    elif name == "rmsprop_":
        lists, wide = [[s] for s in states], [[s] for s in expected[2:]]
        options = dict(lr=0.5, momentum=0.5, centered=False)
        torch.ops.fastopt.rmsprop_([param], [grad], *lists, steps, **options)
        reference_of("rmsprop_")(expected[:1], expected[1:2], *wide, [torch.tensor(3.0)], **options)
    else:
        torch.ops.fastopt.adam_([param], [grad], states[:1], states[1:2], [], steps, lr=0.5)
        wide = expected[2:3], expected[3:4]
        reference_of("adam_")(expected[:1], expected[1:2], *wide, [], [torch.tensor(3.0)], lr=0.5)
    for value, truth in zip((param, *states), (expected[0], *expected[2:]), strict=True):
        assert error(value, truth) <= 2 * torch.finfo(value.dtype).eps * max(1.0, truth.abs().max().item())


def test_mixtures_without_a_kernel_are_refused():
    p, g, s = to_device(torch.ones(3)), to_device(torch.ones(3)), to_device(torch.ones(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="a state's dtype is not its parameter's"):
        torch.ops.fastopt.sgd_([p], [g], [s], lr=0.5, momentum=0.5)
    assert (p == 1).all()
