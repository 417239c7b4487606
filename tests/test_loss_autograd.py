"""Hooks, repeated backwards and saved tensors of cross-entropy: what runs, how often, and with which gradient."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import devices
import fastopt
from common import is_native, kernel_calls
from loss_cases import make_values
from loss_helpers import assert_both_same, both, cross_entropy

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

# float16 gradients are kept in float32, wide rows and columns are other kernels, probabilities another problem.
PROBLEMS = {
    "indices": dict(),
    "indices, each row": dict(reduction="none"),
    "smoothed": dict(label_smoothing=0.1),
    "probabilities": dict(probabilities=True),
    "wide": dict(sizes=(2, 70)),
    "columns": dict(sizes=(2, 5, 3)),
    "weights": dict(weighted=True),
    "float16": dict(dtype=torch.float16),
}
problems = pytest.mark.parametrize("problem", PROBLEMS)
X, T = torch.linspace(-1, 1, 15).view(3, 5), torch.arange(3)


def make(sizes=(3, 5), dtype=torch.float64, probabilities=False, weighted=False, **options):
    """Logits, and the loss of a function's as a function of logits alone: one number."""
    x = make_values(sizes, dtype, scale=1.0)
    target = torch.softmax(make_values(sizes, dtype, seed=3), 1) if probabilities else x.argmin(1)
    weight = torch.linspace(0.5, 1.5, sizes[1], dtype=dtype) if weighted else None
    return x, lambda function, logits: function(logits, target, weight, **options).sum()


def assert_as_torch(call, x):
    theirs, ours = both(call)
    torch.testing.assert_close(ours, theirs, **(dict(rtol=2e-2, atol=2e-3) if x.dtype == torch.float16 else {}))


# --- Hooks ------------------------------------------------------------------------------------------------------------


def tripled(grad):
    return grad * 3


def hook_on_a_result(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 1
    y.register_hook(tripled)
    loss(function, y).backward(create_graph=True)
    return leaf.grad


def hook_on_a_leaf(function, x, loss):
    x.requires_grad_().register_hook(tripled)
    loss(function, x).backward(create_graph=True)
    return x.grad


def hook_on_a_view(function, x, loss):
    leaf = x.requires_grad_()
    y = (leaf * 2).view(x.shape)
    y.register_hook(tripled)
    loss(function, y[:]).backward(create_graph=True)
    return leaf.grad


def hook_on_the_loss(function, x, loss):
    leaf = x.requires_grad_()
    value = loss(function, leaf * 1)
    value.register_hook(tripled)
    value.backward(create_graph=True)
    return leaf.grad


def hooks_counted(function, x, loss):
    seen = []
    leaf = x.requires_grad_()
    y = leaf * 1
    y.register_hook(lambda grad: seen.append(grad.detach().clone()))
    leaf.register_hook(lambda grad: seen.append(grad.detach().clone()))
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(inputs[0].detach().clone()))
    y.grad_fn.register_prehook(lambda outputs: seen.append(outputs[0].detach().clone()))
    leaf.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.detach().clone()))
    loss(function, y).backward(create_graph=True)
    return seen


def hooks_of_the_losss_node_counted(function, x, loss):
    seen = []
    value = loss(function, x.requires_grad_() * 1)
    value.grad_fn.register_hook(lambda inputs, outputs: seen.append(len(inputs)))
    value.grad_fn.register_prehook(lambda outputs: seen.append(len(outputs)))
    value.backward(create_graph=True)
    return seen


def retained_grads(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 2
    z = y.reshape(x.shape)
    for tensor in (y, z):
        tensor.retain_grad()
    loss(function, z).backward(create_graph=True)
    return y.grad, z.grad, leaf.grad


def retained_grads_of_two_losses(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 2
    y.retain_grad()
    (loss(function, y) + loss(function, y * y)).backward(create_graph=True)
    return y.grad, leaf.grad


def multi_grad_hook(mode, function, x, loss):
    seen = []
    leaf = x.requires_grad_()
    y, z = leaf * 1, leaf * 2
    torch.autograd.graph.register_multi_grad_hook((y, z), lambda grads: seen.append(1), mode=mode)
    (loss(function, y) + loss(function, z)).backward(create_graph=True)
    return torch.tensor(len(seen)), leaf.grad


def hook_differentiates_the_loss_again(function, x, loss):
    seen = []
    leaf = x.requires_grad_()
    y = leaf * 1
    value = loss(function, y)

    def again(grad):
        if not seen:
            seen.append(None)
            seen.append(torch.autograd.grad(value, leaf, create_graph=True)[0].detach())

    y.register_hook(again)
    (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
    return grad, seen[1]


def hook_differentiates_the_plain_loss_again(function, x, loss):
    """Without create_graph; the graph is kept for the hook."""
    seen = []
    leaf = x.requires_grad_()
    y = leaf * 1
    value = loss(function, y)

    def again(grad):
        if not seen:
            seen.append(None)
            seen.append(torch.autograd.grad(value, leaf, retain_graph=True)[0])

    y.register_hook(again)
    return torch.autograd.grad(value, leaf, retain_graph=True)[0], seen[1]


def hook_on_the_loss_differentiates_it_again(function, x, loss):
    seen = []
    leaf = x.requires_grad_()
    value = loss(function, leaf)

    def again(grad):
        if not seen:
            seen.append(None)
            seen.append(torch.autograd.grad(value, leaf, create_graph=True)[0].detach())

    value.register_hook(again)
    return torch.autograd.grad(value, leaf, create_graph=True)[0], seen[1]


def hook_in_the_second_derivative(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf * 1
    y.register_hook(lambda grad: grad * 2)
    (grad,) = torch.autograd.grad(loss(function, y), leaf, create_graph=True)
    grad.register_hook(tripled)
    grad.pow(2).sum().backward(create_graph=True)
    second = leaf.grad.clone()
    return grad, second, torch.autograd.grad(second.pow(2).sum(), leaf)[0]


def triple_derivative(function, x, loss):
    derivatives = [loss(function, x.requires_grad_() * 1)]
    for _ in range(3):
        derivatives.append(torch.autograd.grad(derivatives[-1].pow(2).sum(), x, create_graph=True)[0])
    return derivatives


def gradient_penalty(function, x, loss):
    leaf = x.requires_grad_()
    y = leaf.sin()
    y.register_hook(tripled)
    value = loss(function, y)
    (grad,) = torch.autograd.grad(value, y, create_graph=True)
    (value + grad.pow(2).sum()).backward()
    return leaf.grad


def anomaly_mode(function, x, loss):
    with torch.autograd.detect_anomaly(), torch.autograd.set_multithreading_enabled(False):
        return hook_on_a_result(function, x, loss)


def two_inputs(function, x, loss):
    leaf = x.requires_grad_()
    scale = torch.ones(x.shape[1:], dtype=x.dtype, requires_grad=True)
    y = leaf * scale
    return torch.autograd.grad(loss(function, y), [leaf, y, scale], create_graph=True)


HOOKS = [
    hook_on_a_result,
    hook_on_a_leaf,
    hook_on_a_view,
    hook_on_the_loss,
    hooks_counted,
    hooks_of_the_losss_node_counted,
    retained_grads,
    retained_grads_of_two_losses,
    functools.partial(multi_grad_hook, "all"),
    functools.partial(multi_grad_hook, "any"),
    hook_differentiates_the_loss_again,
    hook_differentiates_the_plain_loss_again,
    hook_on_the_loss_differentiates_it_again,
    hook_in_the_second_derivative,
    triple_derivative,
    gradient_penalty,
    anomaly_mode,
    two_inputs,
]


def name_of(case):
    return f"{case.func.__name__}-{case.args[0]}" if isinstance(case, functools.partial) else case.__name__


@pytest.mark.filterwarnings("ignore")
@problems
@pytest.mark.parametrize("run", HOOKS, ids=name_of)
def test_hooks_run_as_often_as_in_torch_and_see_its_gradients(run, problem):
    x, loss = make(**PROBLEMS[problem])
    assert_as_torch(lambda function: run(function, x.clone(), loss), x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", HOOKS[:8], ids=name_of)
def test_hooks_on_logits_that_a_backward_may_overwrite_run_as_often(run):
    x, loss = make()
    if run is hook_on_a_leaf:
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            run(functools.partial(cross_entropy, inplace_backward=True), x.clone(), loss)
        return
    ours = run(functools.partial(cross_entropy, inplace_backward=True), x.clone(), loss)
    torch.testing.assert_close(ours, run(F.cross_entropy, x.clone(), loss))


# --- Repeated backwards -----------------------------------------------------------------------------------------------


class FailingHook:
    def __init__(self, n_failures):
        self.n_left = n_failures

    def __call__(self, *grads):
        if self.n_left > 0:
            self.n_left -= 1
            raise KeyError("in the hook")


# A node lets go of what it saved after its hooks, and before those of the next one: that needs the graph kept.
PLACES = {
    "after the loss's node": (lambda y, loss, hook: loss.grad_fn.register_hook(hook), False),
    "after the loss's node, graph kept": (lambda y, loss, hook: loss.grad_fn.register_hook(hook), True),
    "on the logits": (lambda y, loss, hook: y.register_hook(hook), True),
    "before the logits' node": (lambda y, loss, hook: y.grad_fn.register_prehook(hook), True),
    "after the logits' node": (lambda y, loss, hook: y.grad_fn.register_hook(hook), True),
}


@problems
@pytest.mark.parametrize("place", PLACES)
def test_a_backward_that_failed_in_a_later_hook_can_be_repeated(place, problem):
    x, loss = make(**PROBLEMS[problem])
    register, keeps_graph = PLACES[place]

    def repeated(function, n_failures, factor):
        leaf = x.clone().requires_grad_()
        y = leaf * 1
        values = []
        value = loss(lambda *args, **options: values.append(function(*args, **options)) or values[0], y)
        register(y, values[0], FailingHook(n_failures))
        for _ in range(n_failures):
            with pytest.raises(KeyError):
                value.backward(value.new_tensor(factor), retain_graph=keeps_graph)
            assert leaf.grad is None
        value.backward(value.new_tensor(factor), retain_graph=keeps_graph)
        return leaf.grad

    for n_failures in (1, 2):
        for factor in (1.0, 3.0):
            assert_as_torch(functools.partial(repeated, n_failures=n_failures, factor=factor), x)


def test_a_backward_that_failed_without_a_kept_graph_raises_what_torch_raises():
    def message(function):
        y = X.clone().requires_grad_() * 1
        y.register_hook(FailingHook(1))
        loss = function(y, T)
        with pytest.raises(KeyError):
            loss.backward()
        with pytest.raises(RuntimeError) as error:
            loss.backward()
        return str(error.value)

    theirs, ours = both(message)
    assert ours == theirs


def test_backwards_after_one_that_failed_keep_the_graph_again():
    """Of overwritten logits: a plain backward does not need them, whatever came before it."""

    def grads(function):
        leaf = X.clone().requires_grad_()
        y = leaf * 1
        loss = function(y, T)
        loss.grad_fn.register_hook(FailingHook(1))
        with pytest.raises(KeyError):
            loss.backward(retain_graph=True)
        y.detach().zero_()
        return [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(3)]

    assert_both_same(grads)


@pytest.mark.native
def test_a_repeated_backward_of_overwritten_logits_raises():
    """The gradient went into the backward that failed; what is left to compute it from must be what it was."""
    leaf = X.clone().requires_grad_()
    y = leaf * 1
    loss = cross_entropy(y, T)
    loss.grad_fn.register_hook(FailingHook(1))
    with pytest.raises(KeyError):
        loss.backward()
    y.detach().zero_()
    with pytest.raises(RuntimeError, match="a second time|modified by an inplace operation"):
        loss.backward()


@problems
def test_backwards_of_a_kept_graph_give_the_same_again(problem):
    x, loss = make(**PROBLEMS[problem])
    leaf = x.clone().requires_grad_()
    value = loss(cross_entropy, leaf * 1)
    grads = [torch.autograd.grad(value, leaf, value.new_tensor(3.0), retain_graph=True)[0] for _ in range(3)]
    grads += torch.autograd.grad(value, leaf, value.new_tensor(3.0))
    for grad in grads:
        assert torch.equal(grad, grads[0])
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(value, leaf)


def test_a_gradient_of_the_loss_that_is_sparse_is_refused():
    """Its product with that of the logits has another shape."""
    for function in (F.cross_entropy, cross_entropy):
        for keeps_graph in (False, True):
            leaf = X.clone().requires_grad_()
            loss = function(leaf * 1, T, reduction="none")
            with pytest.raises(NotImplementedError):
                loss.backward(torch.ones(3).to_sparse(), retain_graph=keeps_graph)
            assert leaf.grad is None
    with pytest.raises(NotImplementedError):
        torch.ops.fastopt.cross_entropy_backward(torch.ones(3).to_sparse(), X, X)


# --- Saved tensors ----------------------------------------------------------------------------------------------------


class Kept:
    """Hooks that keep what they pack, as it was and as it is."""

    def __init__(self):
        self.tensors, self.values = [], []

    def pack(self, tensor):
        self.tensors.append(tensor)
        self.values.append(tensor.clone())
        return tensor

    def hooks(self):
        return saved_tensors_hooks(self.pack, lambda tensor: tensor)


@problems
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("keeps_graph", [False, True])
def test_a_tensor_that_a_hook_keeps_is_not_overwritten(problem, factor, keeps_graph):
    x, loss = make(**PROBLEMS[problem])

    def saved(function):
        kept, leaf = Kept(), x.clone().requires_grad_()
        with kept.hooks():
            value = loss(function, leaf * 1) * factor
        value.backward(retain_graph=keeps_graph)
        assert all(map(torch.equal, kept.tensors, kept.values))
        leaf.grad.zero_()
        assert all(map(torch.equal, kept.tensors, kept.values))
        return leaf.grad

    assert_as_torch(saved, x)


def aside(pack, unpack):
    return lambda: saved_tensors_hooks(pack, unpack)


ELSEWHERE = {
    "as they are": aside(lambda t: t, lambda t: t),
    "copied": aside(torch.clone, lambda t: t),
    "copied twice": aside(torch.clone, torch.clone),
    "as views": aside(lambda t: t.view(t.shape), lambda t: t.view(t.shape)),
    "as arrays": aside(lambda t: t.detach().numpy(), torch.from_numpy),
    "on the CPU": save_on_cpu,
    "nested": lambda: saved_tensors_hooks(lambda t: (t,), lambda t: t[0]),
}


@problems
@pytest.mark.parametrize("where", ELSEWHERE)
@pytest.mark.parametrize("create_graph", [False, True])
def test_saved_tensors_may_be_kept_elsewhere(problem, where, create_graph):
    x, loss = make(**PROBLEMS[problem])

    def grad(function):
        leaf = x.clone().requires_grad_()
        with ELSEWHERE[where]():
            value = loss(function, leaf * 2) * 3
        return torch.autograd.grad(value, leaf, create_graph=create_graph)[0].detach()

    assert_as_torch(grad, x)


@problems
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_recomputes_the_loss_and_runs_hooks_once(problem, use_reentrant):
    x, loss = make(**PROBLEMS[problem])

    def grad(function):
        leaf = x.clone().requires_grad_()
        y = leaf * 1
        y.register_hook(tripled)
        checkpoint(lambda y: loss(function, y * 2) * 3, y, use_reentrant=use_reentrant).backward()
        return leaf.grad

    assert_as_torch(grad, x)


@pytest.mark.native
def test_a_checkpointed_loss_ran_in_the_kernel_twice():
    leaf = make_values((3, 5)).requires_grad_()
    before = kernel_calls("cross_entropy")
    checkpoint(lambda y: cross_entropy(y, torch.arange(3)), leaf, use_reentrant=False).backward()
    assert kernel_calls("cross_entropy") == before + 2


# --- Errors of the user's own functions -------------------------------------------------------------------------------


class Failing(torch.Tensor):
    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "cross_entropy" in getattr(function, "__name__", ""):
            Failing.calls += 1
            raise TypeError("a user's own")
        return super().__torch_function__(function, types, args, kwargs)


class FailingMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        Failing.calls += 1
        raise TypeError("a user's own")


class FailingDispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Failing.calls += 1
        raise TypeError("a user's own")


class Number:
    """What is taken for an integer by its own method, which fails."""

    def __index__(self):
        Failing.calls += 1
        raise TypeError("a user's own")

    __int__ = __float__ = __index__


def fail(*args):
    Failing.calls += 1
    raise TypeError("a user's own")


def within(context):
    def run(function):
        with context:
            function(X.clone().requires_grad_() * 1, T)

    return run


FAILURES = {
    "a subclass of logits": lambda function: function(X.as_subclass(Failing), T),
    "a subclass of the target": lambda function: function(X, T.as_subclass(Failing)),
    "a subclass of weights": lambda function: function(X, T, torch.ones(5).as_subclass(Failing)),
    "a function mode": within(FailingMode()),
    "a dispatch mode": within(FailingDispatch()),
    "a hook that packs": within(saved_tensors_hooks(fail, lambda t: t)),
    "a number": lambda function: function(X, T, ignore_index=Number()),
}


@pytest.mark.parametrize("row", FAILURES)
def test_a_type_error_of_the_users_own_is_raised_once(row):
    def outcome(function):
        Failing.calls, before = 0, kernel_calls("cross_entropy")
        with pytest.raises(TypeError) as error:
            FAILURES[row](function)
        return Failing.calls, str(error.value).replace("_cross_entropy()", "cross_entropy()"), error.type, before

    ours, before = outcome(cross_entropy)[:3], outcome(cross_entropy)[3]
    theirs = outcome(F.cross_entropy)[:3]
    if row in ("a hook that packs", "a dispatch mode"):  # how much is saved, and how many operators run, may differ
        assert ours[1:] == theirs[1:]
        assert ours[0] == 1
    else:
        assert ours == theirs
    if is_native():
        assert kernel_calls("cross_entropy") <= before + 1


def test_a_type_error_in_a_backwards_hook_is_raised_once():
    def outcome(function):
        Failing.calls = 0
        leaf = X.clone().requires_grad_()
        y = leaf * 1
        y.register_hook(fail)
        loss = function(y, T)
        with pytest.raises(TypeError, match="a user's own"):
            loss.backward()
        with pytest.raises(TypeError, match="a user's own"), saved_tensors_hooks(lambda t: t, fail):
            function(leaf * 1, T).backward()
        return Failing.calls

    theirs, ours = both(outcome)
    assert ours == theirs == 2


def test_a_module_with_a_hook_that_fails_computes_its_loss_once():
    for module in (fastopt.CrossEntropyLoss(), torch.nn.CrossEntropyLoss()):
        Failing.calls = 0
        module.register_forward_hook(fail)
        with pytest.raises(TypeError, match="a user's own"):
            module(X, T)
        assert Failing.calls == 1
