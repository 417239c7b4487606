"""Cross-entropy in every mode torch runs in: autograd of any order, functorch, compilers, AMP, modules, threads."""

import copy
import os
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

import fastopt
from common import kernel_calls
from loss_cases import KINDS, Logits, Options, loss_and_grad, make_values

cross_entropy = fastopt.functional.cross_entropy
SHAPES = [
    Logits((5,), "contiguous", "no batch"),
    Logits((3, 4), "contiguous", "narrow rows"),
    Logits((2, 67), "contiguous", "wide rows"),
    Logits((2, 3, 2, 2), "contiguous", "columns"),
    Logits((2, 3, 2, 2), "channels_last", "rows of an image"),
]
OPTIONS = [Options(k.kind, k.has_weight, k.smoothing, k.ignored, r) for k in KINDS for r in ("mean", "none")]
shapes = pytest.mark.parametrize("logits", SHAPES, ids=str)
options_table = pytest.mark.parametrize("options", OPTIONS, ids=str)


def make_case(logits, options, dtype=torch.float64):
    target, arguments = options.make(logits, dtype)
    return logits.lay(make_values(logits.sizes, dtype, scale=1.0)), target, arguments


def both(call):
    """The results of a call with torch's function and with ours."""
    return call(F.cross_entropy), call(cross_entropy)


def assert_both_same(call):
    theirs, ours = both(call)
    torch.testing.assert_close(ours, theirs)


X = make_values((6, 10), scale=1.0)
T = torch.tensor([0, 9, 3, -100, 5, 5])


# --- Derivatives ------------------------------------------------------------------------------------------------------


@shapes
@options_table
def test_gradients_and_second_gradients_pass_torchs_check(logits, options):
    x, target, arguments = make_case(logits, options)
    x = x.detach().requires_grad_()

    def loss(x):
        return cross_entropy(x, target, **arguments)

    assert torch.autograd.gradcheck(loss, x, fast_mode=logits.n_classes > 10)
    assert torch.autograd.gradgradcheck(loss, x, fast_mode=logits.n_classes > 10)


@shapes
@options_table
def test_derivatives_of_derivatives_are_torchs(logits, options):
    values, target, arguments = make_case(logits, options)

    def second(function):
        x = values.detach().requires_grad_()
        (grad,) = torch.autograd.grad(function(x, target, **arguments).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(grad.pow(3).sum(), x, create_graph=True)
        return grad, second, torch.autograd.grad(second.sum(), x)[0]

    assert_both_same(second)


@shapes
@options_table
def test_functorch_gives_what_torch_gives(logits, options):
    x, target, arguments = make_case(logits, options)
    tangent = make_values(logits.sizes, torch.float64, seed=9)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,)),
        lambda f: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
        lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).sum()))(torch.stack([x, 2 * x])),
        lambda f: torch.func.jacrev(f)(x),
        lambda f: torch.func.jacfwd(f)(x),
        lambda f: torch.func.hessian(lambda x: f(x).sum())(x),
    ):
        assert_both_same(lambda function, of=transform: of(lambda x: function(x, target, **arguments)))


def test_gradients_may_be_batched():
    def jacobian(function):
        return torch.autograd.functional.jacobian(lambda x: function(x, T, reduction="none"), X, vectorize=True)

    assert_both_same(jacobian)


def test_each_sample_has_its_gradient():
    weight = make_values((10, 4))

    def per_sample(function):
        def loss(weight, x, t):
            return function(weight @ x, t)

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, make_values((6, 4)), T.clamp_min(0))

    assert_both_same(per_sample)


def test_forward_mode_duals_give_torchs_tangents():
    def tangent(function):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X) * X)
            return torch.autograd.forward_ad.unpack_dual(function(dual, T)).tangent

    assert_both_same(tangent)


# --- The graph --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_retained_graph_gives_the_same_again(dtype, factor):
    x = X.to(dtype, copy=True).requires_grad_()
    loss = cross_entropy(x, T)
    loss.backward(torch.tensor(factor, dtype=dtype), retain_graph=True)
    first = x.grad.clone()
    held, x.grad = x.grad, None
    loss.backward(torch.tensor(factor, dtype=dtype), retain_graph=True)
    assert torch.equal(x.grad, first)
    x.grad.zero_()
    held.fill_(7.0)
    x.grad = None
    loss.backward(torch.tensor(factor, dtype=dtype))
    assert torch.equal(x.grad, first)


def test_a_returned_gradient_may_be_overwritten():
    x = X.clone().requires_grad_()
    loss = cross_entropy(x, T)
    (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = grad.clone()
    grad.zero_()
    assert torch.equal(torch.autograd.grad(loss, x)[0], expected)


def test_a_second_backward_raises_what_torch_raises():
    def message(function):
        loss = function(X.clone().requires_grad_(), T)
        loss.backward()
        with pytest.raises(RuntimeError) as error:
            loss.backward()
        return str(error.value)

    theirs, ours = both(message)
    assert ours == theirs


def test_gradients_add_up():
    def accumulated(function):
        x = X.clone().requires_grad_()
        x.grad = torch.ones_like(x)
        function(x, T).backward()
        (function(x * 2, T) + function(x * x, T, reduction="sum")).backward()
        return x.grad

    assert_both_same(accumulated)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_may_be_overwritten_before_backward(reduction):
    def overwritten(function):
        leaf = X.clone().requires_grad_()
        x = leaf * 1
        loss = function(x, T, reduction=reduction).sum()
        x.detach().fill_(3.0)
        with torch.no_grad():
            x.zero_()
        return torch.autograd.grad(loss, leaf)[0]

    assert_both_same(overwritten)


@pytest.mark.native
def test_overwritten_logits_have_no_second_derivative():
    leaf = X.clone().requires_grad_()
    x = leaf * 1
    loss = cross_entropy(x, T)
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_no_graph_is_kept_where_none_is_wanted():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        assert not cross_entropy(x, T).requires_grad
    with torch.inference_mode():
        assert cross_entropy(x, T).is_inference()
    assert not cross_entropy(x.detach(), T).requires_grad
    loss = cross_entropy(x, T)
    assert loss.requires_grad
    assert not loss.is_leaf
    assert not loss.detach().requires_grad
    inference = torch.inference_mode()(X.clone)()
    torch.testing.assert_close(cross_entropy(inference, T), F.cross_entropy(X, T))


def test_hooks_anomaly_mode_and_saved_tensor_hooks_work():
    def hooked(function):
        seen = []
        leaf = X.clone().requires_grad_()
        x = leaf * 2
        x.retain_grad()
        x.register_hook(lambda grad: seen.append(grad.clone()) or grad * 3)
        pack, unpack = (lambda t: t.clone().numpy()), torch.from_numpy
        with torch.autograd.detect_anomaly(check_nan=True), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = function(x, T)
            loss.register_hook(lambda grad: grad * 0.5)
            loss.backward()
        return leaf.grad, x.grad, *seen

    with pytest.warns(UserWarning, match="Anomaly"):
        assert_both_same(hooked)


def test_checkpointing_recomputes_the_loss():
    def checkpointed(function):
        x = X.clone().requires_grad_()
        loss = torch.utils.checkpoint.checkpoint(lambda x: function(x * 2, T), x, use_reentrant=False)
        return torch.autograd.grad(loss, x)[0]

    assert_both_same(checkpointed)


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


def test_a_tensor_subclass_sees_the_function():
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(function)
            return super().__torch_function__(function, types, args, kwargs)

    loss = cross_entropy(X.as_subclass(Tagged), T)
    assert cross_entropy in seen
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


def test_threads_do_not_disturb_each_other():
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
