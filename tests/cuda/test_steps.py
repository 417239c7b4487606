"""Parts of the CUDA path alone: launches and their tables, numbers that stay on the device, kernels by size, errors."""

import ctypes
import itertools

import pytest
import torch
import torch.nn.functional as F

import devices
import fastopt
from common import DTYPES, HALVES, assert_no_worse, error, kernel_calls, reference_of, to_device
from loss_cases import KINDS, loss_and_grad, make_values, truth_of
from optim_cases import OPTIM_CASES, make_params, set_grads

RUNS_ON = (devices.SHIM_DEVICE, devices.CUDA)

cross_entropy = fastopt.functional.cross_entropy
cases = pytest.mark.parametrize("case", OPTIM_CASES, ids=str)
kinds = pytest.mark.parametrize("options", KINDS, ids=str)
NEEDS_STEP = [case for case in OPTIM_CASES if "step" in case.row.states(case.options)]


def shim():
    """The shim's own functions; only where it runs."""
    return ctypes.CDLL(str(devices.shim_library()))


def tensor(*args, **kwargs):
    return to_device(torch.tensor(*args, **kwargs))


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


# --- Optimizers -----------------------------------------------------------------------------------------------------


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
    lr = tensor(case.options.get("lr", 1e-3), dtype=dtype)
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
                optimizer.grad_scale, optimizer.found_inf = tensor(scale), tensor(2.0 * (step in skipped))
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
    steps = [tensor(3.0)]
    if name == "sgd_":
        torch.ops.fastopt.sgd_([param], [grad], states[:1], lr=0.5, momentum=0.5)
        reference_of("sgd_")(expected[:1], expected[1:2], expected[2:3], lr=0.5, momentum=0.5)
    elif name == "rmsprop_":
        lists, wide = [[s] for s in states], [[s] for s in expected[2:]]
        options = dict(lr=0.5, momentum=0.5, centered=False)
        torch.ops.fastopt.rmsprop_([param], [grad], *lists, steps, **options)
        reference_of("rmsprop_")(expected[:1], expected[1:2], *wide, [tensor(3.0)], **options)
    else:
        torch.ops.fastopt.adam_([param], [grad], states[:1], states[1:2], [], steps, lr=0.5)
        wide = expected[2:3], expected[3:4]
        reference_of("adam_")(expected[:1], expected[1:2], *wide, [], [tensor(3.0)], lr=0.5)
    for value, truth in zip((param, *states), (expected[0], *expected[2:]), strict=True):
        assert error(value, truth) <= 2 * torch.finfo(value.dtype).eps * max(1.0, truth.abs().max().item())


def test_mixtures_without_a_kernel_are_refused():
    p, g, s = to_device(torch.ones(3)), to_device(torch.ones(3)), to_device(torch.ones(3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="a state's dtype is not its parameter's"):
        torch.ops.fastopt.sgd_([p], [g], [s], lr=0.5, momentum=0.5)
    assert (p == 1).all()


# --- Cross-entropy ----------------------------------------------------------------------------------------------------

KERNEL_KINDS = [
    ((1, 10), "a thread for the row"),
    ((600, 10), "threads for rows, several blocks"),
    ((3, 33), "a warp for each row, one block"),
    ((100, 40), "a warp for each row, several blocks"),
    ((9, 1024), "the widest rows of warps"),
    ((9, 1025), "a block for each row, not aligned"),
    ((5, 4096), "a block for each row, in shared memory"),
    ((9, 30_000), "wide rows, as many as multiprocessors and more"),
    ((2, 16_384), "several blocks for a row"),
    ((3, 20_001), "several blocks for a row, not aligned"),
    ((33_000, 3), "targets counted by several blocks"),
    ((33_000, 34), "the same for warps"),
    ((2, 7, 300), "columns"),
]


@pytest.mark.parametrize(("shape", "why"), KERNEL_KINDS, ids=[why for _, why in KERNEL_KINDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_every_kernel_kind_is_as_exact_as_torch(shape, why, dtype, options):
    if shape[0] > 30_000 and (dtype != torch.float32 or options.ignored != "some" or options.smoothing == 0):
        pytest.skip("one dtype will do")
    x = make_values(shape, dtype)
    indices = torch.arange(x[:, 0].numel()).reshape(x[:, 0].shape)
    target = to_device(indices * 7 % shape[1])
    if options.kind == "probability":
        target = make_values(shape, torch.float64, seed=3).softmax(1).to(dtype)
    else:
        target.masked_fill_(to_device(indices % 3 == 1), -100)
        target.view(-1)[0] = shape[1] - 1  # one counts in any case
    weight = to_device(torch.arange(shape[1]) % 8 + 1).to(dtype) / 4 if options.has_weight else None
    for reduction in ("mean", "none"):
        arguments = dict(weight=weight, reduction=reduction, label_smoothing=options.smoothing)
        own = loss_and_grad(cross_entropy, x, target, **arguments)
        other = loss_and_grad(F.cross_entropy, x, target, **arguments)
        truth = truth_of(F.cross_entropy, x, target, **arguments)
        for a, b, c in zip(own, other, truth, strict=True):
            assert_no_worse(a, b, c, slack=128 if dtype == torch.float64 else 8)  # float64 is the truth itself


# Bytes of a row near each size at which it is treated otherwise: at 48 KiB, less static shared memory, a kernel has to
# ask for more, and at 112 KiB two rows no longer fit a multiprocessor's shared memory.
AROUND_LIMITS = [
    *(48 * 1024 + n for n in (-4096, -528, -420, -416, -412, -280, -216, -24, -16, -8, 0, 8)),
    *(112 * 1024 + n for n in (-24, -16, -8, 8)),
]


@pytest.mark.parametrize("row_bytes", AROUND_LIMITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "probability"])
def test_rows_of_any_size_are_exact_in_shared_memory_or_beyond(row_bytes, dtype, kind):
    for n_classes in (row_bytes // dtype.itemsize, row_bytes // dtype.itemsize + 1):
        x = make_values((5, n_classes), dtype)
        target = to_device(torch.tensor([0, 7, n_classes - 1, n_classes // 2, -100]))
        if kind == "probability":
            target = make_values((5, n_classes), torch.float64, seed=3).softmax(1).to(dtype)
        own, other = (loss_and_grad(function, x, target) for function in (cross_entropy, F.cross_entropy))
        truth = truth_of(F.cross_entropy, x, target)
        for a, b, c in zip(own, other, truth, strict=True):
            assert_no_worse(a, b, c, slack=128 if dtype == torch.float64 else 8)


def test_limit_of_shared_memory_is_set_once_a_kernel():
    """Else a thread could lower it between another's setting and launch."""
    if devices.current() != devices.SHIM_DEVICE:
        pytest.skip("the shim counts changes")
    for n_classes in (13_000, 28_000, 12_200, 20_000, 1025):
        cross_entropy(make_values((5, n_classes)).requires_grad_(), torch.arange(5))
    assert shim().fastopt_shim_changed_limits() == 0


@kinds
@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_warps_and_blocks_gives_the_same_bits(options, seed):
    if devices.current() != devices.SHIM_DEVICE:
        pytest.skip("the shim chooses the order")
    x = make_values((9, 1100))
    target = torch.arange(9) * 100 if options.kind == "index" else make_values((9, 1100), seed=1).softmax(1)
    small, few = make_values((70, 40)), make_values((2, 17_000))
    indices = torch.arange(70) % 40

    def results():
        yield loss_and_grad(cross_entropy, x, target, label_smoothing=options.smoothing)
        yield loss_and_grad(cross_entropy, small, indices, label_smoothing=options.smoothing)
        yield loss_and_grad(cross_entropy, few, indices[:2], label_smoothing=options.smoothing)
        params = make_params([(3000,), (7,), (5000,)])
        optimizer = fastopt.Adam(params, amsgrad=True, fused=True)
        for step in range(2):
            set_grads(params, seed=step)
            optimizer.step()
        yield [p.detach() for p in params]

    in_order = list(itertools.chain(*results()))
    shim().fastopt_shim_seed(ctypes.c_longlong(seed))
    try:
        shuffled = list(itertools.chain(*results()))
    finally:
        shim().fastopt_shim_seed(ctypes.c_longlong(-1))
    assert all(torch.equal(a, b) for a, b in zip(in_order, shuffled, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 7, 4096, 40_000])
def test_gradients_are_scaled_on_the_device(dtype, n):
    x = make_values((n, 3), dtype).requires_grad_()
    target = to_device(torch.arange(n) % 3)
    for factor in (1.0, 0.5, 1024.0, float("nan")):
        loss = cross_entropy(x, target)
        (grad,) = torch.autograd.grad(loss, x, tensor(factor, dtype=dtype), retain_graph=True)
        (again,) = torch.autograd.grad(loss, x, tensor(factor, dtype=dtype))
        (truth,) = torch.autograd.grad(
            F.cross_entropy(wide := x.detach().double().requires_grad_(), target), wide, tensor(factor).double()
        )
        assert torch.equal(grad.nan_to_num(), again.nan_to_num())
        assert grad.dtype == dtype
        assert error(grad, truth) <= 8 * torch.finfo(dtype).eps * max(1.0, tensor(factor).nan_to_num().item())


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_a_failed_launch_is_reported_with_what_and_where():
    if devices.current() != devices.SHIM_DEVICE:
        pytest.skip("the shim fails on demand")
    out_of_memory = 2
    x, target = make_values((6, 10)), torch.arange(6)
    shim().fastopt_shim_fail_next(out_of_memory)
    with pytest.raises(RuntimeError, match=r"cross-entropy of 6 positions and 10 classes on cpu: CUDA error 2"):
        cross_entropy(x, target)
    assert cross_entropy(x, target).isfinite(), "the next call is not blamed"
    params = make_params([(3,), (4,)])
    optimizer = fastopt.SGD(params, lr=0.1)
    set_grads(params, seed=0)
    before = [p.clone() for p in params]
    shim().fastopt_shim_fail_next(out_of_memory)
    with pytest.raises(RuntimeError, match=r"updating 2 tensors of 7 elements on cpu: CUDA error 2"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


class Library(ctypes.Structure):
    """The head of what the library exports, as csrc/cuda/library.h has it."""

    _fields_ = (
        ("interface_version", ctypes.c_int32),
        ("is_host_shim", ctypes.c_bool),
        ("architectures", ctypes.c_char_p),
        ("error_text", ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_int)),
        ("probe", ctypes.CFUNCTYPE(ctypes.c_int)),
    )


@pytest.mark.parametrize(("driver", "works"), [(12000, False), (12009, False), (12010, True), (13000, True)])
def test_driver_too_old_for_the_kernels_is_named(monkeypatch, driver, works):
    if devices.current() != devices.SHIM_DEVICE:
        pytest.skip("the shim has any driver")
    function = shim().fastopt_cuda_library
    function.restype = ctypes.POINTER(Library)
    library = function().contents
    assert library.is_host_shim
    monkeypatch.setenv("FASTOPT_SHIM_DRIVER", str(driver))
    error = library.probe()
    assert (error == 0) == works
    if not works:
        assert b"the driver is older than CUDA 12.1" in library.error_text(error)


def test_library_that_is_no_shim_is_refused(tmp_path):
    if devices.current() != devices.SHIM_DEVICE:
        pytest.skip("the shim's own")
    module = fastopt._build.native.module()
    with pytest.raises(RuntimeError, match="cannot be opened"):
        module.load_host_shim(str(tmp_path / "missing.so"))
    with pytest.raises(RuntimeError, match="runs on the CPU, for tests"):
        module.load_cuda(str(devices.shim_library()))
