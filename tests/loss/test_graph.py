"""Backwards of cross-entropy that fail and are repeated, and saved tensors that hooks keep or move."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import devices
from common import kernel_calls
from loss_cases import make_values
from loss_helpers import PROBLEMS, assert_as_torch, assert_both_same, both, cross_entropy, make_problem, problems

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

X, T = torch.linspace(-1, 1, 15).view(3, 5), torch.arange(3)


# --- Repeated backwards ---------------------------------------------------------------------------------------------


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
    x, loss = make_problem(**PROBLEMS[problem])
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
    x, loss = make_problem(**PROBLEMS[problem])
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
    x, loss = make_problem(**PROBLEMS[problem])

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
    x, loss = make_problem(**PROBLEMS[problem])

    def grad(function):
        leaf = x.clone().requires_grad_()
        with ELSEWHERE[where]():
            value = loss(function, leaf * 2) * 3
        return torch.autograd.grad(value, leaf, create_graph=create_graph)[0].detach()

    assert_as_torch(grad, x)


@problems
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_recomputes_the_loss_and_runs_hooks_once(problem, use_reentrant):
    x, loss = make_problem(**PROBLEMS[problem])

    def grad(function):
        leaf = x.clone().requires_grad_()
        y = leaf * 1
        y.register_hook(lambda grad: grad * 3)
        checkpoint(lambda y: loss(function, y * 2) * 3, y, use_reentrant=use_reentrant).backward()
        return leaf.grad

    assert_as_torch(grad, x)


@pytest.mark.native
def test_a_checkpointed_loss_ran_in_the_kernel_twice():
    leaf = make_values((3, 5)).requires_grad_()
    before = kernel_calls("cross_entropy")
    checkpoint(lambda y: cross_entropy(y, torch.arange(3)), leaf, use_reentrant=False).backward()
    assert kernel_calls("cross_entropy") == before + 2
