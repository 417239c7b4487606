"""Forward-mode derivatives of cross-entropy: tangents of every argument, and of its gradient's."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F

from common import attempt
from loss_cases import make_values
from loss_helpers import assert_both_same, cross_entropy

N, C = 3, 5
WITH_TANGENT = ("logits", "probabilities", "weight")


def make(has_probabilities, dtype=torch.float64):
    x = make_values((N, C), dtype, scale=1.0)
    y = torch.softmax(make_values((N, C), dtype, seed=3), 1) if has_probabilities else x.argmin(1)
    return {"logits": x, "probabilities": y, "weight": torch.linspace(0.5, 1.5, C, dtype=dtype)}


def tangent_of(tensor):
    return make_values(tensor.shape, tensor.dtype, seed=9)


def duals(arguments, names):
    return {
        name: forward_ad.make_dual(tensor, tangent_of(tensor)) if name in names else tensor
        for name, tensor in arguments.items()
    }


SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(WITH_TANGENT, n)]


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_tangents_of_any_arguments_are_torchs(names, reduction, smoothing, requires_grad):
    def value_tangent_and_gradient(function):
        arguments = make(has_probabilities=True)
        arguments["logits"].requires_grad_(requires_grad)
        with forward_ad.dual_level():
            x, y, w = duals(arguments, names).values()
            loss = function(x, y, w, reduction=reduction, label_smoothing=smoothing)
            value, tangent = forward_ad.unpack_dual(loss)
            grad = torch.autograd.grad(loss.sum(), arguments["logits"])[0] if requires_grad else None
            grads = forward_ad.unpack_dual(grad) if requires_grad else ()
            return [t.detach() for t in (value, tangent, *grads)]

    assert_both_same(value_tangent_and_gradient)


@pytest.mark.parametrize("names", [("logits",), ("weight",), ("logits", "weight")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tangents_with_class_indices_are_torchs(names, dtype):
    def tangent(function):
        arguments = make(has_probabilities=False, dtype=dtype)
        with forward_ad.dual_level():
            x, t, w = duals(arguments, names).values()
            return [v.detach() for v in forward_ad.unpack_dual(function(x, t, w, label_smoothing=0.1))]

    ours, theirs = attempt(lambda: tangent(cross_entropy)), attempt(lambda: tangent(F.cross_entropy))
    if isinstance(theirs, tuple):
        assert ours == theirs
    else:
        half = dtype != torch.float32
        torch.testing.assert_close(ours, theirs, **(dict(rtol=3e-2, atol=3e-2) if half else {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("has_probabilities", [False, True])
@pytest.mark.parametrize("retain_graph", [False, True])
@pytest.mark.parametrize("sizes", [(5,), (3, 5), (2, 70), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_a_tangent_of_the_losss_gradient_reaches_that_of_the_logits(
    dtype, reduction, has_probabilities, retain_graph, sizes, inplace_backward
):
    x = make_values(sizes, dtype, scale=1.0)
    dim = 1 if len(sizes) > 1 else 0
    target = x.softmax(dim) if has_probabilities else x.argmin(dim)

    def gradients(function, **options):
        leaf = x.clone().requires_grad_()
        loss = function(leaf * 1, target, reduction=reduction, **options)
        with forward_ad.dual_level():
            factor = forward_ad.make_dual(torch.full_like(loss, 2), torch.full_like(loss, 3))
            grad = torch.autograd.grad(loss, leaf, factor, retain_graph=retain_graph)[0]
            return [tensor.clone() for tensor in forward_ad.unpack_dual(grad)]

    ours = gradients(cross_entropy, inplace_backward=inplace_backward)
    half = dtype == torch.float16
    torch.testing.assert_close(ours, gradients(F.cross_entropy), **(dict(rtol=1e-2, atol=5e-3) if half else {}))


@pytest.mark.parametrize("names", SUBSETS, ids="-".join)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_torchs_checks_of_all_derivatives_pass(names, smoothing):
    arguments = make(has_probabilities=True)
    given = [arguments[name].requires_grad_() for name in names]

    def loss(*tensors):
        x, y, w = {**arguments, **dict(zip(names, tensors, strict=True))}.values()
        return cross_entropy(x, y, w, label_smoothing=smoothing)

    assert torch.autograd.gradcheck(loss, given, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(loss, given, check_fwd_over_rev=True, check_batched_grad=True)


TRANSFORMS = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (tangent_of(x),)),
    "jvp of jvp": lambda f, x: torch.func.jvp(
        lambda x: torch.func.jvp(f, (x,), (tangent_of(x),))[1], (x,), (tangent_of(x),)
    ),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(f), (x,), (tangent_of(x),)),
    "grad of jvp": lambda f, x: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (tangent_of(x),))[1])(x),
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda v: torch.func.jvp(f, (x,), (v,))[1])(torch.stack([x, 2 * x])),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "jacfwd of jacrev": lambda f, x: torch.func.jacfwd(torch.func.jacrev(f))(x),
    "jacrev of jacfwd": lambda f, x: torch.func.jacrev(torch.func.jacfwd(f))(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](tangent_of(x)),
    "autograd's hessian": lambda f, x: torch.autograd.functional.hessian(f, x),
    "autograd's forward jacobian": lambda f, x: torch.autograd.functional.jacobian(
        f, x, vectorize=True, strategy="forward-mode"
    ),
    "autograd's hvp": lambda f, x: torch.autograd.functional.hvp(f, x, tangent_of(x)),
    "autograd's jvp": lambda f, x: torch.autograd.functional.jvp(f, x, tangent_of(x)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WITH_TANGENT)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_each_argument_give_what_torch_gives(transform, name):
    def transformed(function):
        arguments = make(has_probabilities=True)

        def loss(tensor):
            x, y, w = {**arguments, name: tensor}.values()
            return function(x, y, w, label_smoothing=0.1)

        return TRANSFORMS[transform](loss, arguments[name])

    assert_both_same(transformed)


def test_a_dual_level_without_tangents_changes_nothing():
    def gradient(function):
        x = make_values((N, C)).requires_grad_()
        with forward_ad.dual_level():
            function(x, torch.arange(N)).backward()
        return x.grad

    assert_both_same(gradient)
