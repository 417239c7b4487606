"""Behaviour that needs a GPU: captured graphs, streams, scalers, autocast, compilers, large arrays, waiting, memory."""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import fastopt
import loss_cases
import optim_cases
from common import DTYPES, error, kernel_calls
from optimizers import BY_NAME, CONFIGURATIONS, OURS, THEIRS

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = [pytest.mark.cuda, pytest.mark.native, needs_gpu]

DEVICE = "cuda"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
FUSED = [(name, {**options, "fused": True}) for name, options in CONFIGURATIONS if BY_NAME[name].has("fused")]
cross_entropy = fastopt.functional.cross_entropy
on_gpu = torch.utils._device.set_device(DEVICE)  # a decorator
make_params, make_values = map(on_gpu, (optim_cases.make_params, loss_cases.make_values))
optimizers = pytest.mark.parametrize(("name", "options"), CONFIGURATIONS, ids=str)


@contextlib.contextmanager
def kernels_run(times=None):
    """CUDA kernels are called so often, or at least once, in the block."""
    before = kernel_calls("cuda")
    yield
    assert kernel_calls("cuda") > before if times is None else kernel_calls("cuda") == before + times


@contextlib.contextmanager
def on(stream):
    """The block runs on a stream, after what came before it and before what comes after it."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def capture(step, n_warm):
    """A graph of a step, captured after some steps on a side stream; and what the step returned."""
    with on(torch.cuda.Stream()):
        for _ in range(n_warm):
            step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, step()


def make_target(n_rows, n_classes):
    return torch.arange(n_rows, device=DEVICE) * 7919 % n_classes


def make_both(name, options, shapes=((64, 64), (64,), (10, 64), (3,))):
    """Parameters and an optimizer of fastopt, and the same of torch."""
    both = [(make_params(shapes), getattr(library, name)) for library in (OURS, THEIRS)]
    return [(params, cls(params, **options)) for params, cls in both]


def assert_near(found, truth, tolerance=1e-5):
    """Errors of tensors are small beside the largest value of the truth."""
    for value, true in zip(found, truth, strict=True):
        assert error(value, true) <= tolerance * true.detach().abs().max().item()


def check_loss(x, target, tolerance=1e-5, function=cross_entropy, logits_of=lambda x: x, **options):
    """A kernel's loss, which is returned, and gradient are near torch's in float64."""
    with kernels_run():
        own = loss_cases.loss_and_grad(lambda x, t: function(logits_of(x), t, **options), x, target)
    truth = loss_cases.truth_of(lambda x, t: F.cross_entropy(logits_of(x), t, **options), x, target)
    assert_near(own, truth, tolerance)
    return own[0]


@optimizers
@pytest.mark.parametrize("n_warm", [1, 0])  # after none, states are made in the graph: each replay is a first step
def test_a_captured_step_is_replayed(name, options, n_warm):
    both = make_both(name, {**options, "capturable": True} if BY_NAME[name].has("capturable") else options)
    for (params, optimizer), times in zip(both, (n_warm + 1, 0), strict=True):
        optim_cases.set_grads(params, seed=1)
        with kernels_run(times):
            graph, _ = capture(optimizer.step, n_warm)
        for _ in range(5):
            torch._foreach_mul_([p.grad for p in params], -0.9)
            graph.replay()
    assert_near(both[0][0], both[1][0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-3), (BF16, 5e-2)], ids=str)
def test_a_captured_step_of_training_is_replayed(dtype, tolerance):
    def train(function, cls):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 100)).to(DEVICE, dtype)
        optimizer = cls(net.parameters(), lr=1e-3, capturable=True)
        x, target = make_values((128, 32), dtype, scale=1.0), make_target(128, 100)

        def step():
            optimizer.zero_grad()
            loss = function(net(x), target)
            loss.backward()
            optimizer.step()
            return loss

        graph, loss = capture(step, n_warm=3)
        for seed in range(10):
            x.copy_(make_values((128, 32), seed=seed, scale=1.0))
            target.copy_(target.roll(seed))
            graph.replay()
        return [loss.clone(), *net.parameters()]

    with kernels_run(4 * 2):
        own = train(cross_entropy, fastopt.AdamW)
    assert_near(own, train(F.cross_entropy, torch.optim.AdamW), tolerance)


def test_make_graphed_callables_takes_the_loss():
    def graphed(x, target):
        sample = torch.zeros_like(x).requires_grad_(), torch.zeros_like(target)
        return torch.cuda.make_graphed_callables(fastopt.CrossEntropyLoss(), sample)(x, target)

    check_loss(make_values((64, 50)), make_target(64, 50), function=graphed)


def test_side_streams_step_and_compute_losses_in_turn():
    (own, optimizer), (other, theirs) = make_both("Adam", dict(lr=1e-2), [(64,)] * 1000)  # their table is on the device
    x, target = make_values((512, 32_000)).requires_grad_(), make_target(512, 32_000)
    with kernels_run(30 * 2):
        for stream in [torch.cuda.Stream() for _ in range(3)] * 10:
            for p, q in zip(own, other, strict=True):
                p.grad = q.grad = torch.randn(64, device=DEVICE)
            with on(stream):
                optimizer.step()
                loss = cross_entropy(x, target)
                torch.full((2**14,), float("nan"), device=DEVICE)  # where a table was that is freed too early
            (grad,) = torch.autograd.grad(loss, x)
            theirs.step()
    assert_near(own, other, 1e-4)
    assert_near([loss, grad], loss_cases.truth_of(F.cross_entropy, x, target))


def test_host_threads_with_streams_of_their_own_are_independent():
    def work(seed):
        with torch.cuda.stream(torch.cuda.Stream()):
            for sizes in ((5, 12_200), (7, 24_500), (300, 1000), (4, 100_000), (64, 10)) * 6:
                check_loss(torch.randn(sizes, device=DEVICE), make_target(*sizes))
            both = make_both("Adam", dict(lr=1e-2), [(100_003,)])
            for (params, optimizer), step in itertools.product(both, range(20)):
                optim_cases.set_grads(params, seed + step)
                optimizer.step()
            assert_near(both[0][0], both[1][0], 1e-4)

    with kernels_run(4 * (5 * 6 + 20)), ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_of_several_devices_runs_its_own_kernels():
    for device in ("cuda:0", "cuda:1"):
        check_loss(make_values((300, 1000)).to(device), make_target(300, 1000).to(device))


@pytest.mark.parametrize(("name", "options"), CONFIGURATIONS + FUSED, ids=str)
def test_a_grad_scaler_skips_the_step_that_overflows(name, options):
    results = []
    for library in (OURS, THEIRS):
        torch.manual_seed(2)
        net = torch.nn.Linear(16, 8).to(DEVICE)
        optimizer = getattr(library, name)(net.parameters(), **options)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16, growth_interval=3)
        before = kernel_calls("cuda")
        for step in range(8):
            with torch.autocast(DEVICE, F16):
                out = net(make_values((32, 16), seed=step, scale=float("inf") if step == 3 else 1.0))
            optimizer.zero_grad()
            scaler.scale(out.float().pow(2).mean()).backward()
            if step % 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        assert (kernel_calls("cuda") > before) == (library is OURS)
        results.append([*net.parameters(), torch.tensor(scaler.get_scale())])
    assert_near(*results, 1e-3)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_autocast_makes_the_loss_float32(dtype):
    hidden, weight = make_values((256, 64), scale=1.0), make_values((32_000, 64), seed=1, scale=0.1)
    with torch.autocast(DEVICE, dtype):
        loss = check_loss(weight, make_target(256, 32_000), 2e-2, logits_of=lambda w: hidden.to(w.dtype) @ w.t())
    assert loss.dtype == F32


@pytest.mark.parametrize("options", [dict(fullgraph=True), dict(mode="reduce-overhead")], ids=str)
def test_a_compiled_program_calls_the_kernel(options):
    torch._dynamo.reset()
    x, target = make_values((512, 1000)), make_target(512, 1000)
    compiled = torch.compile(lambda a, b: cross_entropy(a * 2, b), **options)
    with kernels_run():
        for _ in range(4):
            found = loss_cases.loss_and_grad(compiled, x, target)
    assert_near(found, loss_cases.truth_of(lambda a, b: F.cross_entropy(a * 2, b), x, target))


def test_arrays_beyond_2_to_the_31_elements_are_indexed_in_64_bits():
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free memory")
    x, target = make_values((1, 32_768), BF16).expand(70_000, -1).contiguous(), make_target(70_000, 32_768)
    with kernels_run(1):
        own = loss_cases.loss_and_grad(cross_entropy, x, target, reduction="none")
    truth = loss_cases.truth_of(F.cross_entropy, x[-3:], target[-3:], reduction="none")
    assert_near([value[-3:] for value in own], truth, 1e-2)
    for cls in (fastopt.SGD, fastopt.Adam):
        param = torch.nn.Parameter(torch.ones(2**31 + 5, device=DEVICE, dtype=BF16))
        param.grad = torch.ones_like(param)
        with kernels_run(1):
            cls([param], lr=0.5).step()
        assert all((part == 0.5).all() for part in param.detach().split(2**30))


@pytest.mark.parametrize(("dtype", "tolerance"), [(F32, 1e-5), (BF16, 2e-2)], ids=str)
def test_a_slice_of_logits_has_the_gradient_of_the_whole(dtype, tolerance):
    x, lm = make_values((64, 50_304), dtype), make_values((4, 33, 1000), dtype)
    check_loss(x, make_target(64, 50_257), tolerance, logits_of=lambda x: x[:, :50_257])
    check_loss(lm, make_target(128, 1000), tolerance, logits_of=lambda x: x[:, :-1].reshape(-1, 1000))


def test_targets_out_of_range_make_their_rows_nan():
    x, target = make_values((8, 1000)), make_target(8, 1000)
    target[3], target[4] = 1000, -5
    with kernels_run(1):
        loss, grad = loss_cases.loss_and_grad(cross_entropy, x, target, reduction="none")
    assert loss.isnan().tolist() == [row in (3, 4) for row in range(8)]
    assert torch.equal(grad.isnan(), loss.isnan()[:, None].expand_as(grad))


@optimizers
def test_steps_and_losses_do_not_synchronize(name, options, request):
    x, target, params = make_values((512, 1000)).requires_grad_(), make_target(512, 1000), make_params([(64, 64)] * 600)
    optimizer = getattr(fastopt, name)(params, **options)
    optim_cases.set_grads(params, seed=0)
    request.addfinalizer(lambda: torch.cuda.set_sync_debug_mode("default"))
    for mode in ("default", "error"):  # a first step may wait
        torch.cuda.set_sync_debug_mode(mode)
        with kernels_run(3):
            cross_entropy(x, target).backward()
            (0.25 * cross_entropy(x, target)).backward()
            optimizer.step()


@pytest.mark.parametrize("scaled", [lambda loss: loss, lambda loss: 0.25 * loss], ids=["plain", "by 0.25"])
def test_a_loss_takes_the_memory_of_its_gradient_alone(scaled):
    x, target = torch.randn(4096, 32_000, device=DEVICE, dtype=BF16, requires_grad=True), make_target(4096, 32_000)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with kernels_run(1):
        scaled(cross_entropy(x, target)).backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * x.nbytes


@optimizers
@pytest.mark.parametrize("default", [contextlib.nullcontext(), torch.device(DEVICE)], ids=["none", DEVICE])
def test_states_are_exchanged_with_torch_whatever_the_default_device(name, options, default):
    with default:
        (own, optimizer), (other, theirs) = both = make_both(name, options)
        for step in range(2):
            for params, its in both:
                optim_cases.set_grads(params, seed=step)
                with kernels_run(int(its is optimizer)):
                    its.step()
            states = optimizer.state_dict(), theirs.state_dict()
            kinds = [[{k: (v.device, v.dtype) for k, v in s.items()} for s in d["state"].values()] for d in states]
            assert kinds[0] == kinds[1]
            optimizer.load_state_dict(states[1])
            theirs.load_state_dict(states[0])
        assert_near(own, other)
        check_loss(make_values((64, 1000)), make_target(64, 1000))


N_CLASSES = [*(2**k + n for k in range(5, 18) for n in (-1, 0, 1)), 777, 1500, 3001, 12_345, 24_570, 50_257, 57_000]
ROWS = [(n, dtype) for n in N_CLASSES for dtype in DTYPES if n < 5000 or dtype != F64]


@pytest.mark.parametrize(("n_classes", "dtype"), ROWS, ids=str)
def test_rows_around_the_rounds_of_a_block_are_exact(n_classes, dtype, request):
    tolerance = {F64: 4e-13, F32: 2e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    torch.manual_seed(0)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is not initialised with NaN
    for n_rows, offset, smoothing, reduction in itertools.product((3, 200), (0, 1), (0.0, 0.1), ("mean", "none")):
        flat = torch.randn(n_rows * (n_classes + offset) + offset, device=DEVICE).mul_(3).to(dtype)
        x, target = flat[offset:].view(n_rows, -1)[:, :n_classes], make_target(n_rows, n_classes)
        target[1] = -100
        check_loss(x, target, tolerance, label_smoothing=smoothing, reduction=reduction)
