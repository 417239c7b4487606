"""Optimizers in every mode torch runs them in: hooks, closures, scalers, schedules, compilers, processes."""

import multiprocessing
import warnings

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import devices
import fastopt
from common import error, is_native
from optim_cases import OPTIM_CASES, make_params, set_grads
from optimizers import NAMES, OPTIMIZERS

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

ids = [str(case) for case in OPTIM_CASES]
all_cases = pytest.mark.parametrize("case", OPTIM_CASES, ids=ids)
all_classes = pytest.mark.parametrize("name", NAMES)


def one_param(name, value=1.0, n=4, **options):
    param = torch.nn.Parameter(torch.full((n,), value))
    param.grad = torch.ones(n)
    return param, getattr(fastopt, name)([param], **options)


@all_classes
def test_step_hooks_run_once_each_in_torchs_order(name):
    calls = []
    param, optimizer = one_param(name)
    handles = [
        register_optimizer_step_pre_hook(lambda *a: calls.append("global pre")),
        optimizer.register_step_pre_hook(lambda *a: calls.append("pre")),
        optimizer.register_step_post_hook(lambda *a: calls.append("post")),
        register_optimizer_step_post_hook(lambda *a: calls.append("global post")),
    ]
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert calls == ["global pre", "pre", "post", "global post"]


def test_a_pre_hook_may_replace_the_closure():
    param, optimizer = one_param("SGD", lr=0.5)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: torch.tensor(5.0)), kwargs))
    assert optimizer.step() == 5.0


def test_hooks_run_once_in_a_subclass_whose_step_calls_super():
    class Counting(fastopt.Adam):
        def step(self, closure=None):
            return super().step(closure)

    param = torch.nn.Parameter(torch.ones(2))
    param.grad = torch.ones(2)
    optimizer, calls = Counting([param]), []
    optimizer.register_step_pre_hook(lambda *a: calls.append(1))
    optimizer.step()
    assert calls == [1]


@all_classes
def test_closures_return_the_loss_and_run_with_gradients(name):
    param, optimizer = one_param(name)

    def closure():
        optimizer.zero_grad()
        loss = (param * param).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 4.0
    assert not torch.equal(param, torch.ones(4))


@all_classes
def test_the_profiler_sees_step_and_zero_grad(name):
    param, optimizer = one_param(name)
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    keys = {event.key for event in profile.key_averages()}
    assert keys >= {f"Optimizer.step#{name}.step", f"Optimizer.zero_grad#{name}.zero_grad"}
    assert param.grad is None


@all_classes
def test_without_a_profiler_no_range_is_opened(name, monkeypatch):
    param, optimizer = one_param(name)
    monkeypatch.setattr(torch.autograd.profiler, "record_function", lambda *_: pytest.fail("a range was opened"))
    optimizer.step()
    optimizer.zero_grad()
    assert param.grad is None


SCHEDULES = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=8, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
]


@all_cases
def test_schedules_run_as_with_torch_and_without_warning(case):
    for make in SCHEDULES:
        results = []
        for cls in (case.ours, case.theirs):
            params = make_params([(9,)], torch.float64)
            optimizer = cls(params, **case.options)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                schedule = make(optimizer)
                for step in range(6):
                    set_grads(params, seed=step)
                    optimizer.step()
                    schedule.step()
            results.append(params[0])
        assert error(*results) <= 1e-12


@pytest.mark.parametrize("overflow_at", [0, 1, 3])
@pytest.mark.parametrize("fused", [None, True])
@all_cases
def test_scaler_skips_overflowing_steps_without_making_states(case, fused, overflow_at):
    if fused and not case.row.has("fused"):
        pytest.skip("torch has no such argument")
    options = {**case.options, "fused": True} if fused else case.options
    results = []
    for cls, opts in ((case.ours, options), (case.theirs, case.options)):
        params = make_params([(9,), (4,)], torch.float32)
        optimizer = cls(params, **opts)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
        for step in range(5):
            optimizer.zero_grad()
            factor = float("inf") if step == overflow_at else 1.0 + step
            scaler.scale(sum((p * p).sum() for p in params) * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            if step == overflow_at == 0:
                assert all(not state or state["step"] == 0 for state in map(optimizer.state.get, params) if state)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert error(p, q) <= 1e-5


def test_found_inf_summed_over_devices_skips_the_step():
    param, optimizer = one_param("Adam", fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(2.0)
    optimizer.step()
    assert torch.equal(param, torch.ones(4))
    if devices.is_gpu():  # the kernel skips the step, and torch makes the states before it
        assert optimizer.state[param]["step"] == 0
    else:
        assert not optimizer.state


@all_classes
def test_torch_compile_of_a_step_gives_the_same(name):
    results = []
    for compiled in (False, True):
        params = make_params([(6,), (3, 2)], torch.float64)
        optimizer = getattr(fastopt, name)(params, lr=0.1)
        step = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for seed in range(3):
            set_grads(params, seed=seed)
            step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert error(p, q) <= 1e-5  # torch's compiled step corrects the bias in float32


SCALARS = ("state_steps", "mu_products")


def of_operator(options):
    return {name: value for name, value in options.items() if name != "initial_accumulator_value"}


OPERATOR_CALLS = [  # operator, states, options
    *((row.operator, row.states(options), of_operator(options)) for row in OPTIMIZERS for options in row.typical),
    ("sgd_", [], dict(lr=0.1, weight_decay=0.1, maximize=True)),
    ("sgd_", ["momentum_buffer"], dict(lr=0.1, momentum=0.9, is_first_step=True)),
    ("adam_", ["exp_avg", "exp_avg_sq"], dict(lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "states", "options"), OPERATOR_CALLS, ids=str)
def test_operators_pass_opcheck(name, states, options, dtype):
    operator = getattr(torch.ops.fastopt, name).default
    lists = [argument.name for argument in operator._schema.arguments if not argument.kwarg_only]
    args = [
        [
            torch.tensor(0.5) if what in ("state_steps", "mu_products") else torch.rand(5, 2, dtype=dtype)
            for _ in range(2)
        ]
        if what in ("params", "grads", "state_steps") or what.removesuffix("s").removeprefix("state_") in states
        else []
        for what in lists
    ]
    torch.library.opcheck(operator, args, options)


@pytest.mark.native
def test_operators_refuse_mismatched_tensors_and_change_nothing():
    p, g = torch.ones(4), torch.ones(4)
    for args, message in [
        (([p], [], []), "grads must have one tensor"),
        (([p], [torch.ones(5)], []), "shape is not its parameter's"),
        (([p], [g.double()], []), "dtype is not its parameter's"),
        (([p, p], [g, g], []), "share memory"),
    ]:
        with pytest.raises((RuntimeError, ValueError), match=message):
            torch.ops.fastopt.sgd_(*args, lr=0.1)
        assert torch.equal(p, torch.ones(4))


def _train_in_child(connection):
    params = make_params([(20_000,), (7,)])
    optimizer = fastopt.Adam(params)
    for step in range(3):
        set_grads(params, seed=step)
        optimizer.step()
    connection.send([p.detach().double().sum().item() for p in params])


@pytest.mark.native
def test_training_works_after_fork():
    """The child has a copy of a running thread pool, but not its threads. Sizes are such that only we go parallel."""
    params = make_params([(20_000,), (7,)])
    optimizer = fastopt.Adam(params)
    for step in range(3):
        set_grads(params, seed=step)
        optimizer.step()
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_train_in_child, args=(theirs,))
    child.start()
    assert ours.poll(60), "the child hangs"
    assert ours.recv() == [p.detach().double().sum().item() for p in params]
    child.join()


@pytest.mark.slow
def test_steps_leak_no_memory():
    import resource

    params = make_params([(64,), (8, 8)])
    optimizer = fastopt.Adam(params)
    set_grads(params, seed=0)
    n_steps = 50_000 if is_native() else 2_000
    for _ in range(n_steps):
        optimizer.step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(4 * n_steps):
        optimizer.step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2_000  # KiB
