"""Whole training steps in every mode torch runs them in: compiled, exported, checkpointed, watched, transformed."""

import functools
import io

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fastopt
from common import attempt, is_native, kernel_calls
from optim_helpers import assert_same, seen
from optimizers import IN_TORCH, OURS, THEIRS

cross_entropy = fastopt.functional.cross_entropy
configurations = pytest.mark.parametrize(("name", "options"), IN_TORCH, ids=str)
X = torch.linspace(-2, 2, 60).reshape(6, 10).sin()
T = torch.tensor([0, 9, 3, -100, 5, 5])


class Model(torch.nn.Module):
    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(10, 10)
        self.loss = loss

    def forward(self, x, t):
        return self.loss(self.layer(x).tanh(), t)


def gradients(run, loss):
    """Of a model with this loss, after run(model) has called backward."""
    model = Model(loss)
    run(model)
    return [p.grad for p in model.parameters()]


def assert_gradients_are_torchs(run, **options):
    assert_same(gradients(run, fastopt.CrossEntropyLoss(**options)), gradients(run, torch.nn.CrossEntropyLoss()))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- Compiled ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), IN_TORCH[1::2], ids=str)  # each takes seconds
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_training_step_trains_as_torchs_in_eager(name, options, backend):
    """Of batches whose length changes, for which torch compiles anew, with a length that varies."""

    def train(module, loss, compiles):
        model = Model(loss)
        optimizer = getattr(module, name)(model.parameters(), **options)

        def step(x, t):
            optimizer.zero_grad()
            value = model(x, t)
            value.backward()
            optimizer.step()
            return value

        if compiles:
            step = torch.compile(step, backend=backend)
        return [step(X[:n], T[:n]).detach() for n in (6, 5, 4)], seen(list(model.parameters()), optimizer)

    found = train(fastopt, fastopt.CrossEntropyLoss(), compiles=True)
    losses, (params, state_dict) = train(THEIRS, torch.nn.CrossEntropyLoss(), compiles=False)
    assert_same(found[0], losses)
    for p, q in zip(found[1][0], params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert list(found[1][1]["state"]) == list(state_dict["state"])


def test_shapes_that_vary_are_compiled_once():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(Model(fastopt.CrossEntropyLoss()), backend=backend, fullgraph=True, dynamic=True)
    for n in (3, 4, 5, 6):
        torch.testing.assert_close(compiled(X[:n], T[:n]), Model(torch.nn.CrossEntropyLoss())(X[:n], T[:n]))
    assert len(graphs) == 1


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_compiled_autograd_gives_torchs_gradients(is_compiled, inplace_backward):
    def run(model):
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if is_compiled else model
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
            forward(X, T).backward()

    assert_gradients_are_torchs(run, inplace_backward=inplace_backward)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("is_training_graph", [False, True])
def test_an_exported_model_is_saved_loaded_and_trained(strict, is_training_graph):
    batch = torch.export.Dim("batch", min=2)
    model = Model(fastopt.CrossEntropyLoss())
    exported = torch.export.export(model, (X, T), dynamic_shapes=({0: batch}, {0: batch}), strict=strict)
    if not is_training_graph:
        exported = exported.run_decompositions()
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        loaded = program.module()
        for n in (6, 3):
            torch.testing.assert_close(loaded(X[:n], T[:n]), model(X[:n], T[:n]))
        loaded(X, T).backward()
        assert_same([p.grad for p in loaded.parameters()], gradients(lambda m: m(X, T).backward(), F.cross_entropy))


# --- Checkpointed and transformed -------------------------------------------------------------------------------------


def keep_products_only(_, operator, *args, **kwargs):
    is_product = operator in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
    return CheckpointPolicy.MUST_SAVE if is_product else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": dict(use_reentrant=True),
    "not reentrant": dict(use_reentrant=False),
    "selective": dict(
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, keep_products_only),
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_give_torchs_gradients(kind):
    x = X.clone().requires_grad_()
    assert_gradients_are_torchs(lambda model: checkpoint(model, x, T, **CHECKPOINTS[kind]).backward())


def test_tensors_saved_for_backward_may_be_kept_elsewhere():
    def run(model):
        with torch.autograd.graph.save_on_cpu(), torch.autograd.graph.allow_mutation_on_saved_tensors():
            loss = model(X, T)
            loss.backward()

    assert_gradients_are_torchs(run)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.vmap(f, in_dims=1), torch.func.jacrev])
@configurations
def test_a_step_within_a_transform_raises_what_torch_raises(name, options, transform):
    results = []
    for module in (OURS, THEIRS):
        param = torch.ones(3, requires_grad=True)
        param.grad = torch.ones(3)
        optimizer = getattr(module, name)([param], **options)
        optimizer.step()

        def stepping(w, optimizer=optimizer):
            optimizer.step()
            return w.sum()

        found = attempt(lambda f=stepping: transform(f)(torch.ones(3, 2)))
        results.append((found, param.detach().clone()))
    assert_same(*results)


# --- Watched ----------------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_loss_and_its_gradient():
    with Watch() as forward:
        loss = Model(fastopt.CrossEntropyLoss())(X, T)
    with Watch() as backward:
        loss.backward()
    if is_native():
        assert "fastopt::cross_entropy_keep" in forward.names
        assert "fastopt::cross_entropy_take" in backward.names
    else:
        assert "aten::nll_loss_forward" in forward.names
        assert "aten::nll_loss_backward" in backward.names


@pytest.mark.parametrize("mode", [Watch, lambda: FlopCounterMode(display=False)])
def test_dispatch_mode_around_forward_or_backward_changes_nothing(mode):
    def both(model):
        with mode():
            model(X, T).backward()

    def only_backward(model):
        loss = model(X, T)
        with mode():
            loss.backward()

    def only_forward(model):
        with mode():
            loss = model(X, T)
        loss.backward()

    for run in (both, only_backward, only_forward):
        assert_gradients_are_torchs(run)


@configurations
def test_a_dispatch_mode_sees_a_step_and_a_graph_of_it_can_be_made(name, options):
    for implementation in (None, False):
        param = torch.ones(4, requires_grad=True)
        optimizer = getattr(fastopt, name)([param], **options, foreach=implementation)
        for _ in range(2):
            param.grad = torch.ones(4)
            with Watch() as watch:
                optimizer.step()
            assert any(n.startswith(("aten::add_", "aten::addcdiv_", "aten::_foreach_add")) for n in watch.names)

    def stepped(module, param, grad):
        param = param.clone().requires_grad_()
        param.grad = grad
        getattr(module, name)([param], **options).step()
        return param.detach()

    arguments = torch.ones(4), torch.ones(4)
    graph = make_fx(lambda p, g: stepped(fastopt, p, g))(*arguments)
    other = torch.arange(4.0), torch.arange(4.0) - 2
    torch.testing.assert_close(graph(*other), stepped(THEIRS, *other))


@configurations
def test_fake_tensor_mode_refuses_real_parameters_as_with_torch(name, options):
    results = []
    for module in (OURS, THEIRS):
        param = torch.ones(3, requires_grad=True)
        param.grad = torch.ones(3)
        optimizer = getattr(module, name)([param], **options)
        optimizer.step()
        with FakeTensorMode():
            found = attempt(optimizer.step)
        results.append((found, param.detach().clone()))
    assert results[0][0] is not None
    assert_same(*results)


def test_the_profiler_sees_the_loss_and_its_backward():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Model(fastopt.CrossEntropyLoss())(X, T).backward()
    names = {event.key for event in profile.key_averages()}
    if is_native():
        assert {"fastopt::cross_entropy", "CrossEntropyBackward"} <= names
    else:
        assert {"aten::cross_entropy_loss", "NllLossBackward0"} <= names


# --- A default device -------------------------------------------------------------------------------------------------


@pytest.mark.native
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_default_device_keeps_the_kernels(place):
    """It concerns new tensors only."""
    optimizers = []
    for name, options in IN_TORCH:
        param = torch.nn.Parameter(X.clone())
        param.grad = X.clone()
        optimizers.append(getattr(fastopt, name)([param], **options))
        optimizers[-1].step()  # makes its states
    losses, steps = kernel_calls("cross_entropy"), kernel_calls("update")
    with torch.device(place):
        loss = cross_entropy(X.clone().requires_grad_(), T)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert loss.device == X.device
    assert kernel_calls("cross_entropy") == losses + 1
    assert kernel_calls("update") == steps + len(optimizers)
