"""Cross-entropy in programs: AMP, scripts, compilers, modules, processes, threads, memory."""

import copy
import os
import pickle
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F

import fastopt
from common import kernel_calls, threads
from loss_cases import KINDS, Logits, loss_and_grad, make_values
from loss_helpers import SHAPES, T, X, assert_both_same, cross_entropy, make_case, options_table

# --- AMP, scripts, compilers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_and_values_of_torch(dtype):
    layer = torch.nn.Linear(10, 10)

    def autocast(function):
        x = X.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            losses = function(layer(x), T, reduction="none"), function(x, T), function(layer(x), T, torch.ones(10))
        return *losses, torch.autograd.grad(sum(loss.sum() for loss in losses), x)[0]

    assert_both_same(autocast)


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.layer = torch.nn.Linear(10, 10)
        self.loss = loss

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.loss(self.layer(x), t)


def make_model(weight=True):
    torch.manual_seed(0)
    return Model(fastopt.CrossEntropyLoss(torch.linspace(1, 2, 10) if weight else None, label_smoothing=0.1))


def assert_same_training(model, other, calls=None):
    """Loss and gradients of two models; the kernel runs in the second if calls is given."""
    results = []
    for each in (model, other):
        each.zero_grad()
        before = kernel_calls("cross_entropy")
        loss = each(X, T)
        loss.backward()
        ran = kernel_calls("cross_entropy") > before
        results.append([loss.detach(), *(p.grad.clone() for p in each.parameters())])
    torch.testing.assert_close(results[1], results[0])
    return ran


def test_a_scripted_model_is_saved_loaded_and_trained(tmp_path):
    model = make_model()
    scripted = torch.jit.script(model)
    scripted.save(str(tmp_path / "model.pt"))
    runs_kernel = fastopt.info()["backend"] != "reference"
    for other in (scripted, torch.jit.load(str(tmp_path / "model.pt"))):
        for _ in range(3):  # the profiling executor rewrites the graph
            assert assert_same_training(model, other) == runs_kernel


def test_a_traced_model_is_saved_loaded_and_trained(tmp_path):
    model = make_model()
    traced = torch.jit.trace(model, (X, T))
    traced.save(str(tmp_path / "model.pt"))
    for other in (traced, torch.jit.load(str(tmp_path / "model.pt"))):
        for _ in range(3):
            assert_same_training(model, other)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compilation_breaks_no_graph(backend, dynamic):
    model = make_model()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    assert_same_training(model, compiled)
    torch.compiler.reset()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_compiled_function_gives_torchs_gradients(reduction, smoothing):
    compiled = torch.compile(cross_entropy, fullgraph=True, backend="aot_eager")
    probabilities = make_values((6, 10), seed=4).softmax(1)
    for target in (T, probabilities):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        theirs = loss_and_grad(F.cross_entropy, X, target, **options)
        torch.testing.assert_close(loss_and_grad(compiled, X, target, **options), theirs)
    torch.compiler.reset()


def test_an_exported_model_gives_the_loss():
    model = make_model()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (X, T), dynamic_shapes=({0: batch}, {0: batch}))
    torch.testing.assert_close(exported.module()(X[:4], T[:4]), model(X[:4], T[:4]))


@pytest.mark.slow
@options_table
def test_operators_pass_torchs_checks(options):
    for logits in SHAPES[:4]:
        x, target, arguments = make_case(logits, options, torch.float32)
        reduction = ("none", "mean").index(options.reduction)
        args = (x, target, arguments["weight"], reduction, arguments["ignore_index"], arguments["label_smoothing"])
        torch.library.opcheck(torch.ops.fastopt.cross_entropy, (x.detach().requires_grad_(), *args[1:]))
        for wants_grad in (False, True):
            torch.library.opcheck(torch.ops.fastopt.cross_entropy_forward, (*args, wants_grad))
        loss, grad = torch.ops.fastopt.cross_entropy_forward(*args, True)
        torch.library.opcheck(torch.ops.fastopt.cross_entropy_backward, (torch.rand_like(loss), grad, x))


# --- The module -------------------------------------------------------------------------------------------------------


def test_the_module_is_torchs_module():
    weight = torch.rand(10)
    ours = fastopt.CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    theirs = torch.nn.CrossEntropyLoss(weight, ignore_index=3, reduction="sum", label_smoothing=0.1)
    assert isinstance(ours, torch.nn.CrossEntropyLoss)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    theirs.load_state_dict(ours.state_dict())
    target = T.clamp_min(0)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(module(X, target), theirs(X, target))
    double = ours.to(torch.float64)
    assert double.weight.dtype == torch.float64
    torch.testing.assert_close(double(X.double(), target), theirs.to(torch.float64)(X.double(), target))
    meta = fastopt.CrossEntropyLoss(weight).to("meta")
    assert meta(X.to("meta"), T.to("meta")).is_meta


@pytest.mark.filterwarnings("ignore")
def test_legacy_arguments_of_the_module_mean_what_they_mean_in_torch():
    for arguments in ({"size_average": False}, {"reduce": False}, {"size_average": True}):
        ours, theirs = fastopt.CrossEntropyLoss(**arguments), torch.nn.CrossEntropyLoss(**arguments)
        torch.testing.assert_close(ours(X, T), theirs(X, T))


def test_a_tensor_subclass_sees_torchs_function():
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    loss = cross_entropy(X.as_subclass(Tagged), T)
    assert F.cross_entropy in seen  # the one that subclasses know
    assert isinstance(loss, Tagged)
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), F.cross_entropy(X, T))


# --- Processes, threads, memory ---------------------------------------------------------------------------------------


def in_child(work):
    """Runs work() in a forked process; its result, a float, comes back."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # OpenMP's pool does not survive a fork
            os.write(write, repr(float(work())).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        result = pipe.read()
    os.waitpid(child, 0)
    return float(result)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@needs_fork
def test_a_forked_process_computes_the_same():
    x, target = make_values((500, 100)), torch.arange(500) % 100
    expected = loss_and_grad(cross_entropy, x, target)
    found = in_child(lambda: loss_and_grad(cross_entropy, x, target)[1].double().norm())
    assert found == pytest.approx(expected[1].double().norm().item(), rel=1e-6)


def large_allocations(function, x, target):
    """Allocations in forward and backward that could hold the logits, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(x, target).backward()
    events = profile.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() >= 4 * x.numel() for event in events)


@pytest.mark.native
def test_the_gradient_is_the_only_array_of_the_size_of_the_logits():
    values, target = make_values((512, 8000)), torch.arange(512)
    assert large_allocations(F.cross_entropy, values.clone().requires_grad_(), target) > 1
    assert large_allocations(cross_entropy, values.clone().requires_grad_(), target) <= 1


def test_losses_in_several_threads_are_independent():
    cases = [make_case(Logits((64 + i, 10 * (i + 1)), "contiguous", ""), KINDS[i % 5]) for i in range(8)]
    expected = [loss_and_grad(cross_entropy, x, target, **arguments) for x, target, arguments in cases]
    failures = []

    def work(i):
        x, target, arguments = cases[i]
        for _ in range(50):
            for own, other in zip(loss_and_grad(cross_entropy, x, target, **arguments), expected[i], strict=True):
                if not torch.allclose(own, other, rtol=1e-12, atol=1e-15):
                    failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.timed
@pytest.mark.native
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_large_loss_releases_the_interpreter_lock(inplace_backward):
    x, target = torch.zeros(400, 20_000, requires_grad=True), torch.zeros(400, dtype=torch.long)
    cross_entropy(x * 1, target)  # so that the library is loaded
    times, is_done = [], threading.Event()

    def note_the_time():
        while not is_done.is_set():
            times.append(time.perf_counter())
            time.sleep(1e-4)

    switch_interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # so that no other thread runs unless the loss releases the lock
    worker = threading.Thread(target=note_the_time)
    worker.start()
    try:
        most_inside = 0
        for _ in range(50):  # on a machine that is busy with something else the other thread may have to wait
            logits = x * 1
            time.sleep(1e-3)
            begin = time.perf_counter()
            with threads(1):
                cross_entropy(logits, target, inplace_backward=inplace_backward)
            end = time.perf_counter()
            most_inside = max(most_inside, sum(begin < moment < end for moment in times))
            if most_inside > 2:
                break
    finally:
        sys.setswitchinterval(switch_interval)
        is_done.set()
        worker.join()
    assert most_inside > 2  # at most one where the interpreter is kept
