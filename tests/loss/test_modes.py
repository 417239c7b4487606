"""Cross-entropy under autograd: derivatives of any order, functorch, and the life of a graph."""

import pytest
import torch
import torch.nn.functional as F

import devices
from loss_cases import make_values
from loss_helpers import T, X, assert_both_same, both, cross_entropy, make_case, options_table, shapes

RUNS_ON = (devices.CPU, devices.SHIM_DEVICE)

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


def test_no_graph_is_made_without_grad():
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
